"""The identities between the numbers of a step."""

from __future__ import annotations

from collections.abc import Mapping

from dspark.engine import StepFacts


def weighted(counts: Mapping[int, int]) -> int:
    return sum(value * count for value, count in counts.items())


def assert_identities(facts: StepFacts) -> None:
    rounds = facts.rounds_with_drafts + facts.rounds_without_drafts
    rejected = facts.rejected_mismatch + facts.rejected_after_mismatch + facts.rejected_after_stop
    assert facts.drafted == sum(facts.truncated.values()) + facts.verified
    assert facts.verified == facts.accepted + rejected
    assert facts.generated == facts.accepted + facts.bonus + facts.first_tokens
    assert weighted(facts.accepted_lengths) == facts.accepted + facts.bonus
    assert weighted(facts.proposed_lengths) == facts.drafted
    assert weighted(facts.verified_lengths) == facts.verified
    for lengths in (facts.accepted_lengths, facts.proposed_lengths, facts.verified_lengths):
        assert sum(lengths.values()) == rounds
    assert facts.verified_lengths.get(0, 0) == facts.rounds_without_drafts
    assert sum(facts.plain_rounds.values()) == facts.proposed_lengths.get(0, 0)
    by_position = (facts.drafted_at, facts.verified_at, facts.accepted_at)
    assert [sum(counts) for counts in by_position] == [facts.drafted, facts.verified, facts.accepted]
    assert all(counts == sorted(counts, reverse=True) for counts in by_position)
    assert all(a <= n for a, n in zip(facts.confidence_accepted, facts.confidence_count, strict=True))
    assert all(0 <= s <= n for s, n in zip(facts.confidence_sum, facts.confidence_count, strict=True))
