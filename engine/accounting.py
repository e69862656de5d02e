"""How one round's tokens are counted, so that the identities between the numbers hold after any run.

drafted = truncated + verified;  verified = accepted + rejected;  generated = accepted + bonus + first.
A draft is counted in the round that could have verified it, so one that its sequence did not live to see is not.
"""

from __future__ import annotations

from dspark.engine.facts import CONFIDENCE_BINS, PlainReason, Reason, StepFacts
from dspark.engine.sequence import Decode, Round


def count_round(facts: StepFacts, decode: Decode, cut: Reason | None, round_: Round, kept: int) -> None:
    """Add a decode round to the step's facts and to its request's.

    cut: why fewer drafts were verified than proposed, if so. kept: tokens that survived the stop checks; drafts behind a
    stop are rejected{after_stop}, never accepted.
    """
    accepted = min(round_.accepted, kept)
    bonus = kept - accepted
    facts.drafted += decode.proposed
    facts.verified += round_.verified
    facts.accepted += accepted
    facts.bonus += bonus
    facts.generated += kept
    if cut is not None and decode.proposed > round_.verified:
        facts.truncated[cut] = facts.truncated.get(cut, 0) + decode.proposed - round_.verified
    if bonus:
        facts.rejected_mismatch += round_.verified > accepted
        facts.rejected_after_mismatch += max(0, round_.verified - accepted - 1)
    else:
        facts.rejected_after_stop += round_.verified - accepted
    if round_.verified:
        facts.rounds_with_drafts += 1
    else:
        facts.rounds_without_drafts += 1
    if not decode.proposed:
        asked = decode.sequence.record.request
        reason = decode.sequence.plain_reason or PlainReason.UNSUPPORTED
        if not asked.speculates:
            reason = PlainReason.OFF
        facts.plain_rounds[reason] = facts.plain_rounds.get(reason, 0) + 1
    _add_at(facts.drafted_at, decode.proposed)
    _add_at(facts.verified_at, round_.verified)
    _add_at(facts.accepted_at, accepted)
    for lengths, value in (
        (facts.accepted_lengths, kept),
        (facts.proposed_lengths, decode.proposed),
        (facts.verified_lengths, round_.verified),
    ):
        lengths[value] = lengths.get(value, 0) + 1
    _count_confidence(facts, decode, round_)
    request = decode.sequence.record.facts
    request.rounds_with_drafts += bool(round_.verified)
    request.rounds_without_drafts += not round_.verified
    request.drafted_tokens += decode.proposed
    request.verified_tokens += round_.verified
    request.accepted_tokens += accepted
    if decode.draft is not None and decode.draft.predicted:
        request.accepted_prediction_tokens += accepted
        request.rejected_prediction_tokens += round_.verified - accepted


def _add_at(counts: list[int], length: int) -> None:
    counts.extend([0] * (length - len(counts)))
    for position in range(length):
        counts[position] += 1


def _count_confidence(facts: StepFacts, decode: Decode, round_: Round) -> None:
    """Expected against observed acceptance of the verified drafts, whatever a stop kept of them."""
    if decode.draft is None:
        return
    before = 1.0
    for position, after in enumerate(decode.draft.survival[: round_.verified].tolist()):
        facts.expected_accepted += after
        if position <= round_.accepted:  # the prefix was accepted, so acceptance of this one was seen
            confidence = after / before
            bin_ = min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)
            facts.confidence_count[bin_] += 1
            facts.confidence_accepted[bin_] += position < round_.accepted
            facts.confidence_sum[bin_] += confidence
        before = after
