"""What every route shares: the engine, the model's text, the settings, the metrics, and the server's state."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from dspark.engine import Engine
from dspark.server.auth import ApiKeys
from dspark.server.deadlines import TimeoutLimits
from dspark.server.errors import ModelNotFoundError
from dspark.server.generation import counting_refusals
from dspark.server.idempotency import IdempotencySettings, IdempotentReplies, open_store
from dspark.server.metrics import Metrics
from dspark.server.prompts import ChatSettings, Prompts
from dspark.server.sse import StreamSettings
from dspark.server.text import ModelText


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """served_model_name: what clients call the model. api_keys: none means open. max_body_bytes: of one request.

    api_keys_file: more keys, read again when it changes. cors_origins: of the pages whose scripts may read answers, `*`
    for all. metrics_port: the one port that answers /metrics, and nothing else; None: the port that answers the rest.

    hourly_cost: of this server in `currency`, for the cost panels; 0: not given.
    """

    served_model_name: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    hourly_cost: float = 0.0
    currency: str = "USD"
    api_keys_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    metrics_port: int | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)
    timeouts: TimeoutLimits = field(default_factory=TimeoutLimits)
    idempotency: IdempotencySettings = field(default_factory=IdempotencySettings)
    streams: StreamSettings = field(default_factory=StreamSettings)


class Service:
    """One engine behind one HTTP server."""

    def __init__(self, engine: Engine, text: ModelText, settings: ServerSettings) -> None:
        self.engine = engine
        self.text = text
        self.settings = settings
        self.prompts = Prompts(engine.info, text, settings.chat)
        self.metrics = Metrics(settings.served_model_name, engine.info, settings.hourly_cost, settings.currency)
        self.api_keys = ApiKeys(settings.api_keys, self.metrics.http, settings.api_keys_file)
        self.idempotency = IdempotentReplies(
            open_store(settings.idempotency, self.metrics.idempotency),
            settings.idempotency.grace_s,
            self.metrics.idempotency,
        )
        self.fingerprint = _fingerprint(engine)
        self.created_unix_s = int(time.time())
        self._state = "starting"
        engine.on_step.append(self.metrics.steps.step)

    @property
    def state(self) -> str:
        """starting, ready, draining, or degraded when the engine has failed or stalled."""
        return self._state if self.live else "degraded"

    @property
    def live(self) -> bool:
        """False: only a restart helps (the engine has failed), or may help (it has stalled)."""
        return not self.engine.failed and not self.engine.stalled

    def check_admission(self, endpoint: str, tenant: bytes) -> None:
        """Refuse and count what would be refused anyway, before its prompt is rendered and tokenised.

        endpoint: one of `metrics.ENDPOINTS`. Raises QueueFullError, EngineClosedError, EngineFailedError.
        """
        with counting_refusals(self.metrics.requests, endpoint):
            self.engine.check_admission(tenant)

    async def start(self) -> None:
        await self.engine.start()
        self._state = "ready"

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let the running ones finish; True when all did within `timeout_s`."""
        self._state = "draining"
        return await self.engine.drain(timeout_s)

    async def close(self) -> None:
        """End what still runs, and store what has ended."""
        self.prompts.grammars.close()
        await self.engine.close()
        await self.idempotency.close()

    def metrics_page(self) -> bytes:
        """The text that GET /metrics answers."""
        self.metrics.http.set_state(self.state)
        return self.metrics.page(self.engine.gauges())

    def check_model(self, model: str) -> None:
        """Raises ModelNotFoundError."""
        served = self.settings.served_model_name
        if model != served:
            raise ModelNotFoundError(f"The model '{model[:80]}' does not exist; this server serves '{served}'", "model")


def _fingerprint(engine: Engine) -> str:
    """Names everything the text depends on beside the request: the promise of the same tokens holds while it stays."""
    info = engine.info
    parts = (info.model_name, info.device, info.dtype, info.threads, info.row_invariant)
    versions = (version("dspark-server"), version("torch"))
    return "fp_" + hashlib.sha256(repr(parts + versions).encode()).hexdigest()[:12]
