"""Stage (e): how good a new drafter is on prompts that it was not trained on, and what its confidence is worth.

The first half of the held-out prompts fits the sequential temperatures, greedy and sampled apart; the other half is what
the report is measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark.engine import EngineConfig
from dspark.engine.models.decoder import Decoder
from dspark.training.acceptance import judged_log_odds
from dspark.training.answers import Answer, AnswerConfig, Prompt
from dspark.training.calibrate import fit_temperatures
from dspark.training.evaluate import answers_at, evaluate
from dspark.training.evaluation_report import Evaluation, write_report
from dspark.training.replay import Rounds

SAMPLING_TEMPERATURES = 0.0, 1.0
DECIMALS = 4
"""Of a fitted temperature; the grid's next one is 2 % off."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a drafter is measured with.  fitting, testing: answers to different prompts, both at every temperature."""

    config: AnswerConfig
    target_name: str
    decoder: Decoder
    fitting: list[Answer]
    testing: list[Answer]

    def fit_temperatures(self, drafter: Path) -> tuple[tuple[float, ...], ...]:
        """(greedy, sampled) sequential temperatures [γ] of the confidence of the drafter in a folder."""
        rounds = self._rounds(drafter, "fitting temperatures", self.fitting, lookup=False).rounds
        return tuple(_fitted(rounds.where((rounds.temperature > 0) == sampled)) for sampled in (False, True))

    def report(self, drafter: Path, folder: Path, closing: Sequence[str]) -> None:
        """Write the report on the drafter in a folder, alone and with lookup beside it."""
        name = drafter.resolve().name
        evaluations = [
            self._rounds(drafter, f"{name}-alone", self.testing, lookup=False),
            self._rounds(drafter, name, self.testing, lookup=True),
        ]
        write_report(folder, self.target_name, self.config.max_tokens, evaluations, closing)

    def _rounds(self, drafter: Path, label: str, answers: Sequence[Answer], *, lookup: bool) -> Evaluation:
        config = EngineConfig(drafter=str(drafter), lookup=lookup, max_num_seqs=self.config.slots)
        return evaluate(
            config,
            label,
            decoder=self.decoder,
            target_name=self.target_name,
            answers=answers,
            max_tokens=self.config.max_tokens,
        )


def answer_held_out(
    config: AnswerConfig, target_folder: Path, prompts: Sequence[Prompt], most: int, folder: Path
) -> tuple[list[Answer], list[Answer]]:
    """The target's answers, at each temperature, to at most `most` of the prompts that are held out: (fitting, testing).

    Answers are recorded in `folder`. Those without a round (of one token) are left out, so that either half may be empty.
    Raises ConfigError("out") where the folder holds the answers to other prompts.
    """
    held_out = [one for one in prompts if one.held_out]
    answers = answers_at(config, target_folder, held_out, most, SAMPLING_TEMPERATURES, folder)
    middle = (1 + max((one.seed for one in answers), default=0)) // 2
    answers = [one for one in answers if len(one.tokens) - one.prompt_len >= 2]
    return [one for one in answers if one.seed < middle], [one for one in answers if one.seed >= middle]


def _fitted(rounds: Rounds) -> tuple[float, ...]:
    return tuple(round(one, DECIMALS) for one in fit_temperatures(judged_log_odds(rounds), rounds.accepted).tolist())
