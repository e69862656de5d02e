"""The next draft blocks, made by a DSpark drafter on the device from the state that is there.

B sequences (padded), γ tokens a block. Letters and the drafter itself: `engine/drafters/dspark.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.engine.calibration import CONFIDENCE_LIMIT, LARGEST_SURVIVAL, SMALLEST_SURVIVAL
from dspark.engine.drafters.dspark import DraftBatch, DSparkDrafter, MarkovHead
from dspark.engine.gpu.kernels import StepKernels
from dspark.engine.gpu.state import DeviceState
from dspark.engine.kv_cache import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class DraftedBlocks:
    """tokens: [B, γ] int64; confidence, survival: [B, γ] float32; ended: [B] bool, of sequences that need none."""

    tokens: Tensor
    confidence: Tensor
    survival: Tensor
    ended: Tensor


def draft_blocks(
    drafter: DSparkDrafter, kernels: StepKernels, state: DeviceState, plan: Mapping[str, Tensor], sequences: int
) -> DraftedBlocks:
    """Draft for the sequences in the first B = `sequences` of the plan's draft_slots, and put the blocks into the state."""
    slots = plan["draft_slots"][:sequences]
    anchors, first = state.anchor[slots], state.length[slots] - 1
    hidden = drafter.backbone(anchors, _draft_batch(drafter, state.block_tables[slots], first))
    logits = drafter.head(hidden).view(sequences, drafter.block_size, -1)
    hidden = hidden.view(sequences, drafter.block_size, -1)
    tokens = _draw(drafter, kernels, state, slots, first, hidden, logits)
    previous = torch.cat([anchors[:, None], tokens[:, :-1]], dim=1)
    confidence = drafter.log_odds(hidden, previous)
    kind = (state.temperature[slots] > 0).long()
    survival = calibrated_survival(confidence, plan["slope"][kind], plan["bias"][kind])
    ended = state.ended[slots]
    state.drafts[slots] = tokens
    state.survival[slots] = survival
    # padding has no longest draft, so its slot stays without drafts
    state.draft_count[slots] = torch.where(ended, 0, state.longest_draft[slots])
    return DraftedBlocks(tokens, confidence, survival, ended)


def calibrated_survival(confidence: Tensor, slope: Tensor, bias: Tensor) -> Tensor:
    """As `CalibrationTable.survival`, with each row's slope and bias: all [B, γ] float32."""
    conditional = torch.sigmoid(slope * confidence.clamp(-CONFIDENCE_LIMIT, CONFIDENCE_LIMIT) + bias)
    return conditional.cumprod(dim=1).clamp(float(SMALLEST_SURVIVAL), float(LARGEST_SURVIVAL))


def _draft_batch(drafter: DSparkDrafter, tables: Tensor, first: Tensor) -> DraftBatch:
    width = drafter.block_size
    offsets = torch.arange(width, dtype=torch.int32, device=first.device)
    scratch = drafter.first_scratch_block + torch.arange(len(first), dtype=torch.int32, device=first.device)
    return DraftBatch(
        positions=(first[:, None] + offsets).view(-1),
        slots=(scratch.long()[:, None] * BLOCK_SIZE + offsets).view(-1),
        block_tables=tables,
        context_lens=first,
        scratch_blocks=scratch,
    )


def _draw(
    drafter: DSparkDrafter,
    kernels: StepKernels,
    state: DeviceState,
    slots: Tensor,
    first: Tensor,
    hidden: Tensor,
    logits: Tensor,
) -> Tensor:
    """[B, γ] tokens, left to right, with the noise that the target will use."""
    markov = drafter.markov
    if markov is None:  # DFlash: a correction of rank 1 that is 0
        w1 = hidden.new_zeros((drafter.spec.vocab_size, 1))
        w2, transition = hidden.new_zeros((logits.shape[-1], 1)), None
    else:
        w1, w2 = markov.w1, markov.w2
        transition = None if drafter.spec.markov == "vanilla" else _Transition(markov, hidden)
    ahead = torch.arange(1, drafter.block_size + 1, device=first.device)
    return kernels.markov_block(
        logits,
        state.anchor[slots],
        w1,
        w2,
        state.temperature[slots] * drafter.spec.sampling_scale,
        state.noise_key[slots],
        first.long()[:, None] + ahead,
        drafter.draft_ids,
        transition,
    )


class _Transition:
    """What a gated or rnn head makes of w1's rows, slot after slot of one block."""

    def __init__(self, markov: MarkovHead, hidden: Tensor) -> None:
        self._markov = markov
        self._hidden = hidden
        self._memory: Tensor | None = None

    def __call__(self, slot: int, rows: Tensor) -> Tensor:
        mixed, self._memory = self._markov.transition(rows, self._hidden[:, slot], self._memory)
        return mixed
