"""Every error the engine raises on purpose, as one tree.

    EngineError
    ├── ConfigError          an option or a file given at start cannot work: nothing was started
    ├── RequestError         this request can never run: nothing was queued
    │   └── ContextLengthError
    ├── QueueFullError       try again later: nothing was computed
    ├── DeadlineExceededError  the request's deadline has passed: what it held is freed
    ├── EngineClosedError    draining or stopped: nothing was queued
    ├── GrammarError         a request's grammar cannot be followed any further: only that request ends with it
    └── EngineFailedError    a step failed; the requests that were in it end with this

Each message says what was wrong, what is allowed and what to do.
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of the tree; never raised itself."""


class ConfigError(EngineError):
    """An option, a model or a drafter that cannot work. `field` is the option's name, e.g. `kv_cache_memory`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class RequestError(EngineError):
    """A request that can never run. `param` is the engine's name of the offending parameter."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """Prompt plus requested output exceed the model's context or the whole KV cache."""


class QueueFullError(EngineError):
    """The bounded waiting queue is full, in `unit`: "requests" or "prompt tokens".

    retry_after_s: whole seconds, at least 1, that the queue is expected to take for what is in it.
    """

    def __init__(
        self, waiting: int, limit: int, unit: str = "requests", retry_after_s: int = 1, prompt_tokens: int = 0
    ) -> None:
        """prompt_tokens: of the refused request, where they made the difference."""
        given = f", this request has {prompt_tokens}" if prompt_tokens > 1 else ""
        super().__init__(
            f"{waiting} {unit} are waiting and the queue holds {limit}{given}; try again in {retry_after_s} s"
        )
        self.waiting = waiting
        self.limit = limit
        self.retry_after_s = retry_after_s


class DeadlineExceededError(EngineError):
    """The request was not finished by its `deadline_s`."""


class EngineClosedError(EngineError):
    """The engine is draining or stopped and takes no new work."""


class GrammarError(EngineError):
    """A `Grammar` broke down while its text was generated: too costly to follow, or it allows no token at all."""


class EngineFailedError(EngineError):
    """A step raised; carries the cause as `__cause__`."""
