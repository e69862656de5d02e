"""Every limit of a request is refused by name, with the limit and the given value, before anything is queued."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
from fake_engine import tiny_info

from dspark.engine import ContextLengthError, Request, RequestError, SamplingParams
from dspark.engine.request_check import check_request, output_limit

INFO = tiny_info()
"""Context 512, vocabulary 320, a pool of 100 blocks of 16."""

OUT_OF_RANGE: list[tuple[str, Any, list[str]]] = [
    ("temperature", -0.1, ["0.0", "2.0", "-0.1"]),
    ("temperature", 2.5, ["0.0", "2.0", "2.5"]),
    ("temperature", nan, ["0.0", "2.0", "nan"]),
    ("top_p", 0.0, ["above 0.0", "1.0", "given 0.0"]),
    ("top_p", 1.01, ["1.0", "1.01"]),
    ("min_p", -0.01, ["0.0", "-0.01"]),
    ("min_p", 1.5, ["1.0", "1.5"]),
    ("top_k", -1, ["0", "-1"]),
    ("top_k", 321, ["320", "321"]),
    ("presence_penalty", -2.1, ["-2.0", "-2.1"]),
    ("presence_penalty", 2.1, ["2.0", "2.1"]),
    ("frequency_penalty", -2.1, ["-2.0", "-2.1"]),
    ("frequency_penalty", inf, ["2.0", "inf"]),
    ("repetition_penalty", 0.0, ["above 0.0", "given 0.0"]),
    ("repetition_penalty", 2.1, ["2.0", "2.1"]),
    ("logprobs", -1, ["0", "-1"]),
    ("logprobs", 21, ["20", "21"]),
    ("logit_bias", {320: 1.0}, ["319", "320"]),
    ("logit_bias", {-1: 1.0}, ["0", "-1"]),
    ("logit_bias", {5: 100.5}, ["100.0", "100.5"]),
    ("logit_bias", {5: nan}, ["100.0", "nan"]),
    ("stop_token_ids", (3, 320), ["319", "320"]),
    ("max_tokens", 0, ["at least 1", "0"]),
    ("max_tokens", -5, ["at least 1", "-5"]),
    ("min_tokens", -1, ["0..", "-1"]),
]


@pytest.mark.parametrize(("param", "value", "parts"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused_by_name_limit_and_value(param: str, value: Any, parts: list[str]) -> None:
    request = Request((1, 2, 3), replace(SamplingParams(), **{param: value}))
    with pytest.raises(RequestError) as refused:
        check_request(request, INFO)
    assert refused.value.param == param
    assert f"`{param}`" in str(refused.value)
    assert [part for part in parts if part not in str(refused.value)] == []


REQUEST_OUT_OF_RANGE: list[tuple[str, Any, list[str]]] = [
    ("predicted_token_ids", (3, 320), ["319", "320"]),
    ("max_draft_tokens", -1, ["0", "-1"]),
    ("max_draft_tokens", 8, ["7", "8"]),
]


@pytest.mark.parametrize(("param", "value", "parts"), REQUEST_OUT_OF_RANGE, ids=str)
def test_a_field_of_the_request_out_of_range_is_refused_likewise(param: str, value: Any, parts: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        check_request(Request((1, 2, 3), **{param: value}), INFO)
    assert refused.value.param == param
    assert [part for part in [f"`{param}`", *parts] if part not in str(refused.value)] == []


IN_RANGE: dict[str, list[Any]] = {
    "temperature": [0.0, 2.0],
    "top_p": [1e-6, 1.0],
    "min_p": [0.0, 1.0],
    "top_k": [0, 320],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "repetition_penalty": [1e-6, 2.0],
    "logprobs": [None, 0, 20],
    "logit_bias": [{}, {0: -100.0, 319: 100.0}],
    "stop_token_ids": [(), (0, 319)],
    "max_tokens": [None, 1, 509],
    "min_tokens": [0, 509],
    "seed": [None, -(2**63), 2**64 - 1],
}


@pytest.mark.parametrize(("param", "value"), [(p, v) for p, values in IN_RANGE.items() for v in values], ids=str)
def test_the_limits_themselves_are_allowed(param: str, value: Any) -> None:
    check_request(Request((1, 2, 3), replace(SamplingParams(), **{param: value})), INFO)


@pytest.mark.parametrize("n", [0, -1, 129])
def test_the_number_of_choices_is_bounded(n: int) -> None:
    with pytest.raises(RequestError, match=rf"`n` must be at least 1 and at most 128, given {n}"):
        check_request(Request((1,), n=n), INFO)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty") as refused:
        check_request(Request(()), INFO)
    assert refused.value.param == "prompt_token_ids"


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(RequestError, match=rf"token id {token} .* 0\.\.319") as refused:
        check_request(Request((1, token)), INFO)
    assert refused.value.param == "prompt_token_ids"


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_and_one_that_leaves_one_is_not() -> None:
    check_request(Request((1,) * 511), INFO)
    with pytest.raises(ContextLengthError, match="holds 512 tokens and the prompt uses 512; shorten it to at most 511"):
        check_request(Request((1,) * 512), INFO)


def test_output_beyond_the_context_is_refused_with_what_would_fit() -> None:
    request = Request((1,) * 500, SamplingParams(max_tokens=13))
    with pytest.raises(ContextLengthError, match=r"`max_tokens` is 13 .* 512 .* 500; ask for at most 12") as refused:
        check_request(request, INFO)
    assert refused.value.param == "max_tokens"
    check_request(replace(request, sampling=SamplingParams(max_tokens=12)), INFO)


def test_output_beyond_the_whole_pool_is_refused_and_the_pool_is_named() -> None:
    small = tiny_info(num_blocks=4)
    with pytest.raises(ContextLengthError, match=r"holds 64 tokens \(its K/V pool has 4 blocks of 16\)"):
        check_request(Request((1,) * 60, SamplingParams(max_tokens=5)), small)
    check_request(Request((1,) * 60, SamplingParams(max_tokens=4)), small)


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match=r"`min_tokens` must be in 0\.\.5, given 6"):
        check_request(Request((1,), SamplingParams(max_tokens=5, min_tokens=6)), INFO)


def test_without_max_tokens_the_output_may_fill_context_and_pool() -> None:
    assert output_limit(Request((1,) * 12), INFO) == 500
    assert output_limit(Request((1,) * 12), tiny_info(num_blocks=4)) == 52
    assert output_limit(Request((1,) * 12, SamplingParams(max_tokens=7)), INFO) == 7
