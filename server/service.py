"""What every route shares: the engine, the model's text, the settings, the metrics, and the server's state."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from dspark.engine import Engine, Request, SamplingParams
from dspark.server.auth import ApiKeys
from dspark.server.errors import InvalidRequestError, ModelNotFoundError
from dspark.server.generation import PromptRequest
from dspark.server.metrics import Metrics
from dspark.server.schemas import ChatCompletionRequest, CompletionRequest
from dspark.server.text import ChoiceText, Detokenizer, ModelText
from dspark.server.translate import check_token_ids, sampling_params, template_messages

Result = TypeVar("Result")

INLINE_SIZE = 4096
"""Work on up to so many characters, bytes or token ids is done on the event loop, in about a millisecond; on more in a
thread."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """served_model_name: what clients call the model. api_keys: none means open. max_body_bytes: of one request."""

    served_model_name: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20


class Service:
    """One engine behind one HTTP server."""

    def __init__(self, engine: Engine, text: ModelText, settings: ServerSettings) -> None:
        self.engine = engine
        self.text = text
        self.settings = settings
        self.metrics = Metrics(settings.served_model_name, engine.info)
        self.api_keys = ApiKeys(settings.api_keys, self.metrics.http)
        self.fingerprint = _fingerprint(engine)
        self.created_unix_s = int(time.time())
        self._state = "starting"
        engine.on_step.append(self.metrics.steps.step)

    @property
    def state(self) -> str:
        """starting, ready, draining, or degraded when the engine has failed and answers nothing any more."""
        return "degraded" if self.engine.failed else self._state

    async def start(self) -> None:
        await self.engine.start()
        self._state = "ready"

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let the running ones finish; True when all did within `timeout_s`."""
        self._state = "draining"
        return await self.engine.drain(timeout_s)

    def metrics_page(self) -> bytes:
        """The text that GET /metrics answers."""
        self.metrics.http.set_state(self.state)
        return self.metrics.page(self.engine.gauges())

    def check_model(self, model: str) -> None:
        """Raises ModelNotFoundError."""
        served = self.settings.served_model_name
        if model != served:
            raise ModelNotFoundError(f"The model '{model[:80]}' does not exist; this server serves '{served}'", "model")

    async def chat_prompts(self, body: ChatCompletionRequest, tenant: bytes) -> list[PromptRequest]:
        """Raises InvalidRequestError."""
        sampling = sampling_params(body, self.engine.info.vocab_size)
        messages = template_messages(body.messages)
        length = sum(len(message["content"]) for message in messages)
        token_ids = await off_loop_if_large(length, partial(self.text.encode_chat, messages))
        choices = self._choices(body, sampling, continues_text=False)
        return [_prompt_request(token_ids, sampling, choices, tenant, bool(body.stop), "messages")]

    async def completion_prompts(self, body: CompletionRequest, tenant: bytes) -> list[PromptRequest]:
        """Raises InvalidRequestError."""
        sampling = sampling_params(body, self.engine.info.vocab_size)
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                token_ids = await off_loop_if_large(len(prompt), partial(self.text.encode, prompt))
                echo = prompt
            else:
                check = partial(check_token_ids, "prompt", prompt, self.engine.info.vocab_size)
                await off_loop_if_large(len(prompt), check)
                token_ids = prompt
                echo = self.text.decode(prompt) if body.echo else ""
            choices = self._choices(body, sampling, continues_text=True, echo=echo if body.echo else "")
            prompts.append(_prompt_request(token_ids, sampling, choices, tenant, bool(body.stop), "prompt"))
        return prompts

    def _choices(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        sampling: SamplingParams,
        *,
        continues_text: bool,
        echo: str = "",
    ) -> list[ChoiceText]:
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= frozenset(self.engine.info.eos_token_ids)
        return [
            ChoiceText(
                Detokenizer(self.text.vocabulary, continues_text=continues_text),
                stops=body.stop or (),
                min_tokens=sampling.min_tokens,
                end_token_ids=ends,
                echo=echo,
            )
            for _ in range(body.n or 1)
        ]


def _prompt_request(
    token_ids: Sequence[int],
    sampling: SamplingParams,
    choices: Sequence[ChoiceText],
    tenant: bytes,
    has_stops: bool,
    param: str,
) -> PromptRequest:
    if not token_ids:
        raise InvalidRequestError(f"Invalid value for '{param}': it should have at least 1 token, but has none", param)
    unused = iter(choices)  # the engine asks once per choice, in the order of their indices
    request = Request(
        prompt_token_ids=tuple(token_ids),
        sampling=sampling,
        n=len(choices),
        make_stop_check=(lambda: next(unused)) if has_stops else None,
        cache_salt=tenant,
    )
    return PromptRequest(request, choices)


async def off_loop_if_large(size: int, work: Callable[[], Result]) -> Result:
    """size: characters, bytes or token ids that the work goes through."""
    return work() if size <= INLINE_SIZE else await asyncio.to_thread(work)


def _fingerprint(engine: Engine) -> str:
    """Names everything the text depends on beside the request: the promise of the same tokens holds while it stays."""
    info = engine.info
    parts = (info.model_name, info.device, info.dtype, info.threads, info.row_invariant)
    versions = (version("dspark-server"), version("torch"))
    return "fp_" + hashlib.sha256(repr(parts + versions).encode()).hexdigest()[:12]
