"""What the values of the trainer's and the evaluation's command-line options may look like."""

from __future__ import annotations

import argparse
from itertools import pairwise


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, but is {text!r}")
    return int(text)


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 0, but is {text!r}")
    return int(text)


def temperatures(text: str) -> list[float]:
    try:
        values = [float(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"should be numbers separated by commas, but is {text!r}") from None
    if not all(0 <= value <= 2 for value in values):
        raise argparse.ArgumentTypeError(f"should each be 0..2, but is {text!r}")
    return values


def layer_numbers(text: str) -> tuple[int, ...]:
    try:
        layers = tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"should be numbers separated by commas, but is {text!r}") from None
    if any(b <= a for a, b in pairwise(layers)):
        raise argparse.ArgumentTypeError(f"should be strictly increasing, but is {text!r}")
    return layers
