"""The kernels of a step around the target and the drafter: which drafts, which tokens, what is accepted, the next block.

On CUDA they are those of `kernels/gpu`; whoever runs the step elsewhere (the tests do, on a CPU) brings others of the
same signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepKernels:
    """Signatures and shapes: kernels/gpu/{budget_fill,coupled_sampling,markov_step}.py."""

    fill_budget: Callable[[Tensor, Tensor, Tensor], Tensor]
    sample_rows: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    accept_drafts: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    markov_block: Callable[..., Tensor]


def triton_kernels() -> StepKernels:
    """Imported here, since only a machine with a device has use for them."""
    from dspark.kernels.gpu.budget_fill import fill_budget
    from dspark.kernels.gpu.coupled_sampling import accept_drafts, sample_rows
    from dspark.kernels.gpu.markov_step import markov_block

    return StepKernels(fill_budget, sample_rows, accept_drafts, markov_block)
