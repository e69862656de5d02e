"""The engine's options: frozen, complete, explained. `server/cli.py` is the only place that turns flags into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SpeculationMode = Literal["adaptive", "fixed", "off"]
VerificationMode = Literal["coupled", "rejection"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """None means: decided at start from the model and the machine (see `engine/async_engine.py`, logged once)."""

    model: str | None = None
    """Local Hugging Face folder, GGUF file or hub id; None: the default model."""
    drafter: str = "auto"
    """`auto` (the one shipped for this target, else lookup), `lookup`, or the folder of a draft checkpoint or model."""
    lookup: bool | None = None
    """Whether lookup proposes beside the drafter; None: wherever that is lossless, so not in rejection mode."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: cuda where torch sees one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on cuda and where the processor has bf16 instructions, else float32."""
    threads: int | None = None
    """Threads of tensor work; None: all cores but one, which is left to HTTP."""
    max_model_len: int | None = None
    """Prompt + output tokens of one sequence; None: the model's own limit."""
    max_num_seqs: int = 64
    """Sequences in one batch."""
    max_num_batched_tokens: int = 512
    """Rows of one target pass: anchors, then prefill chunks, then drafts."""
    kv_cache_bytes: int | None = None
    """Memory for target and drafter K/V; None: a quarter of the free memory, at most 4 GiB; on cuda what is left of it."""
    max_queued_requests: int = 256
    """Requests that may wait to be started."""
    max_queued_tokens: int = 262_144
    """Prompt tokens of the requests that wait; one request may always wait, however long it is."""
    stall_timeout_s: float = 60.0
    """With work here and no step ended for so long, the engine counts as stalled."""
    lag: int | None = None
    """Steps that may be unfinished while the next one is planned, 0 or 1; None: 1 on cuda, which then need not wait for the
    host, else 0. On a CPU a step is finished before the next one could be planned: 1 costs a step's latency, for tests."""
    num_speculative_tokens: int | None = None
    """Longest draft γ; None: what the drafter was trained for (lookup: 7)."""
    speculation: SpeculationMode = "adaptive"
    verification: VerificationMode = "coupled"
    cache_dir: Path | None = None
    """Converted weights, compiled kernels and measured costs; None: $DSPARK_CACHE_DIR or ~/.cache/dspark."""
