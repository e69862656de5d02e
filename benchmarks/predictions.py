"""What a prediction is worth: target steps where it is right, time where it is useless, and the text in both cases.

    python -m dspark.benchmarks.predictions [--url URL] [--answers 3] [--repeats 7] [--json OUT]

Greedy answers of at least 100 tokens are asked for again with the answer itself as the prediction, with the answer to another
prompt, with none, and without speculation, which tells how many target steps plain decoding takes. The kinds follow each
other in another order in each repeat; ratios are taken within a repeat. Exit status 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from dspark.benchmarks.claims import Claim, print_claims
from dspark.benchmarks.endpoint import Endpoint, EndpointError
from dspark.benchmarks.load import align, positive
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.prompts import mixed
from dspark.benchmarks.server_process import StartError, given_or_started

Kind = Literal["equal", "useless", "none", "plain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BASES: tuple[Kind, Kind] = ("none", "plain")
LEAST_TOKENS = 100
MAX_TOKENS = 160
MOST_STEPS = 0.25
MOST_TIME = 1.05


@dataclass(frozen=True, slots=True)
class Run:
    """One request. steps: target passes that its answer took. same: its text is the one that was predicted."""

    prompt: int
    kind: Kind
    repeat: int
    steps: int
    tokens: int
    seconds: float
    accepted: int
    same: bool


async def find_answers(endpoint: Endpoint, count: int) -> list[tuple[str, str]]:
    """(prompt, greedy answer) of the first `count` prompts with an answer that is long enough. Raises EndpointError."""
    found: list[tuple[str, str]] = []
    for prompt in mixed():
        answer = await endpoint.complete(**_body(prompt.text))
        if answer["usage"]["completion_tokens"] >= LEAST_TOKENS:
            found.append((prompt.text, answer["choices"][0]["message"]["content"]))
        if len(found) == count:
            return found
    raise EndpointError(f"only {len(found)} prompts have an answer of {LEAST_TOKENS} tokens; {count} are needed")


def _body(content: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}


async def measure(endpoint: Endpoint, count: int, repeats: int) -> list[Run]:
    """count: answers, at least two. One client, so that a step of the target is a step of this request."""
    answers = await find_answers(endpoint, count)
    runs = []
    for repeat in range(repeats):
        for index, (prompt, answer) in enumerate(answers):
            other = answers[(index + 1) % count][1]
            # the server learns from each request, so none may always follow the same other one
            for kind in random.Random(f"{repeat} {index}").sample(KINDS, len(KINDS)):
                fields = {
                    "equal": {"prediction": {"type": "content", "content": answer}},
                    "useless": {"prediction": {"type": "content", "content": other}},
                    "none": {},
                    "plain": {"speculation": {"mode": "off"}},
                }[kind]
                began_s = time.perf_counter()
                got = await endpoint.complete(**_body(prompt), **fields)
                seconds = time.perf_counter() - began_s
                usage, text = got["usage"], got["choices"][0]["message"]["content"]
                steps, tokens = usage["speculation"]["rounds"], usage["completion_tokens"]
                accepted = usage["completion_tokens_details"]["accepted_prediction_tokens"]
                runs.append(Run(index, kind, repeat, steps, tokens, seconds, accepted, text == answer))
    return runs


def ratios(runs: Sequence[Run], measure: Literal["steps", "seconds"], kind: Kind, over: Kind) -> list[float]:
    """Of the two kinds, for each prompt and repeat."""
    by = {(run.prompt, run.repeat, run.kind): getattr(run, measure) for run in runs}
    return [value / by[prompt, repeat, over] for (prompt, repeat, k), value in by.items() if k == kind]


def judge(runs: Sequence[Run]) -> list[Claim]:
    """Of medians over prompts and repeats."""
    steps, of_plain = (statistics.median(ratios(runs, "steps", "equal", over)) for over in BASES)
    seconds = statistics.median(ratios(runs, "seconds", "useless", "none"))
    same = sum(run.same for run in runs)
    shortest = min(run.tokens for run in runs)
    equal = f"a prediction equal to the answer takes at most {MOST_STEPS:g} of the target steps"
    return [
        Claim(f"answers have at least {LEAST_TOKENS} tokens", shortest >= LEAST_TOKENS, f"{shortest}"),
        Claim(f"{equal} of plain decoding", of_plain <= MOST_STEPS, f"{of_plain:.3f}"),
        Claim(f"{equal} without one", steps <= MOST_STEPS, f"{steps:.3f}"),
        Claim(f"a useless one takes at most {MOST_TIME:g} times the time", seconds <= MOST_TIME, f"{seconds:.3f}"),
        Claim("the text is the same in all cases", same == len(runs), f"{same} of {len(runs)}"),
    ]


def table(runs: Sequence[Run]) -> str:
    """One row per kind: medians over prompts and repeats; ratios are taken within a repeat."""
    heads = ["prediction", "target steps", "÷ plain", "÷ none", "seconds", "÷ none", "accepted of it", "tokens"]
    rows = [heads]
    for kind in KINDS:
        of = [run for run in runs if run.kind == kind]
        rows.append(
            [
                "none, no speculation" if kind == "plain" else kind,
                f"{statistics.median(run.steps for run in of):.0f}",
                f"{statistics.median(ratios(runs, 'steps', kind, 'plain')):.3f}",
                f"{statistics.median(ratios(runs, 'steps', kind, 'none')):.3f}",
                f"{statistics.median(run.seconds for run in of):.2f}",
                f"{statistics.median(ratios(runs, 'seconds', kind, 'none')):.3f}",
                f"{statistics.median(run.accepted for run in of):.0f}",
                f"{statistics.median(run.tokens for run in of):.0f}",
            ]
        )
    return align(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="server that runs already and has nothing else to do (default: starts one)")
    parser.add_argument("--answers", type=positive(int), default=3, help="at least 2 (default: %(default)s)")
    parser.add_argument("--repeats", type=positive(int), default=7)
    parser.add_argument("--threads", type=positive(int), default=1, help="of the server that is started")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every run and the machine's facts here")
    args = parser.parse_args()
    if args.answers < 2:
        parser.error("--answers must be at least 2: another prompt's answer is the useless prediction")

    async def run(url: str) -> list[Run]:
        async with Endpoint(url, request_timeout_s=3600.0) as endpoint:
            return await measure(endpoint, args.answers, args.repeats)

    try:
        with given_or_started(args.url, args.threads) as url:
            runs = asyncio.run(run(url))
    except (StartError, EndpointError) as error:
        print(f"predictions: {error}", file=sys.stderr)
        return 1
    machine = describe_machine()
    print(f"{machine.line()}\n\n{table(runs)}\n")
    if args.json:
        facts = {"machine": machine.as_dict(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        args.json.write_text(json.dumps(facts | {"runs": [asdict(one) for one in runs]}, indent=1) + "\n", "utf-8")
    return print_claims(judge(runs))


if __name__ == "__main__":
    raise SystemExit(main())
