"""Grammars under speculation: every text obeys its grammar, and neither drafts nor preemption change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import DTYPES, Answer, OpenEngine, OracleDrafter, RandomAllocation, read, totals
from identities import assert_identities
from numpy.typing import NDArray
from random_grammars import Automaton, AutomatonGrammar, random_automaton
from random_requests import random_requests

from dspark.engine import FinishReason, Grammar, GrammarError, Reason, Request, RequestError, SamplingParams

GAMMA = 5
VOCAB_SIZE, END = 320, 2
CRAMPED = {"num_blocks": 16, "max_num_seqs": 16, "max_num_batched_tokens": 24}
POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {"speculation": "fixed"},
    "adaptive": {"speculation": "adaptive"},
    "any lengths": {"speculation": "adaptive", "controller": RandomAllocation},
}


def maker(automaton: Automaton) -> Callable[[], Grammar]:
    return lambda: AutomatonGrammar(automaton)


def automata(count: int) -> list[Automaton]:
    return [random_automaton(seed, VOCAB_SIZE, END) for seed in range(count)]


def grammar_requests(automata: Sequence[Automaton]) -> list[Request]:
    """Every sampling parameter, greedy and sampled; what would contradict a grammar is left out."""
    requests = []
    for number, (one, automaton) in enumerate(
        zip(random_requests(len(automata), VOCAB_SIZE, END, seed=11), automata, strict=True)
    ):
        sampling = replace(one.sampling, ignore_eos=False)
        if number % 3 == 0:  # long enough that a small pool runs out
            sampling = replace(sampling, max_tokens=80, min_tokens=60, stop_token_ids=())
            one = replace(one, make_stop_check=None)
        requests.append(replace(one, sampling=sampling, make_grammar=maker(automaton)))
    return requests


@pytest.fixture(scope="module")
def languages() -> list[Automaton]:
    return automata(60)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(open_engine: OpenEngine, languages: list[Automaton], dtype: str) -> list[Answer]:
    """The answers of plain decoding, each request alone."""
    return open_engine(dtype=dtype, speculation="off", lag=0).answer_one_at_a_time(grammar_requests(languages))


def test_every_text_obeys_its_grammar(plain: list[Answer], languages: list[Automaton]) -> None:
    ended = 0
    for automaton, answer in zip(languages, plain, strict=True):
        for tokens, reason in zip(answer.tokens, answer.finish_reasons, strict=True):
            if tokens and tokens[-1] == END and reason is FinishReason.STOP:
                assert automaton.accepts(tokens)
                ended += 1
            else:
                assert automaton.allows([token for token in tokens if token != END])
    assert ended > 20
    temperatures = {request.sampling.greedy for request in grammar_requests(languages)}
    assert temperatures == {True, False}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cramped", [False, True])
def test_same_tokens_with_drafts_illegal_drafts_and_preemption(
    open_engine: OpenEngine, languages: list[Automaton], plain: list[Answer], dtype: str, policy: str, cramped: bool
) -> None:
    requests = grammar_requests(languages)
    oracle = OracleDrafter(GAMMA, VOCAB_SIZE)
    for request, answer in zip(requests, plain, strict=True):
        oracle.learn(request, answer.tokens)
    options = POLICIES[policy] | (CRAMPED if cramped else {})
    engine = open_engine(use=oracle, dtype=dtype, drafter="lookup", num_speculative_tokens=GAMMA, **options)
    for _ in range(2):  # the second time with prefix hits
        answers = engine.answer_together(requests)
        for answer, alone in zip(answers, plain, strict=True):
            assert answer.text == alone.text
    sums = totals(engine.steps)
    assert sums["accepted"] > 0
    assert sum(step.truncated.get(Reason.GRAMMAR, 0) for step in engine.steps) > 0
    assert (sums["preemptions"] > 0) == cramped
    for step in engine.steps:
        assert_identities(step)


def test_an_illegal_draft_never_gets_a_row(open_engine: OpenEngine) -> None:
    """Each text is a's and b's in turn; the drafts break off after the first right token of each block."""
    a, b = 10, 11
    automaton = Automaton([{a: 1}, {b: 0}], frozenset(), END, VOCAB_SIZE)
    request = Request((5, 6, 7), SamplingParams(temperature=0.0, seed=1, max_tokens=40), make_grammar=maker(automaton))
    oracle = OracleDrafter(GAMMA, VOCAB_SIZE, error_rate=1.0)
    engine = open_engine(use=oracle, drafter="lookup", num_speculative_tokens=GAMMA, speculation="fixed")
    oracle.learn(request, [[a, b] * 20])
    answer = engine.answer(request)
    assert answer.tokens == [[a, b] * 20]
    sums = totals(engine.steps)
    assert sums["drafted"] > 0
    assert sums["verified"] == sums["accepted"] == 0
    assert {reason for step in engine.steps for reason in step.truncated} <= {Reason.GRAMMAR, Reason.LENGTH}


def test_what_the_grammar_leaves_no_choice_about_is_drafted(open_engine: OpenEngine) -> None:
    """Eleven tokens that must come, then one of many: two rounds for what plain decoding takes twelve for."""
    chain = [{100 + i: i + 1} for i in range(11)]
    automaton = Automaton([*chain, dict.fromkeys(range(3, 90), 0)], frozenset(), END, VOCAB_SIZE)
    answers = {}
    for speculation in ("off", "fixed"):
        engine = open_engine(drafter="lookup", speculation=speculation)
        request = Request((5, 6, 7), SamplingParams(seed=4, max_tokens=72), make_grammar=maker(automaton))
        answers[speculation] = (engine.answer(request), engine)
    (plain, _), (drafted, engine) = answers["off"], answers["fixed"]
    assert drafted.text == plain.text
    sums = totals(engine.steps)
    assert sums["rounds_with_drafts"] + sums["rounds_without_drafts"] <= 6 * 2 + 1
    assert sums["accepted"] >= 72 - 13


def test_where_only_one_token_is_allowed_it_is_sampled_whatever_else_is_asked_for(open_engine: OpenEngine) -> None:
    forced = [300, 7, 7, 150]
    automaton = Automaton([{token: i + 1} for i, token in enumerate(forced)] + [{}], frozenset({4}), END, VOCAB_SIZE)
    engine = open_engine(drafter="lookup")
    for params in (
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 1},
        {"top_p": 0.01, "min_p": 1.0},
        {"logit_bias": {300: -100.0, 9: 100.0}, "frequency_penalty": 2.0},
        {"min_tokens": 20},
    ):
        answer = engine.answer(
            Request((3, 4), SamplingParams(**{"seed": 3, "max_tokens": 30, **params}), make_grammar=maker(automaton))
        )
        assert answer.tokens == [[*forced, END]]
        assert answer.finish_reasons == [FinishReason.STOP]


def test_min_tokens_keeps_a_text_going_where_the_grammar_lets_it(open_engine: OpenEngine) -> None:
    anything = Automaton([dict.fromkeys(range(3, 200), 0)], frozenset({0}), END, VOCAB_SIZE)
    sampling = SamplingParams(seed=1, max_tokens=20, min_tokens=10, logit_bias={END: 100.0})
    answer = open_engine(drafter="lookup").answer(Request((3, 4), sampling, make_grammar=maker(anything)))
    assert len(answer.tokens[0]) == 11
    assert answer.tokens[0][-1] == END


def test_a_stop_token_of_the_request_ends_a_text_that_the_grammar_lets_go_on(open_engine: OpenEngine) -> None:
    automaton = Automaton([{50: 1}, {51: 0}], frozenset(), END, VOCAB_SIZE)
    sampling = SamplingParams(seed=1, max_tokens=20, stop_token_ids=(51,))
    answer = open_engine(drafter="lookup").answer(Request((3, 4), sampling, make_grammar=maker(automaton)))
    assert answer.tokens == [[50, 51]]
    assert answer.finish_reasons == [FinishReason.STOP]


def test_logprobs_stay_those_of_the_raw_distribution(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup")
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=1, logprobs=3)
    free = engine.answer(Request((3, 4), sampling)).logprobs[0][0]
    rare = next(token for token in range(3, VOCAB_SIZE) if token not in dict(free.top))
    only = Automaton([{rare: 0}], frozenset(), END, VOCAB_SIZE)
    one = engine.answer(Request((3, 4), sampling, make_grammar=maker(only))).logprobs[0][0]
    assert one.token_id == rare
    assert one.top == free.top
    assert one.logprob < min(dict(free.top).values())


class Breaking(AutomatonGrammar):
    """Breaks down when it is asked for the mask after `tokens` tokens; `how` says what with."""

    def __init__(self, tokens: int, how: str) -> None:
        super().__init__(Automaton([dict.fromkeys(range(3, 300), 0)], frozenset(), END, VOCAB_SIZE))
        self._tokens = tokens
        self._how = how

    def mask(self) -> NDArray[np.int32]:
        if len(self._states) <= self._tokens:
            return super().mask()
        if self._how == "raises":
            raise GrammarError("too costly to follow")
        return np.zeros(10, np.int32)


@pytest.mark.parametrize("how", ["raises", "allows nothing"])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_grammar_that_breaks_down_ends_its_request_and_no_other(
    open_engine: OpenEngine, how: str, tokens: int
) -> None:
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=30)
    healthy = Request((5, 6, 7), sampling)
    engine = open_engine(drafter="lookup", speculation="fixed")
    alone = engine.answer(healthy)
    broken = engine.engine.submit(Request((9, 9), sampling, n=2, make_grammar=lambda: Breaking(tokens, how)))
    beside = engine.engine.submit(healthy)

    seen: list[int] = []

    async def read_broken() -> None:
        async with broken:
            async for delta in broken:
                seen.extend(delta.token_ids if delta.index == 0 else ())

    with pytest.raises(GrammarError):
        engine.run(read_broken())
    others = engine.run(read(beside)).tokens[0]
    assert len(seen) <= tokens
    assert others == alone.tokens[0]
    assert not engine.engine.failed
    assert sum(step.freed_after_cancel for step in engine.steps) == 0
    for step in engine.steps:
        assert_identities(step)
    engine.check_pool_is_whole()


def test_a_grammar_that_cannot_be_made_ends_its_request(open_engine: OpenEngine) -> None:
    def make() -> Grammar:
        raise GrammarError("not today")

    engine = open_engine(drafter="lookup")
    with pytest.raises(GrammarError, match="not today"):
        engine.answer(Request((5, 6), SamplingParams(max_tokens=5), make_grammar=make))
    engine.check_pool_is_whole()


def test_grammars_need_coupled_verification_and_an_end_of_text(open_engine: OpenEngine, draft_checkpoint: Any) -> None:
    request = Request((5, 6), SamplingParams(max_tokens=5), make_grammar=maker(automata(1)[0]))
    rejection = open_engine(drafter=str(draft_checkpoint), lookup=False, verification="rejection", speculation="fixed")
    with pytest.raises(RequestError, match="need `coupled` verification"):
        rejection.engine.submit(request)
    with pytest.raises(RequestError, match="`ignore_eos` must be false with a grammar"):
        open_engine(drafter="lookup").engine.submit(
            replace(request, sampling=SamplingParams(max_tokens=5, ignore_eos=True))
        )
