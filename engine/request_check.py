"""Is this a request that can run? Every limit of the engine's own, each refused with the parameter, the limit and the value."""

from __future__ import annotations

from dspark.engine.errors import ContextLengthError, RequestError
from dspark.engine.facts import EngineInfo
from dspark.engine.request import Request

MOST_LOGPROBS = 20
MOST_CHOICES = 128


def output_limit(request: Request, info: EngineInfo) -> int:
    """Output tokens of one choice: what was asked for, or what context and pool leave."""
    room = _capacity(info) - len(request.prompt_token_ids)
    return room if request.sampling.max_tokens is None else request.sampling.max_tokens


def _capacity(info: EngineInfo) -> int:
    """Tokens of the longest sequence that can run alone; its last token needs no K/V."""
    return min(info.max_model_len, info.num_blocks * info.block_size)


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise RequestError for whatever can never run."""
    _check_prompt(request, info)
    _check_range("n", request.n, 1, MOST_CHOICES)
    _check_range("priority", request.priority, -100, 100)
    params = request.sampling
    _check_range("temperature", params.temperature, 0.0, 2.0)
    _check_range("top_p", params.top_p, 0.0, 1.0, above=True)
    _check_range("min_p", params.min_p, 0.0, 1.0)
    _check_range("top_k", params.top_k, 0, info.vocab_size)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", params.repetition_penalty, 0.0, 2.0, above=True)
    if params.logprobs is not None:
        _check_range("logprobs", params.logprobs, 0, MOST_LOGPROBS)
    for token, bias in params.logit_bias.items():
        _check_range("logit_bias", token, 0, info.vocab_size - 1)
        _check_range("logit_bias", bias, -100.0, 100.0)
    for token in params.stop_token_ids:
        _check_range("stop_token_ids", token, 0, info.vocab_size - 1)
    for token in request.predicted_token_ids:
        _check_range("predicted_token_ids", token, 0, info.vocab_size - 1)
    if request.max_draft_tokens is not None:
        _check_range("max_draft_tokens", request.max_draft_tokens, 0, info.max_draft_tokens)
    if request.make_grammar is not None:
        _check_grammar(request, info)
    if params.max_tokens is not None and params.max_tokens < 1:
        raise RequestError("max_tokens", f"`max_tokens` must be at least 1, given {params.max_tokens}")
    limit = output_limit(request, info)
    if not 0 <= params.min_tokens <= limit:
        raise RequestError("min_tokens", f"`min_tokens` must be in 0..{limit}, given {params.min_tokens}")


def _check_grammar(request: Request, info: EngineInfo) -> None:
    if info.verification != "coupled":
        raise RequestError(
            "make_grammar", f"grammars need `coupled` verification, and this server runs with `{info.verification}`"
        )
    if request.sampling.ignore_eos:
        raise RequestError("ignore_eos", "`ignore_eos` must be false with a grammar, which ends by an end of text")


def _check_prompt(request: Request, info: EngineInfo) -> None:
    prompt = request.prompt_token_ids
    if not prompt:
        raise RequestError("prompt_token_ids", "the prompt is empty; give at least one token")
    for token in prompt:
        if not 0 <= token < info.vocab_size:
            raise RequestError(
                "prompt_token_ids", f"token id {token} is not in the vocabulary, 0..{info.vocab_size - 1}"
            )
    capacity = _capacity(info)
    pool = (
        "" if capacity == info.max_model_len else f" (its K/V pool has {info.num_blocks} blocks of {info.block_size})"
    )
    if len(prompt) >= capacity:
        raise ContextLengthError(
            "prompt_token_ids",
            f"this model's context holds {capacity} tokens{pool} and the prompt uses {len(prompt)}; "
            f"shorten it to at most {capacity - 1}",
        )
    wanted = request.sampling.max_tokens
    if wanted is not None and len(prompt) + wanted > capacity:
        raise ContextLengthError(
            "max_tokens",
            f"`max_tokens` is {wanted} but this model's context holds {capacity} tokens{pool} and the prompt uses "
            f"{len(prompt)}; ask for at most {capacity - len(prompt)}",
        )


def _check_range(param: str, value: float, lowest: float, highest: float, above: bool = False) -> None:
    """`above`: the lowest value itself is excluded. NaN is in no range."""
    if not lowest <= value <= highest or (above and value == lowest):
        bounds = f"{'above' if above else 'at least'} {lowest} and at most {highest}"
        raise RequestError(param, f"`{param}` must be {bounds}, given {value}")
