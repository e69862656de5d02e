"""From the `drafter` option to a loaded drafter and the calibration of its confidence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dspark.engine.calibration import Calibration
from dspark.engine.config import EngineConfig
from dspark.engine.drafters.beside import Beside
from dspark.engine.drafters.checkpoint_config import CheckpointConfig
from dspark.engine.drafters.draft_checkpoint import (
    EXTRAS_FILE,
    DraftSpec,
    check_fits,
    drop_shared_with_target,
    load_draft_weights,
    read_draft_spec,
    shipped_target,
)
from dspark.engine.drafters.draft_model import open_draft_model
from dspark.engine.drafters.drafter import Drafter, Noise
from dspark.engine.drafters.dspark import DSparkDrafter
from dspark.engine.drafters.eagle3 import open_eagle3
from dspark.engine.drafters.eagle3_checkpoint import EAGLE3_ARCHITECTURES
from dspark.engine.drafters.forced import ForcedDrafter
from dspark.engine.drafters.lookup import LookupDrafter
from dspark.engine.drafters.prediction import PredictionDrafter
from dspark.engine.errors import ConfigError
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.weights import OnDevice

LOOKUP_TOKENS = 7
"""γ of the lookup drafter alone when none is asked for."""
MOST_TOKENS = 16
_CAUSAL_MODEL = "ForCausalLM"
"""How the architectures of causal language models end; a draft model is one."""


def open_drafter(
    config: EngineConfig,
    decoder: Decoder,
    model_name: str,
    max_model_len: int,
    noise: Noise,
    predictions: bool = False,
) -> tuple[Drafter, Calibration]:
    """The drafter and what its confidence is worth so far. Raises ConfigError; never falls back.

    model_name: the target's, by which `auto` finds the drafter that is shipped for it. predictions: what requests predict
    is proposed too, but not under rejection verification, which forbids to choose between drafts.
    """
    tokens, rejection = config.num_speculative_tokens, config.verification == "rejection"
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise ConfigError("num_speculative_tokens", f"{tokens} is not in 1..{MOST_TOKENS}")
    folder = _shipped_for(model_name) if config.drafter == "auto" else _folder(config.drafter)
    if folder is None:
        if rejection:
            raise ConfigError("verification", "rejection needs a drafter with probabilities; lookup has none")
        return _combine([LookupDrafter(tokens or LOOKUP_TOKENS)], None, predictions)
    if rejection and config.lookup:
        raise ConfigError("lookup", "its choice looks at the drafted tokens, which rejection verification forbids")
    drafter, temperatures = _open_model(folder, config, decoder, max_model_len, noise)
    drafters = [drafter]
    if not (rejection or config.lookup is False):
        drafters.append(LookupDrafter(drafter.block_size, proposes_free=True))
    return _combine(drafters, temperatures, predictions and not rejection)


def _combine(
    drafters: list[Drafter], temperatures: tuple[tuple[float, ...], ...] | None, predictions: bool
) -> tuple[Drafter, Calibration]:
    """The drafters side by side, the dearest first, and a calibration with a kind for each."""
    block_size = drafters[0].block_size
    if predictions:
        drafters = [*drafters, PredictionDrafter(block_size), ForcedDrafter(block_size)]
    calibration = Calibration(block_size, temperatures, sources=len(drafters))
    combined = drafters[0]
    for free in drafters[1:]:
        combined = Beside(combined, free, calibration.table)
    return combined, calibration


def _shipped_for(model_name: str) -> Path | None:
    """The folder beside this file whose drafter was trained for the model, whatever the model's publisher is called."""
    for extras in sorted(Path(__file__).parent.glob(f"*/{EXTRAS_FILE}")):
        target = shipped_target(extras)
        if target is not None and model_name.rpartition("/")[2].lower() == target.lower():
            return extras.parent
    return None


def _folder(drafter: str) -> Path | None:
    """None: lookup alone."""
    if drafter == "lookup":
        return None
    folder = Path(drafter).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            "drafter", f"{drafter} is neither `auto`, `lookup` nor a folder with a draft checkpoint or model"
        )
    return folder


def _open_model(
    folder: Path, config: EngineConfig, decoder: Decoder, max_model_len: int, noise: Noise
) -> tuple[Drafter, tuple[tuple[float, ...], ...] | None]:
    """The drafter in `folder`, of the kind that its config names, and its stored sequential temperatures."""
    architecture = CheckpointConfig(folder).architecture
    if architecture in EAGLE3_ARCHITECTURES:
        return open_eagle3(folder, config, decoder, max_model_len, noise), None
    if architecture.endswith(_CAUSAL_MODEL):
        return open_draft_model(folder, config, decoder, max_model_len, noise), None
    spec = read_draft_spec(folder)
    check_fits(spec, decoder.spec)
    tokens = config.num_speculative_tokens
    if tokens is not None and tokens > spec.block_size:
        raise ConfigError("num_speculative_tokens", f"{tokens} exceeds the drafter's block of {spec.block_size} tokens")
    linear = LinearFactory()
    weights = drop_shared_with_target(
        load_draft_weights(folder, spec, decoder.dtype), decoder.embedding, decoder.head_weight
    )
    drafter = DSparkDrafter(
        spec,
        OnDevice(weights, decoder.embedding.device),
        decoder.embedding,
        _target_head(spec, decoder, linear),
        linear,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        verification=config.verification,
        noise=noise,
    )
    return drafter, spec.temperatures or None


def _target_head(spec: DraftSpec, decoder: Decoder, linear: LinearFactory) -> Callable[[Tensor], Tensor]:
    """The target's head, over the ids that are drafted."""
    if spec.draft_token_ids is None:
        return decoder.logits
    return linear(decoder.head_weight[list(spec.draft_token_ids)])
