"""What a step brings back to the host, in one copy."""

from __future__ import annotations

import torch

from dspark.engine.gpu.transfer import Field


def download_fields(sequences: int, block_size: int) -> dict[str, Field]:
    """rows: [1] int32, of the target pass without padding.

    By sequence of the batch: sampled, rows whose tokens were sampled; given, tokens of the round, 0 where there was none;
    tokens [sequences, γ + 1], of which `given` count.
    By sequence that was drafted for: draft_tokens, confidence, survival [sequences, γ]; draft_ended, no draft was needed.
    """
    return {
        "rows": Field(torch.int32, (1,)),
        "sampled": Field(torch.int32, (sequences,)),
        "given": Field(torch.int32, (sequences,)),
        "tokens": Field(torch.int64, (sequences, block_size + 1)),
        "draft_tokens": Field(torch.int64, (sequences, block_size)),
        "confidence": Field(torch.float32, (sequences, block_size)),
        "survival": Field(torch.float32, (sequences, block_size)),
        "draft_ended": Field(torch.bool, (sequences,)),
    }
