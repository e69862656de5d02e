"""Every error the engine raises on purpose, as one tree.

    EngineError
    ├── ConfigError          an option or a file given at start cannot work: nothing was started
    ├── RequestError         this request can never run: nothing was queued
    │   └── ContextLengthError
    ├── QueueFullError       try again later: nothing was queued
    ├── EngineClosedError    draining or stopped: nothing was queued
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
    """The bounded waiting queue is full."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} requests are waiting and the queue holds {limit}; try again later")
        self.waiting = waiting
        self.limit = limit


class EngineClosedError(EngineError):
    """The engine is draining or stopped and takes no new work."""


class EngineFailedError(EngineError):
    """A step raised; carries the cause as `__cause__`."""
