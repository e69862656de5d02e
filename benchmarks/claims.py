"""What a benchmark says of the server, and whether this run bears it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """text: with its limit. measured: the figure that decides, as it is printed."""

    text: str
    holds: bool
    measured: str

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'FAILED'}  {self.text}: {self.measured}"


def print_claims(claims: Sequence[Claim]) -> int:
    """→ the exit status: 1 when one failed."""
    print("\n".join(map(str, claims)))
    return 0 if all(claim.holds for claim in claims) else 1
