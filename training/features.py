"""Stage (b): what the target's layers say at every token of the answers, computed once and kept on disk.

Per token the outputs of the captured layers and the final-normed hidden state, (m + 1)·hidden bfloat16 values: 4.6 kB for
SmolLM2-135M with three layers. The target's logits follow from the last part and the head, so training runs no target pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.models.decoder import Decoder
from dspark.engine.startup import flat_sequences
from dspark.training.answers import Answer

BATCH_TOKENS = 2048


def capture_features(
    decoder: Decoder,
    answers: Sequence[Answer],
    layers: Sequence[int],
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.int16]:
    """→ [tokens of all answers, (m + 1)·hidden] bfloat16 bits, memory-mapped from `path`; made if it is not there."""
    total = sum(len(one.tokens) for one in answers)
    width = (len(layers) + 1) * decoder.spec.hidden_size
    if not path.exists():
        partial = path.with_suffix(".partial")
        features = np.memmap(partial, np.int16, "w+", shape=(total, width))
        longest = max(len(one.tokens) for one in answers)
        table_width = blocks_for(longest)
        decoder.allocate_kv(table_width * (BATCH_TOKENS // BLOCK_SIZE), BLOCK_SIZE)
        at = 0
        for batch in _batches(answers):
            tables = np.arange(len(batch) * table_width, dtype=np.int32).reshape(len(batch), table_width)
            flat = flat_sequences([(one.tokens, 0, table) for one, table in zip(batch, tables, strict=True)])
            hidden, captured = decoder.forward(flat, layers)
            assert captured is not None
            rows = torch.cat((captured, hidden), dim=1).to(torch.bfloat16)
            features[at : at + len(rows)] = rows.view(torch.int16).numpy()
            at += len(rows)
            progress(at, total)
        features.flush()
        partial.replace(path)
    return np.memmap(path, np.int16, "r", shape=(total, width))


def _batches(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Consecutive answers of at most BATCH_TOKENS tokens together (at least one)."""
    batches: list[list[Answer]] = [[]]
    tokens = 0
    for one in answers:
        if batches[-1] and tokens + len(one.tokens) > BATCH_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(one)
        tokens += len(one.tokens)
    return batches
