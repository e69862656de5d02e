"""How many threads CPU kernels and torch's operators take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from dspark.kernels.cpu import set_threads
from dspark.kernels.silu_mul import silu_mul

set_threads({threads})
silu_mul(torch.ones(3, 32))  # loading the first kernel starts numba's threads
print(torch.get_num_threads())
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_starting_numbas_threads_leaves_the_number_that_was_set(threads: int) -> None:
    """In a process of its own: numba's threads start once in a process."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["NUMBA_NUM_THREADS"] = "3"
    script = SCRIPT.format(threads=threads)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(threads)]
