"""Linear layers in float32 on a CPU, of weights that are kept in bfloat16 where that loses nothing.

    x: [rows, in] float32; weight: [out, in] float32; bias: [out] float32 or None → [rows, out] float32

Weights lie in panels of 16 outputs, [out / 16, in, 16]. Each output is summed over `in` in order, one `fma` a term, so a
row's result does not depend on how many rows share the call. A checkpoint in bfloat16 is half the bytes, widened when a
panel is in the processor's cache; the sums are those of its float32 copy, to the bit.

Moves the weights once per block of rows (as many as leave room in the second-level cache): memory bound up to about six
rows, since six share a weight that is loaded.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from dspark.kernels.cpu import cpu_kernel, inner, like, view
from dspark.kernels.simd import (
    LANES,
    panel_tile_1,
    panel_tile_2,
    panel_tile_3,
    panel_tile_4,
    panel_tile_5,
    panel_tile_6,
)

BLOCK_BYTES = 256 * 1024
"""Input of the rows that one pass over the weights serves."""
MOST_ROWS = 6
"""Of a tile: twelve sums of eight floats, two weights and a broadcast value fill the sixteen registers of AVX2."""


@inner
def panel_tile(x, x_offset, size, panels, panel_offset, sums, rows, ahead, step):
    """1 to 6 rows by one panel: `sums` [6, 16]. ahead, step: what is fetched meanwhile."""
    if rows == 1:
        panel_tile_1(x, x_offset, size, panels, panel_offset, sums, ahead, step)
    elif rows == 2:
        panel_tile_2(x, x_offset, size, panels, panel_offset, sums, ahead, step)
    elif rows == 3:
        panel_tile_3(x, x_offset, size, panels, panel_offset, sums, ahead, step)
    elif rows == 4:
        panel_tile_4(x, x_offset, size, panels, panel_offset, sums, ahead, step)
    elif rows == 5:
        panel_tile_5(x, x_offset, size, panels, panel_offset, sums, ahead, step)
    else:
        panel_tile_6(x, x_offset, size, panels, panel_offset, sums, ahead, step)


@cpu_kernel
def _panel_linear(
    x_address, panel_address, panel_like, bias_address, has_bias, out_address, rows, size, out_size, block
):
    x = view(x_address, rows * size, np.empty(0, np.float32))
    count = (out_size + LANES - 1) // LANES
    panels = view(panel_address, count * size * LANES, panel_like)
    bias = view(bias_address, out_size if has_bias else 0, np.empty(0, np.float32))
    out = view(out_address, rows * out_size, np.empty(0, np.float32))
    for first in range(0, rows, block):
        last = min(first + block, rows)
        tiles = (last - first + MOST_ROWS - 1) // MOST_ROWS
        height = (last - first + tiles - 1) // tiles  # 4 + 4 rows are faster than 6 + 2
        for p in numba.prange(count):
            sums = np.empty(MOST_ROWS * LANES, np.float32)
            width = min(LANES, out_size - p * LANES)
            for row in range(first, last, height):
                tile = min(height, last - row)
                # each tile fetches its share of the next panel: all of it in the first would hold that one up
                ahead = (p + 1) * size * LANES + (row - first) // height * (size * LANES // tiles)
                panel_tile(x, row * size, size, panels, p * size * LANES, sums, tile, ahead, LANES // tiles)
                for m in range(tile):
                    base = (row + m) * out_size + p * LANES
                    for c in range(width):
                        value = sums[m * LANES + c]
                        out[base + c] = value + bias[p * LANES + c] if has_bias else value


class PanelLinear:
    """One layer. Its rows are the same bits in any company."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight: [out, in] float32; bias: [out] float32."""
        self.out_features, self.in_features = weight.shape
        narrow = weight.bfloat16()
        kept = narrow if torch.equal(narrow.float(), weight) else weight
        padded = torch.nn.functional.pad(kept, (0, 0, 0, -self.out_features % LANES))
        self.weight_bytes = kept.nbytes
        self.panels = padded.view(-1, LANES, self.in_features).transpose(1, 2).contiguous()
        """[out / 16, in, 16] float32 or bfloat16."""
        self._bias = bias
        self._block = max(MOST_ROWS, BLOCK_BYTES // (4 * self.in_features) // MOST_ROWS * MOST_ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        out = torch.empty((rows, self.out_features))
        x = x.contiguous()
        bias = self._bias
        _panel_linear(
            x.data_ptr(),
            self.panels.data_ptr(),
            like(self.panels),
            0 if bias is None else bias.data_ptr(),
            bias is not None,
            out.data_ptr(),
            rows,
            self.in_features,
            self.out_features,
            self._block,
        )
        return out
