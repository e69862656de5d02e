"""`dspark eval`: how good is a drafter on answers that it was not trained on.

The target answers the prompts once (or recorded answers are taken), then every drafter is replayed on the same answers; see
training/replay.py. Writes report.md, its plots, and the rounds of each drafter as arrays.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from dspark.engine import ConfigError, EngineConfig, locate_model
from dspark.engine.drafters.open_drafter import open_drafter
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights
from dspark.engine.noise import NoiseCache
from dspark.engine.startup import choose_dtype
from dspark.kernels.cpu import set_threads
from dspark.training.answers import (
    LONGEST_PROMPT,
    Answer,
    AnswerConfig,
    Prompt,
    encode_prompts,
    read_prompts,
    read_shards,
    record_answers,
)
from dspark.training.evaluation_report import Evaluation, write_report
from dspark.training.option_types import positive, temperatures
from dspark.training.plots import check_matplotlib
from dspark.training.progress import progress_bar
from dspark.training.replay import ROWS, replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="model folder, GGUF file or hub id (default: the default model)")
    parser.add_argument(
        "--drafter", nargs="+", default=["auto"], help="auto, lookup or checkpoint folders (default: auto)"
    )
    parser.add_argument("--alone", action="store_true", help="also measure each model drafter without lookup beside it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, nargs="+", help="jsonl with `prompt` and `kind`, or text")
    source.add_argument(
        "--answers", type=Path, nargs="+", metavar="FOLDER", help="answers of the target that are already recorded"
    )
    parser.add_argument(
        "--split", choices=("held-out", "all"), default="held-out", help="which prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=256,
        help="longest answer; of recorded answers, the limit they were recorded with (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="at most N answers per temperature, drawn at random (default: all)"
    )
    parser.add_argument("--temperatures", type=temperatures, default=[0.0, 1.0], help="comma-separated (default: 0,1)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report, its plots and the answers")
    parser.add_argument(
        "--slots", type=positive, default=ROWS, help="answers computed and replayed at once (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="(default: %(default)s)")


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    """Raises ConfigError."""
    check_matplotlib()
    args.out.mkdir(parents=True, exist_ok=True)
    set_threads(args.threads)
    files = locate_model(args.target)
    if args.answers:
        answers = recorded_answers(args.answers, args.temperatures)
    else:
        prompts = [one for one in read_prompts(args.prompts) if one.held_out or args.split == "all"]
        config = AnswerConfig(args.target, args.max_tokens, args.slots, args.threads)
        answers = answers_at(config, files.folder, prompts, args.limit, args.temperatures, args.out)
    answers = drawn_answers(answers, args.limit)
    if not any(len(one.tokens) - one.prompt_len >= 2 for one in answers):
        raise ConfigError("answers" if args.answers else "prompts", "there is no answer of two tokens to evaluate on")
    spec = read_spec(files.folder)
    weights = load_weights(files.folder, spec, choose_dtype(EngineConfig()))
    decoder = Decoder(spec, weights, max(len(one.tokens) for one in answers), LinearFactory())
    measured = partial(evaluate, decoder=decoder, target_name=files.name, answers=answers, max_tokens=args.max_tokens)
    evaluations = []
    for name, label in zip(args.drafter, drafter_labels(args.drafter), strict=True):
        engine_config = EngineConfig(model=args.target, drafter=name, max_num_seqs=args.slots)
        evaluations.append(measured(engine_config, label))
        if args.alone and len(evaluations[-1].sources) > 1:
            evaluations.append(measured(replace(engine_config, lookup=False), f"{label}-alone"))
    write_report(args.out, files.name, args.max_tokens, evaluations)
    print(f"wrote {args.out / 'report.md'}", file=sys.stderr)
    return 0


def drafter_labels(names: Sequence[str]) -> list[str]:
    """How the report and its files call each drafter: the last part of its path, or all of it where that is taken twice."""
    short = [Path(name).name for name in names]
    whole = [name.strip("/").replace("/", "-") for name in names]
    return [one if short.count(one) == 1 else long for one, long in zip(short, whole, strict=True)]


def evaluate(
    config: EngineConfig,
    label: str,
    *,
    decoder: Decoder,
    target_name: str,
    answers: Sequence[Answer],
    max_tokens: int,
) -> Evaluation:
    """The rounds of the drafter that `config` names on answers that were recorded with a limit of `max_tokens`.

    As many answers are in flight as `config` has sequences. Raises ConfigError.
    """
    noise = NoiseCache(decoder.spec.vocab_size)
    drafter, calibration = open_drafter(
        config,
        decoder,
        target_name,
        max(len(one.tokens) for one in answers),
        lambda keys, positions, rounds: torch.from_numpy(noise.rows(keys, positions)),
    )
    untaught = copy.deepcopy(calibration)
    try:
        rounds = replay(
            decoder,
            drafter,
            answers,
            max_tokens=max_tokens,
            calibration=calibration,
            noise=noise,
            rows=config.max_num_seqs,
            progress=progress_bar(label),
        )
    except ValueError as error:
        raise ConfigError("max_tokens", str(error)) from error
    return Evaluation(label, rounds, drafter.sources, untaught)


def recorded_answers(folders: Sequence[Path], temperatures: Sequence[float]) -> list[Answer]:
    """The recorded answers whose temperature is asked for."""
    found = [one for folder in folders for shard in read_shards(folder) for one in shard]
    return [one for one in found if any(np.float32(one.temperature) == np.float32(t) for t in temperatures)]


def drawn_answers(answers: Sequence[Answer], limit: int | None) -> list[Answer]:
    """At most `limit` answers of each temperature, in the order they came."""
    if limit is None:
        return list(answers)
    chosen: list[int] = []
    for temperature in sorted({one.temperature for one in answers}):
        places = [i for i, one in enumerate(answers) if one.temperature == temperature]
        chosen += random.Random(0).sample(places, min(limit, len(places)))
    return [answers[i] for i in sorted(chosen)]


def answers_at(
    config: AnswerConfig,
    target_folder: Path,
    prompts: Sequence[Prompt],
    most: int | None,
    temperatures: Sequence[float],
    out: Path,
) -> list[Answer]:
    """The target's answers at each temperature to `most` prompts (None: all), drawn at random; `seed` is a prompt's place.

    Those that are in `out` are not made again. Raises ConfigError.
    """
    shuffled = list(prompts)
    random.Random(0).shuffle(shuffled)
    encoded = encode_prompts(AutoTokenizer.from_pretrained(target_folder), shuffled, LONGEST_PROMPT, most)
    folders = {out / f"answers-t{temperature:g}": partial(_same, temperature) for temperature in temperatures}
    record_answers(config, encoded, folders)
    return [one for folder in folders for shard in read_shards(folder) for one in shard]


def _same(temperature: float, index: int) -> float:
    return temperature
