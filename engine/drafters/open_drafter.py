"""From the `drafter` option to a loaded drafter."""

from __future__ import annotations

from pathlib import Path

from dspark.engine.config import EngineConfig
from dspark.engine.drafters.draft_checkpoint import (
    check_fits,
    drop_shared_with_target,
    load_draft_weights,
    read_draft_spec,
)
from dspark.engine.drafters.drafter import Drafter
from dspark.engine.drafters.dspark import DSparkDrafter, Noise
from dspark.engine.drafters.lookup import LookupDrafter
from dspark.engine.errors import ConfigError
from dspark.engine.models.decoder import Decoder, LinearFactory

LOOKUP_TOKENS = 7
"""γ of the lookup drafter when none is asked for."""
MOST_TOKENS = 16


def open_drafter(
    config: EngineConfig, decoder: Decoder, max_model_len: int, noise: Noise
) -> tuple[Drafter, list[float]]:
    """The drafter and its stored sequential temperatures (empty: none). Raises ConfigError; never falls back."""
    tokens = config.num_speculative_tokens
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise ConfigError("num_speculative_tokens", f"{tokens} is not in 1..{MOST_TOKENS}")
    if config.drafter in ("auto", "lookup"):
        if config.verification == "rejection":
            raise ConfigError("verification", "rejection needs a drafter with probabilities; lookup has none")
        return LookupDrafter(tokens or LOOKUP_TOKENS), []
    folder = Path(config.drafter).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            "drafter", f"{config.drafter} is neither `auto`, `lookup` nor a folder with a draft checkpoint"
        )
    spec = read_draft_spec(folder)
    check_fits(spec, decoder.spec)
    if tokens is not None and tokens > spec.block_size:
        raise ConfigError("num_speculative_tokens", f"{tokens} exceeds the drafter's block of {spec.block_size} tokens")
    weights = load_draft_weights(folder, spec, decoder.dtype)
    drafter = DSparkDrafter(
        spec,
        drop_shared_with_target(weights, decoder.embedding, decoder.head_weight),
        decoder.embedding,
        decoder.logits,
        LinearFactory(),
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        verification=config.verification,
        noise=noise,
    )
    return drafter, list(spec.temperatures)
