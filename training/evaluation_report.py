"""The report of `dspark eval`: Markdown tables with their plots beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspark.engine.calibration import Calibration
from dspark.training.acceptance import (
    Prediction,
    accepted_length,
    accepted_length_interval,
    compare_with_position_only,
    conditional_acceptance,
    judged_log_odds,
    survival_by,
)
from dspark.training.calibrate import debiased_ece, ece, prefix_labels
from dspark.training.plots import RELIABILITY_SLOTS, position_curves, reliability_diagram, threshold_sweep
from dspark.training.replay import Rounds

ALL = "all"
HOW_MEASURED = """\
τ is the mean number of tokens that a round gives, the target's own included; the token that comes with the prompt belongs to
no round. Its 95 % interval is a bootstrap over answers. Whole blocks are verified, with the coupled rule, so a draft counts
as accepted exactly when it equals the token that the target gave. Acceptance of a slot is conditional: among drafts before
which all were accepted. *Drafted* is the share of rounds for which something was proposed.
"""
HOW_CALIBRATED = """\
Error of the survival of slots 1 to 4 (probability that this draft and all before it are accepted), 20 equal bins, in per cent:
as it is, and in brackets less what a perfect predictor would show by chance. *Stored*: with the temperatures that came with
the drafter, if any. *Learned*: by what the engine's online calibration knew before each round.
"""
HOW_COMPARED = """\
The confidence against an estimator that knows only the slot, each fitted on the half of the answers that it is not tested on.
*By bins* and *by answers*: |expected − observed| accepted drafts per round, mean over tenths of the rounds (ordered by what
the confidence expects) and over answers. Log-loss (nat) and Brier score: of conditional acceptance, over all slots.
"""
HOW_SWEPT = """\
Thresholds are applied to the rounds of whole blocks: that a shorter round gives the next one another anchor is neglected.
"""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A drafter's rounds.

    sources: names of the drafters that it combines.  untaught: the calibration that it started with.
    """

    name: str
    rounds: Rounds
    sources: Sequence[str]
    untaught: Calibration

    def groups(self) -> dict[str, Rounds]:
        """Its rounds by sampling temperature."""
        return {
            f"T = {temperature:g}": self.rounds.where(self.rounds.temperature == temperature)
            for temperature in np.unique(self.rounds.temperature)
        }


def write_report(
    folder: Path, target: str, max_tokens: int, evaluations: Sequence[Evaluation], closing: Sequence[str] = ()
) -> None:
    """Write `report.md`, which ends with the lines `closing`, its plots and the rounds.

    Raises ConfigError without matplotlib.
    """
    lines = [f"# Drafters for {target}", "", f"Answers of up to {max_tokens} tokens.", "", "## Accepted length", ""]
    lines += [HOW_MEASURED, *_acceptance_table(evaluations), "", "![Acceptance by slot](positions.png)", ""]
    lines += _source_table(evaluations)
    position_curves(folder / "positions.png", {one.name: one.groups() for one in evaluations})
    lines += ["## Calibration", "", HOW_CALIBRATED, *_calibration_table(evaluations), ""]
    for one in evaluations:
        one.rounds.save(folder / f"rounds-{one.name}.npz")
        reliability_diagram(folder / f"reliability-{one.name}.png", one.name, one.groups(), one.untaught)
        lines += [f"![Reliability of {one.name}](reliability-{one.name}.png)", ""]
    lines += ["## Confidence against position only", "", HOW_COMPARED, *_comparison_table(evaluations), ""]
    lines += ["## Threshold sweep", "", HOW_SWEPT]
    for one in evaluations:
        threshold_sweep(folder / f"threshold-{one.name}.png", one.name, one.groups())
        lines += [f"![Threshold sweep of {one.name}](threshold-{one.name}.png)", ""]
    (folder / "report.md").write_text("\n".join([*lines, *closing]), encoding="utf-8")


def _acceptance_table(evaluations: Sequence[Evaluation]) -> list[str]:
    rows = []
    for one in evaluations:
        for group, rounds in one.groups().items():
            for kind in (ALL, *np.unique(rounds.kind).tolist()):
                some = rounds if kind == ALL else rounds.where(rounds.kind == kind)
                low, high = accepted_length_interval(some)
                slots = " ".join("–" if np.isnan(rate) else f"{rate:.2f}" for rate in conditional_acceptance(some))
                rows.append(
                    (
                        one.name,
                        group,
                        kind,
                        str(len(np.unique(some.answer))),
                        str(len(some)),
                        f"{accepted_length(some):.2f} [{low:.2f}, {high:.2f}]",
                        f"{100 * (some.proposed > 0).mean():.0f} %",
                        slots,
                    )
                )
    return _table(("drafter", "", "domain", "answers", "rounds", "τ", "drafted", "acceptance of slots 1 …"), rows)


def _source_table(evaluations: Sequence[Evaluation]) -> list[str]:
    """Who proposed, of drafters that combine several; nothing without such a drafter."""
    rows = []
    for one in evaluations:
        if len(one.sources) > 1:
            for group, rounds in one.groups().items():
                for place, source in enumerate(one.sources):
                    own = rounds.where((rounds.source == place) & (rounds.proposed > 0))
                    share = f"{100 * len(own) / len(rounds):.0f} %"
                    length = f"{accepted_length(own):.2f}" if len(own) else "–"
                    rows.append((one.name, group, source, share, length))
    table = _table(("drafter", "", "proposed by", "of the rounds", "τ of those"), rows)
    return ["## Who proposed", "", *table, ""] if rows else []


def _calibration_table(evaluations: Sequence[Evaluation]) -> list[str]:
    rows = []
    for one in evaluations:
        for group, rounds in one.groups().items():
            log_odds = judged_log_odds(rounds)
            labels = prefix_labels(log_odds, rounds.accepted)
            stored = survival_by(one.untaught, rounds)
            for slot in range(min(RELIABILITY_SLOTS, rounds.block_size)):
                judged = ~np.isnan(log_odds[:, slot])
                if judged.any():
                    errors = [
                        f"{100 * ece(predicted, labels[judged, slot]):.1f} "
                        f"({100 * debiased_ece(predicted, labels[judged, slot]):.1f})"
                        for predicted in (stored[judged, slot], rounds.survival[judged, slot])
                    ]
                    rows.append((one.name, group, str(slot + 1), str(int(judged.sum())), *errors))
    return _table(("drafter", "", "slot", "rounds", "stored", "learned"), rows)


def _comparison_table(evaluations: Sequence[Evaluation]) -> list[str]:
    rows = []
    for one in evaluations:
        for group, rounds in one.groups().items():
            if len(np.unique(rounds.answer[rounds.judged > 0])) < 2:
                continue
            confidence, position = compare_with_position_only(rounds, one.untaught)
            rows.append((one.name, group, "confidence", *_prediction(confidence)))
            rows.append((one.name, group, "position only", *_prediction(position)))
    return _table(("drafter", "", "estimator", "by bins", "by answers", "log-loss", "Brier"), rows)


def _prediction(found: Prediction) -> tuple[str, ...]:
    values = (found.bin_error, found.answer_error, found.log_loss, found.brier)
    return tuple(f"{value:.3f}" for value in values)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
