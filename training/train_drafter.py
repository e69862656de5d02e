"""`dspark train-drafter`: prompts in, a drafter for any supported target out.

Stages, each of which leaves its result in the work folder and is skipped when that is there: (a) the target answers prompts,
(b) its features are captured, (c) the drafter is trained, (d) a checkpoint is written. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from dspark.engine import Engine, EngineConfig, locate_model
from dspark.engine.drafters.draft_checkpoint import DraftSpec
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.spec import ModelSpec, read_spec
from dspark.engine.models.weights import load_weights
from dspark.engine.startup import choose_dtype
from dspark.training.answers import Prompt, answer_prompts, read_shards
from dspark.training.draft_network import DraftNetwork
from dspark.training.export import export_checkpoint
from dspark.training.features import capture_features
from dspark.training.losses import DFLASH, LossWeights
from dspark.training.train import AnswerData, SharedHead, TrainConfig, train
from dspark.training.warm_start import random_start, warm_start

LONGEST_PROMPT = 300
"""Tokens; longer prompts are left out, since their answers are few tokens for much computing."""
WARM_START_ROWS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="model folder, GGUF file or hub id (default: the default model)")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="jsonl with `prompt` and `kind`, or text"
    )
    parser.add_argument("--method", choices=("dspark", "dflash"), default="dspark")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoint; `work` below it for the stages"
    )
    parser.add_argument("--answer-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=96, help="answers computed at once (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the drafter (default: %(default)s)")
    parser.add_argument("--captured-layers", help="target layers, comma-separated (default: spread over the target)")
    parser.add_argument("--block-size", type=int, default=7, help="drafts per block (default: %(default)s)")
    parser.add_argument("--markov-rank", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--markov-head", choices=("vanilla", "gated", "rnn"), default="vanilla")
    parser.add_argument("--mask-token-id", type=int, default=0, help="a token that texts do not contain")
    parser.add_argument("--random-start", action="store_true", help="do not start from the target's own layers")
    parser.add_argument("--shared-head", action="store_true", help="leave embedding and head out of the checkpoint")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=float, default=120.0, metavar="S", help="seconds between saved states")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """One prompt a line: plain text, or JSON objects with `prompt` and optionally `kind` (else the file's name)."""
    prompts = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                fields = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line}
                prompts.append(Prompt(str(fields.get("kind", path.stem)), fields["prompt"]))
    return prompts


def spread_layers(depth: int) -> tuple[int, ...]:
    """Three layers from the second to the third last, as in the published drafters."""
    return tuple(sorted({1, depth // 2 - 1, depth - 3}))


def draft_spec(args: argparse.Namespace, target: ModelSpec) -> DraftSpec:
    captured = spread_layers(target.num_layers)
    if args.captured_layers:
        captured = tuple(int(one) for one in args.captured_layers.split(","))
    dspark = args.method == "dspark"
    return DraftSpec(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=args.layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=target.rope,
        attention_bias=False,
        block_size=args.block_size,
        mask_token_id=args.mask_token_id,
        target_layer_ids=captured,
        num_target_layers=target.num_layers,
        markov=args.markov_head if dspark else None,
        markov_rank=args.markov_rank if dspark else 0,
        confidence_head=dspark,
        confidence_with_markov=dspark,
    )


def main(args: argparse.Namespace) -> int:
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    files = locate_model(args.target)
    _answer(args, files.folder, work / "answers")
    answers = [one for one in read_shards(work / "answers") if len(one.tokens) - one.prompt_len >= 2]
    spec = read_spec(files.folder)
    torch.set_grad_enabled(False)
    dtype = choose_dtype(EngineConfig())
    weights = load_weights(files.folder, spec, dtype)
    draft = draft_spec(args, spec)
    longest = max(len(one.tokens) for one in answers)
    decoder = Decoder(spec, weights, longest + args.block_size, LinearFactory())
    name = "features-" + "-".join(map(str, draft.target_layer_ids))
    features = capture_features(decoder, answers, draft.target_layer_ids, work / name, _bar("features"))
    network = DraftNetwork(draft, decoder.embedding, longest)
    torch.manual_seed(args.seed)
    if args.random_start:
        random_start(network)
    else:
        last = slice(-2 * spec.hidden_size, -spec.hidden_size)
        rows = np.linspace(0, len(features) - 1, WARM_START_ROWS).astype(np.int64)
        warm_start(network, weights, torch.from_numpy(np.array(features[rows, last])).view(torch.bfloat16).float())
    data = AnswerData(answers, features, spec.hidden_size, args.block_size)
    config = TrainConfig(args.steps, learning_rate=args.learning_rate, seed=args.seed, save_every_s=args.save_every)
    head = SharedHead.of(decoder.head_weight, None)
    losses = DFLASH if args.method == "dflash" else LossWeights()
    averages = train(network, data, head, losses, config, work, _Report(work / "loss.jsonl", args.steps))
    target_config = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    shared = None if args.shared_head else (decoder.embedding, decoder.head_weight)
    export_checkpoint(args.out, draft, averages, target_config, shared)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def _answer(args: argparse.Namespace, folder: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [one for one in read_prompts(args.prompts) if not one.held_out]
    random.Random(args.seed).shuffle(prompts)
    encoded = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt.text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) <= LONGEST_PROMPT:
            encoded.append((prompt.kind, ids))

    async def run() -> None:
        config = EngineConfig(
            model=args.target,
            max_num_seqs=args.slots,
            max_num_batched_tokens=max(512, args.slots),
            max_queued_requests=4 * args.slots,
            max_model_len=LONGEST_PROMPT + args.answer_tokens,
            threads=args.threads,
        )
        engine = await asyncio.to_thread(Engine.load, config)
        await engine.start()
        await answer_prompts(engine, encoded, out, max_tokens=args.answer_tokens, progress=_bar("answers"))
        await engine.close()

    asyncio.run(run())


def _bar(name: str):
    bar = tqdm(desc=name, unit="")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


class _Report:
    """A progress bar, and one line of JSON every few steps for the loss curve."""

    every = 20

    def __init__(self, path: Path, steps: int) -> None:
        self._path = path
        self._bar = tqdm(total=steps, desc="training", unit="step")
        self._started_s = time.monotonic()

    def __call__(self, step: int, facts: dict[str, float]) -> None:
        self._bar.update(step + 1 - self._bar.n)
        if step % self.every == 0:
            self._bar.set_postfix({name: f"{facts[name]:.3f}" for name in ("loss", "agreement")})
            line = {"step": step, "s": time.monotonic() - self._started_s} | facts
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
