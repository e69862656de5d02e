"""Pictures of an evaluation and of a training run, as PNG files. matplotlib comes with the extra `train`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dspark.engine.calibration import Calibration
from dspark.engine.errors import ConfigError
from dspark.training.acceptance import conditional_acceptance, cut_at_survival, cut_to, judged_log_odds, survival_by
from dspark.training.calibrate import BINS, prefix_labels
from dspark.training.replay import Rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RELIABILITY_SLOTS = 4
THRESHOLDS = np.linspace(0.0, 0.95, 20)
SMALLEST_BIN = 20
"""Rounds; bins with fewer are left out of a reliability diagram: their mean is chance."""
LOSS_PARTS = ("loss", "ce", "kl", "l1", "conf")
NOT_PLOTTED = ("step", "s", "gradient")
SMOOTHING = 0.9
"""Decay of the running mean over the lines of a loss file."""


def check_matplotlib() -> None:
    """Raise ConfigError where plots cannot be drawn, so that this is known before the work and not after it."""
    new_figure(1, 1)


def new_figure(rows: int, columns: int) -> tuple[Figure, NDArray[Any]]:
    """A figure and its axes [rows, columns]; drawn without a display. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "out", "the plots written there need matplotlib: install the extra `train` (dspark-server[train])"
        ) from error
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def reliability_diagram(path: Path, name: str, groups: Mapping[str, Rounds], untaught: Calibration) -> None:
    """Survival against the share of rounds that accepted as much, for slots 1…4; one row of axes per group of rounds.

    Both as stored with the drafter (`untaught`) and by what was learned from the rounds before.
    """
    figure, axes = new_figure(len(groups), RELIABILITY_SLOTS)
    for row, (group, rounds) in zip(axes, groups.items(), strict=True):
        log_odds = judged_log_odds(rounds)
        labels = prefix_labels(log_odds, rounds.accepted)
        stored = survival_by(untaught, rounds)
        for slot, axis in enumerate(row):
            axis.plot((0, 1), (0, 1), color="0.8", linewidth=1)
            if slot < rounds.block_size:
                judged = ~np.isnan(log_odds[:, slot])
                for label, predicted in (("as stored", stored), ("learned online", rounds.survival)):
                    axis.plot(*_binned(predicted[judged, slot], labels[judged, slot]), marker="o", ms=3, label=label)
            axis.set(title=f"{group}, slot {slot + 1}", xlabel="survival", ylabel="accepted", xlim=(0, 1), ylim=(0, 1))
        row[0].legend(fontsize="small")
    figure.suptitle(f"{name}: reliability")
    figure.savefig(path)


def _binned(predicted: NDArray[np.floating], label: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(mean prediction, mean label) of the equal-width bins that hold enough."""
    bins = np.minimum((predicted * BINS).astype(np.intp), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    full = counts >= SMALLEST_BIN
    means = [np.bincount(bins, weights=values, minlength=BINS)[full] / counts[full] for values in (predicted, label)]
    return means[0], means[1]


def threshold_sweep(path: Path, name: str, groups: Mapping[str, Rounds]) -> None:
    """What a threshold on survival does to τ and to the drafts verified, and how many of those are accepted.

    On the right also blocks cut to a fixed length: a confidence that knows something lies above that line.
    """
    figure, axes = new_figure(len(groups), 2)
    for (left, right), (group, rounds) in zip(axes, groups.items(), strict=True):
        cuts = [cut_at_survival(rounds, threshold) for threshold in THRESHOLDS]
        fixed = [cut_to(rounds, length) for length in range(1, rounds.block_size + 1)]
        left.plot(THRESHOLDS, [cut.accepted_length for cut in cuts], marker="o", ms=3, label="τ")
        left.plot(THRESHOLDS, [cut.verified for cut in cuts], marker="s", ms=3, label="drafts verified per round")
        left.set(title=group, xlabel="survival threshold", ylabel="tokens", ylim=(0, None))
        left.legend(fontsize="small")
        for label, some in (("survival threshold", cuts), ("fixed length", fixed)):
            verified, shares = [cut.verified for cut in some], [cut.accepted_share for cut in some]
            right.plot(verified, shares, marker="o", ms=3, label=label)
        right.set(title=group, xlabel="drafts verified per round", ylabel="share of them accepted", ylim=(0, 1))
        right.legend(fontsize="small")
    figure.suptitle(f"{name}: threshold sweep")
    figure.savefig(path)


def position_curves(path: Path, drafters: Mapping[str, Mapping[str, Rounds]]) -> None:
    """Conditional acceptance by slot; drafters: name → group → rounds, the same groups for each."""
    groups = list(next(iter(drafters.values())))
    figure, axes = new_figure(1, len(groups))
    for axis, group in zip(axes[0], groups, strict=True):
        for name, by_group in drafters.items():
            rates = conditional_acceptance(by_group[group])
            axis.plot(np.arange(1, len(rates) + 1), rates, marker="o", ms=3, label=name)
        axis.set(title=group, xlabel="slot", ylabel="accepted, if all before were", ylim=(0, 1))
        axis.legend(fontsize="small")
    figure.savefig(path)


def loss_curve(jsonl_path: Path, png_path: Path) -> None:
    """The smoothed parts of the loss, and beside them every other quantity that a training run reports, against its step.

    jsonl_path: one object per line with `step` and numbers; a part that is reported in some lines only is drawn there.
    """
    lines = [json.loads(line) for line in jsonl_path.read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(name for line in lines for name in line if name not in NOT_PLOTTED))
    figure, axes = new_figure(1, 2)
    for axis, title in zip(axes[0], ("loss", "acceptance"), strict=True):
        for name in names:
            if (name in LOSS_PARTS) == (title == "loss"):
                _plot_smoothed(axis, name, [(line["step"], line[name]) for line in lines if name in line])
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize="small")
    figure.savefig(png_path)


def _plot_smoothed(axis: Axes, name: str, points: Sequence[tuple[int, float]]) -> None:
    """A running mean of decay SMOOTHING, which begins as the plain mean."""
    smooth: list[float] = []
    for count, (_, value) in enumerate(points, start=1):
        keep = min(SMOOTHING, 1 - 1 / count)
        smooth.append(value if not smooth else keep * smooth[-1] + (1 - keep) * value)
    axis.plot([step for step, _ in points], smooth, label=name)
