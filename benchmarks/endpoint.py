"""An OpenAI server seen from outside: one streamed chat request, timed chunk by chunk."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

ACCEPTANCE_COUNTERS: tuple[dict[str, str], ...] = (
    {
        "rounds": "dspark_spec_rounds_total",
        "drafted": "dspark_spec_drafted_tokens_total",
        "verified": "dspark_spec_verified_tokens_total",
        "accepted": "dspark_spec_accepted_tokens_total",
    },
    {
        "rounds": "vllm:spec_decode_num_drafts_total",
        "drafted": "vllm:spec_decode_num_draft_tokens_total",
        "verified": "vllm:spec_decode_num_draft_tokens_total",
        "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    },
)
"""Counters of `/metrics` that tell acceptance, by server family. vLLM verifies all that it drafts."""


class EndpointError(Exception):
    """The server cannot be measured at all: unreachable, no model, a refused request."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Sums over requests. A round is one sequence in one verify; it gives its accepted drafts and one more token."""

    rounds: int
    drafted: int
    verified: int
    accepted: int

    @property
    def acceptance_ratio(self) -> float | None:
        """Accepted ÷ verified draft tokens; None when nothing was verified."""
        return self.accepted / self.verified if self.verified else None

    @property
    def accepted_length(self) -> float | None:
        """Tokens per round, the bonus token included; None without rounds."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else None

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(
            self.rounds + other.rounds,
            self.drafted + other.drafted,
            self.verified + other.verified,
            self.accepted + other.accepted,
        )

    def __sub__(self, other: Speculation) -> Speculation:
        return Speculation(
            self.rounds - other.rounds,
            self.drafted - other.drafted,
            self.verified - other.verified,
            self.accepted - other.accepted,
        )


@dataclass(slots=True)
class RequestRecord:
    """What one request saw. Times are of `time.perf_counter()`, in seconds.

    chunk_s: arrival of every chunk that carried text; a chunk may hold several tokens.
    completion_tokens, prompt_tokens: of the server's usage, None when it sent none.
    error: why the request failed, None when it was answered to its end; status: of the HTTP answer.
    """

    started_s: float
    finished_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    speculation: Speculation | None = None
    finish_reason: str | None = None
    status: int | None = None
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """Of the usage; without it the number of chunks, which is less when chunks hold several tokens."""
        return len(self.chunk_s) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_s[0] - self.started_s if self.chunk_s else None

    @property
    def time_per_output_token_s(self) -> float | None:
        """(last - first chunk) ÷ (tokens - 1); None below two tokens or two chunks."""
        if len(self.chunk_s) < 2 or self.output_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def chunk_gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.chunk_s)]


class Endpoint:
    """One model on one OpenAI server. `async with Endpoint(url) as endpoint: ...`; EndpointError for a malformed URL.

    url: root of the server, with or without `/v1`.      model: None: the first that the server lists.
    request_timeout_s: from sending a request to its last byte.
    extra_body: fields added to every request.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str | None = None,
        request_timeout_s: float = 300.0,
        extra_body: Mapping[str, object] | None = None,
    ) -> None:
        try:
            self.url = str(httpx.URL(url)).rstrip("/").removesuffix("/v1")
        except httpx.InvalidURL as error:
            raise EndpointError(f"{url!r} is not a URL: {error}") from error
        self.request_timeout_s = request_timeout_s
        self.extra_body = dict(extra_body or {})
        self._model = model
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(request_timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy between the two would be measured too
        )

    async def __aenter__(self) -> Self:
        """Raises EndpointError when the server does not answer or serves no model."""
        if self._model is None:
            try:
                self._model = await self._first_model()
            except EndpointError:
                await self._client.aclose()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    @property
    def model(self) -> str:
        if self._model is None:
            raise RuntimeError("the endpoint is not open: use it as `async with Endpoint(...)`")
        return self._model

    async def _first_model(self) -> str:
        address = f"{self.url}/v1/models"
        try:
            response = await self._client.get(address)
        except httpx.TransportError as error:
            raise EndpointError(f"cannot reach {address}: {_reason(error)}") from error
        if response.status_code != 200:
            raise EndpointError(f"{address} answered {response.status_code}: {_error_text(response.text)}")
        try:
            models = [str(entry["id"]) for entry in response.json()["data"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise EndpointError(f"{address} did not answer with a list of models: {response.text[:200]!r}") from error
        if not models:
            raise EndpointError(f"{address} lists no model; name one with --model")
        return models[0]

    async def chat(self, text: str, max_tokens: int, temperature: float) -> RequestRecord:
        """Send one user message and read its stream to the end. Never raises for what the server does: see `error`."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
            **self.extra_body,
        }
        record = RequestRecord(started_s=time.perf_counter())
        try:
            async with asyncio.timeout(self.request_timeout_s):
                await self._read_stream(body, record)
        except httpx.TransportError as error:
            record.error = f"connection failed: {_reason(error)}"
        except TimeoutError:
            record.error = f"no complete answer within {self.request_timeout_s:g} s"
        record.finished_s = time.perf_counter()
        return record

    async def complete(self, **fields: object) -> dict[str, Any]:
        """Send one chat request with these fields and return its whole answer. Raises EndpointError for any but a 200."""
        address = f"{self.url}/v1/chat/completions"
        try:
            response = await self._client.post(address, json={"model": self.model, **self.extra_body, **fields})
        except httpx.TransportError as error:
            raise EndpointError(f"{address}: {_reason(error)}") from error
        if response.status_code != 200:
            raise EndpointError(f"{address} answered {response.status_code}: {_error_text(response.text)}")
        answer: dict[str, Any] = response.json()
        return answer

    async def _read_stream(self, body: Mapping[str, object], record: RequestRecord) -> None:
        async with self._client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            record.status = response.status_code
            if response.status_code != 200:
                await response.aread()
                record.error = f"HTTP {response.status_code}: {_error_text(response.text)}"
                return
            complete = False
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    complete = True
                    break
                try:
                    _note_event(json.loads(data), record)
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    record.error = f"not a chat completion chunk ({error!r}): {data[:200]}"
                if record.error is not None:
                    return
            if not complete and record.finish_reason is None:
                record.error = "the stream ended without a finish_reason"

    async def speculation_counters(self) -> Speculation | None:
        """Totals since the server started, of `/metrics`; None when the server does not tell."""
        try:
            response = await self._client.get(f"{self.url}/metrics")
        except httpx.TransportError:
            return None
        if response.status_code != 200:
            return None
        totals: dict[str, float] = {}
        try:
            for family in text_string_to_metric_families(response.text):
                for sample in family.samples:
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        except ValueError:  # something else lives at /metrics
            return None
        for names in ACCEPTANCE_COUNTERS:
            if names["accepted"] in totals:
                return Speculation(**{field_name: int(totals.get(name, 0)) for field_name, name in names.items()})
        return None


def _note_event(event: dict, record: RequestRecord) -> None:
    """Take in one event of the stream, now."""
    if event.get("error") is not None:
        record.error = f"error in the stream: {_error_text(json.dumps(event))}"
        return
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            record.chunk_s.append(time.perf_counter())
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    usage = event.get("usage")
    if usage:
        record.completion_tokens = int(usage["completion_tokens"])
        record.prompt_tokens = int(usage["prompt_tokens"])
        told = usage.get("speculation")
        if told:
            record.speculation = Speculation(
                **{name: int(told[name]) for name in ("rounds", "drafted", "verified", "accepted")}
            )


def _error_text(body: str) -> str:
    """The message inside an OpenAI error body; other bodies as they are, cut."""
    try:
        error = json.loads(body)["error"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return body[:300]
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
