"""Tokens in, tokens out: a continuous-batching engine with speculative decoding. No text, no HTTP.

These names are all the server may use.
"""

from dspark.engine.async_engine import Engine, RequestStream
from dspark.engine.config import EngineConfig
from dspark.engine.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    EngineFailedError,
    GrammarError,
    QueueFullError,
    RequestError,
)
from dspark.engine.facts import EngineGauges, EngineInfo, Phase, PlainReason, Reason, RequestFacts, StepFacts
from dspark.engine.models.locate import ModelFiles, locate_model
from dspark.engine.request import FinishReason, Grammar, Request, SamplingParams, StopCheck, TokenDelta, TokenLogprob

__all__ = [
    "ConfigError",
    "ContextLengthError",
    "DeadlineExceededError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineFailedError",
    "EngineGauges",
    "EngineInfo",
    "FinishReason",
    "Grammar",
    "GrammarError",
    "ModelFiles",
    "Phase",
    "PlainReason",
    "QueueFullError",
    "Reason",
    "Request",
    "RequestError",
    "RequestFacts",
    "RequestStream",
    "SamplingParams",
    "StepFacts",
    "StopCheck",
    "TokenDelta",
    "TokenLogprob",
    "locate_model",
]
