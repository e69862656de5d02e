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

from dspark.engine.errors import ConfigError
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.models.decoder import Decoder
from dspark.engine.startup import flat_sequences
from dspark.training.answers import Answer

BATCH_TOKENS = 2048


def capture_features(
    decoder: Decoder,
    shards: Sequence[Sequence[Answer]],
    layers: Sequence[int],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[NDArray[np.int16]]:
    """Of each shard [its tokens, (m + 1)·hidden] bfloat16 bits, memory-mapped; those that are missing in `folder` are made.

    Raises ConfigError("out") where one that is there has another size, so belongs to other answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    width = (len(layers) + 1) * decoder.spec.hidden_size
    paths = [folder / f"features-{number:05d}.bf16" for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        if path.exists() and path.stat().st_size != _tokens(shard) * width * np.dtype(np.int16).itemsize:
            raise ConfigError("out", f"{path} belongs to other answers; remove {folder}")
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        longest = max(len(one.tokens) for shard in shards for one in shard)
        tables = blocks_for(longest) * max(1, BATCH_TOKENS // BLOCK_SIZE)
        decoder.allocate_kv(tables, BLOCK_SIZE)
    for done, number in enumerate(missing, start=len(shards) - len(missing) + 1):
        partial = paths[number].with_suffix(".partial")
        rows = np.memmap(partial, np.int16, "w+", shape=(_tokens(shards[number]), width))
        at = 0
        for batch in _batches(shards[number]):
            captured = _run_target(decoder, batch, layers)
            rows[at : at + len(captured)] = captured
            at += len(captured)
        rows.flush()
        partial.replace(paths[number])
        progress(done, len(shards))
    return [
        np.memmap(path, np.int16, "r", shape=(_tokens(shard), width)) for path, shard in zip(paths, shards, strict=True)
    ]


def _run_target(decoder: Decoder, batch: Sequence[Answer], layers: Sequence[int]) -> NDArray[np.int16]:
    """[tokens of the batch, (m + 1)·hidden] bfloat16 bits."""
    width = blocks_for(max(len(one.tokens) for one in batch))
    tables = np.arange(len(batch) * width, dtype=np.int32).reshape(len(batch), width)
    flat = flat_sequences([(one.tokens, 0, table) for one, table in zip(batch, tables, strict=True)])
    hidden, captured = decoder.forward(flat, layers)
    assert captured is not None
    return torch.cat((captured, hidden), dim=1).to(torch.bfloat16).view(torch.int16).numpy()


def _tokens(shard: Sequence[Answer]) -> int:
    return sum(len(one.tokens) for one in shard)


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
