"""`dspark train-drafter`: prompts in, a drafter for any supported target out.

Stages: (a) the target answers prompts, (b) its features are captured, (c) the drafter is trained, (d) a checkpoint is written,
(e) it is measured on prompts that were held out, and written again with the temperatures of its confidence. (a) to (c) leave
their results in the work folder and go on where they were; (d) and (e) follow from those and are done anew.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from dspark.engine import ConfigError, EngineConfig, ModelFiles, locate_model
from dspark.engine.drafters.draft_checkpoint import DraftSpec
from dspark.engine.drafters.eagle3_checkpoint import Eagle3Spec
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.spec import ModelSpec, read_spec
from dspark.engine.models.weights import load_weights
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
    temperature_of,
)
from dspark.training.draft_network import DraftNetwork
from dspark.training.eagle3_network import Eagle3Network
from dspark.training.eagle3_warm_start import eagle3_warm_start
from dspark.training.export import export_checkpoint
from dspark.training.features import capture_features
from dspark.training.held_out import HeldOut, answer_held_out
from dspark.training.loss_report import LossReport
from dspark.training.losses import DFLASH, EAGLE3, LossWeights
from dspark.training.option_types import count, layer_numbers, positive
from dspark.training.plots import check_matplotlib, loss_curve
from dspark.training.progress import progress_bar
from dspark.training.train import AnswerData, SharedHead, TrainConfig, train
from dspark.training.warm_start import random_start, warm_start

LOSSES = {"dspark": LossWeights(), "dflash": DFLASH, "eagle3": EAGLE3}
STAGES = ("answers", "features", "training", "report")
WARM_START_ROWS = 2000
HEAD_DIM_MULTIPLE = 32
"""What the engine's drafters support; checked before hours of work and not after them."""
REPORT_FOLDER = "report"
LOSS_FILE = "loss.png"
TOO_FEW_HELD_OUT = (
    "no report and no temperatures for the confidence: too few of the prompts are held out (5 % are, by their text); "
    "give more prompts"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="model folder, GGUF file or hub id (default: the default model)")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="jsonl with `prompt` and `kind`, or text"
    )
    parser.add_argument("--method", choices=tuple(LOSSES), default="dspark", help="(default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the checkpoint, its `report`, and `work`, from which a run that was killed goes on",
    )
    parser.add_argument("--until", choices=STAGES, default="report", help="last stage to run (default: all)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of the training; auto takes a GPU if there is one. Answers, features and report are computed on "
        "the CPU. Training on a GPU has not been run by us yet (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    _add_answer_arguments(parser.add_argument_group("answers of the target"))
    _add_drafter_arguments(parser.add_argument_group("drafter"))
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=4000, help="optimiser steps (default: %(default)s)")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    training.add_argument("--random-start", action="store_true", help="do not start from the target's own layers")
    training.add_argument(
        "--save-every", type=float, default=120.0, metavar="S", help="seconds between saved states (default: 120)"
    )


def _add_answer_arguments(group: Any) -> None:
    group.add_argument("--max-prompts", type=positive, metavar="N", help="prompts to train on (default: all)")
    group.add_argument(
        "--held-out",
        type=count,
        default=200,
        metavar="N",
        help="held-out prompts to answer at T = 0 and at T = 1; half of them fit the confidence's temperatures, the "
        "other half gives the report; 0: neither (default: %(default)s)",
    )
    group.add_argument("--answer-tokens", type=positive, default=256, help="longest answer (default: %(default)s)")
    group.add_argument("--slots", type=positive, default=96, help="answers computed at once (default: %(default)s)")


def _add_drafter_arguments(group: Any) -> None:
    group.add_argument(
        "--layers", type=positive, default=2, help="layers; Eagle3 has always one (default: %(default)s)"
    )
    group.add_argument(
        "--captured-layers",
        type=layer_numbers,
        metavar="N,N,...",
        help="target layers whose outputs it reads; DeepSpec's own Eagle3 wants five (default: three, spread)",
    )
    group.add_argument(
        "--block-size", type=positive, default=7, help="drafts per block; Eagle3's ttt_length (default: %(default)s)"
    )
    group.add_argument(
        "--head-ids",
        type=count,
        default=8192,
        metavar="N",
        help="draft only the N ids that the answers use most; 0: all, as always with Eagle3 (default: %(default)s)",
    )
    group.add_argument(
        "--markov-rank", type=positive, default=64, help="of the dspark method only (default: %(default)s)"
    )
    group.add_argument(
        "--markov-head",
        choices=("vanilla", "gated", "rnn"),
        default="vanilla",
        help="of the dspark method only (default: %(default)s)",
    )
    group.add_argument(
        "--mask-token-id", type=count, default=0, help="a token that texts do not contain (default: %(default)s)"
    )
    group.add_argument("--shared-head", action="store_true", help="leave embedding and head out of the checkpoint")


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    """Raises ConfigError."""
    draws = args.until in ("training", "report")
    device = training_device(args.device)
    if draws:
        check_matplotlib()
    set_threads(args.threads)
    files = locate_model(args.target)
    target = read_spec(files.folder)
    check_options(args, target)
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    check_run(work / "run.json", {"target": files.name, "answer_tokens": args.answer_tokens})
    prompts = read_prompts(args.prompts)
    answers = AnswerConfig(args.target, args.answer_tokens, args.slots, args.threads)
    shards = answer_stage(args, answers, files, prompts, work / "answers")
    if args.until == "answers":
        return 0
    weights = load_weights(files.folder, target, choose_dtype(EngineConfig()))
    longest = LONGEST_PROMPT + args.answer_tokens
    decoder = Decoder(target, weights, longest + args.block_size, LinearFactory())
    draft = draft_spec(args, target, shards)
    name = "features-" + "-".join(map(str, draft.target_layer_ids))
    features = capture_features(decoder, shards, draft.target_layer_ids, work / name, progress_bar("features"))
    if args.until == "features":
        return 0
    network = start_network(args, draft, decoder, weights, longest, last_captured_states(features, target.hidden_size))
    data = AnswerData(shards, features, target.hidden_size, args.block_size)
    averages = training_stage(args, network, data, decoder.head_weight.to(device, training_dtype(device)), work)
    checkpoint = Checkpoint(args.out, files, averages, None if args.shared_head else decoder)
    checkpoint.write(draft)
    loss_curve(work / "loss.jsonl", report_folder(args.out) / LOSS_FILE)
    print(f"wrote {args.out}", file=sys.stderr)
    if args.until == "report" and args.held_out:
        report_stage(args, answers, files, prompts, decoder, draft, checkpoint)
    return 0


def training_device(asked: str) -> torch.device:
    """Raises ConfigError("device")."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda is asked for, but torch finds no such device")
    return torch.device("cuda" if asked == "auto" and torch.cuda.is_available() else asked.replace("auto", "cpu"))


def training_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU that has instructions for it."""
    return torch.bfloat16 if device.type == "cuda" else choose_dtype(EngineConfig())


def check_options(args: argparse.Namespace, target: ModelSpec) -> None:
    """Raise ConfigError where the target cannot have such a drafter."""
    eagle3 = args.method == "eagle3"
    lowest, highest = 0 if eagle3 else -1, target.num_layers - 2
    captured = captured_layers(args, target)
    if not (lowest <= captured[0] and captured[-1] <= highest):
        raise ConfigError("captured_layers", f"{list(captured)}: the target and method offer {lowest} to {highest}")
    if not (args.random_start or eagle3 or args.layers <= target.num_layers):
        raise ConfigError("layers", f"{args.layers}, but the target has only {target.num_layers} to start from")
    if args.method == "dspark" and not args.random_start and args.markov_rank > target.hidden_size:
        raise ConfigError("markov_rank", f"{args.markov_rank} exceeds the target's hidden size {target.hidden_size}")
    if args.mask_token_id >= target.vocab_size:
        raise ConfigError("mask_token_id", f"{args.mask_token_id}, but the target has {target.vocab_size} ids")
    if target.head_dim % HEAD_DIM_MULTIPLE:
        raise ConfigError(
            "target", f"its head size is {target.head_dim}; drafters need a multiple of {HEAD_DIM_MULTIPLE}"
        )


def check_run(path: Path, settings: dict[str, object]) -> None:
    """Note what everything in the work folder depends on. Raises ConfigError("out") where it was made with other settings."""
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != settings:
        raise ConfigError(
            "out", f"{path.parent} was made with {found}, not {settings}; give another folder or remove it"
        )


def answer_stage(
    args: argparse.Namespace, config: AnswerConfig, files: ModelFiles, prompts: Sequence[Prompt], folder: Path
) -> list[list[Answer]]:
    """The target's answers to the prompts that are not held out, by shard."""
    chosen = [one for one in prompts if not one.held_out]
    random.Random(args.seed).shuffle(chosen)
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    encoded = encode_prompts(tokenizer, chosen, LONGEST_PROMPT, args.max_prompts)
    if not encoded:
        raise ConfigError("prompts", f"none to train on is left without those held out or over {LONGEST_PROMPT} tokens")
    record_answers(config, encoded, {folder: temperature_of})
    return read_shards(folder)


def captured_layers(args: argparse.Namespace, target: ModelSpec) -> tuple[int, ...]:
    """Those asked for, else three from the second to the third last, as in the published drafters."""
    if args.captured_layers:
        return args.captured_layers
    depth = target.num_layers
    return tuple(sorted({min(max(0, layer), depth - 2) for layer in (1, depth // 2 - 1, depth - 3)}))


def draft_spec(
    args: argparse.Namespace, target: ModelSpec, shards: Sequence[Sequence[Answer]]
) -> DraftSpec | Eagle3Spec:
    sizes: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_heads": target.num_heads,
        "num_kv_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "rms_norm_eps": target.rms_norm_eps,
        "rope": target.rope,
        "attention_bias": False,
        "target_layer_ids": captured_layers(args, target),
        "num_target_layers": target.num_layers,
    }
    if args.method == "eagle3":
        return Eagle3Spec(**sizes, ttt_length=args.block_size)
    dspark = args.method == "dspark"
    return DraftSpec(
        **sizes,
        num_layers=args.layers,
        block_size=args.block_size,
        mask_token_id=args.mask_token_id,
        markov=args.markov_head if dspark else None,
        markov_rank=args.markov_rank if dspark else 0,
        confidence_head=dspark,
        confidence_with_markov=dspark,
        draft_token_ids=most_frequent_ids(shards, target.vocab_size, args.head_ids),
    )


def most_frequent_ids(shards: Sequence[Sequence[Answer]], vocab_size: int, count: int) -> tuple[int, ...] | None:
    """The ids that the answers use most, ascending; None (all) for a count of 0 or of a whole vocabulary."""
    if not 0 < count < vocab_size:
        return None
    answered = [one.tokens[one.prompt_len :] for shard in shards for one in shard]
    frequency = np.bincount(np.concatenate(answered), minlength=vocab_size)
    return tuple(np.sort(np.argsort(-frequency, kind="stable")[:count]).tolist())


def last_captured_states(features: Sequence[NDArray[np.int16]], hidden_size: int) -> Tensor:
    """Some outputs of the last captured layer, [about WARM_START_ROWS, d] fp32."""
    step = max(1, sum(map(len, features)) // WARM_START_ROWS)
    rows = np.concatenate([shard[::step, -2 * hidden_size : -hidden_size] for shard in features])
    return torch.from_numpy(rows).view(torch.bfloat16).float()


def start_network(
    args: argparse.Namespace,
    draft: DraftSpec | Eagle3Spec,
    decoder: Decoder,
    weights: Mapping[str, Tensor],
    longest: int,
    states: Tensor,
) -> DraftNetwork | Eagle3Network:
    """The network before its first step. longest: tokens of a prompt and its answer. states: `last_captured_states`."""
    torch.manual_seed(args.seed)
    if isinstance(draft, Eagle3Spec):
        eagle3 = Eagle3Network(draft, decoder.embedding, longest)
        if args.random_start:
            random_start(eagle3)
        else:
            eagle3_warm_start(eagle3, weights, states)
        return eagle3
    network = DraftNetwork(draft, decoder.embedding, longest)
    if args.random_start:
        random_start(network)
    else:
        warm_start(network, weights, states)
    return network


def training_stage(
    args: argparse.Namespace, network: DraftNetwork | Eagle3Network, data: AnswerData, head: Tensor, work: Path
) -> dict[str, Tensor]:
    """The trained parameters. head: the target's, on the device and of the dtype to compute with."""
    ids = network.spec.draft_token_ids if isinstance(network.spec, DraftSpec) else None
    config = TrainConfig(args.steps, learning_rate=args.learning_rate, seed=args.seed, save_every_s=args.save_every)
    report = LossReport(work / "loss.jsonl", args.steps)
    shared = SharedHead.of(head, None if ids is None else torch.tensor(ids))
    return train(network, data, shared, LOSSES[args.method], config, work, report)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the drafter goes, and what is stored with it.  shared: whose embedding and head are stored too, if any."""

    folder: Path
    target: ModelFiles
    tensors: Mapping[str, Tensor]
    shared: Decoder | None

    def write(self, draft: DraftSpec | Eagle3Spec) -> None:
        config = json.loads((self.target.folder / "config.json").read_text(encoding="utf-8"))
        shared = None if self.shared is None else (self.shared.embedding, self.shared.head_weight)
        name = self.target.name.rpartition("/")[2]
        export_checkpoint(self.folder, draft, self.tensors, config, shared, name)


def report_folder(out: Path) -> Path:
    folder = out / REPORT_FOLDER
    folder.mkdir(exist_ok=True)
    return folder


def report_stage(
    args: argparse.Namespace,
    config: AnswerConfig,
    files: ModelFiles,
    prompts: Sequence[Prompt],
    decoder: Decoder,
    draft: DraftSpec | Eagle3Spec,
    checkpoint: Checkpoint,
) -> None:
    """Fit the confidence's temperatures, write the checkpoint again with them, and report."""
    work = checkpoint.folder / "work" / "held-out"
    fitting, testing = answer_held_out(config, files.folder, prompts, args.held_out, work)
    if not fitting or not testing:
        print(TOO_FEW_HELD_OUT, file=sys.stderr)
        return
    held_out = HeldOut(config, files.name, decoder, fitting, testing)
    closing = ["## Training", "", f"{args.method}, {args.steps} steps.", "", f"![Loss]({LOSS_FILE})", ""]
    if isinstance(draft, DraftSpec) and draft.confidence_head:
        temperatures = held_out.fit_temperatures(checkpoint.folder)
        checkpoint.write(replace(draft, temperatures=temperatures))
        shown = " and ".join(", ".join(f"{one:.2f}" for one in row) for row in temperatures)
        closing += [
            f"Temperatures of slots 1 … (greedy and sampled), fitted on {len(fitting)} other answers: {shown}.",
            "",
        ]
    folder = report_folder(checkpoint.folder)
    held_out.report(checkpoint.folder, folder, closing)
    print(f"wrote {folder / 'report.md'}", file=sys.stderr)
