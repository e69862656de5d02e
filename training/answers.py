"""Stage (a): the target answers the prompts, through the engine that will later serve them.

A shard holds the answers to SHARD_PROMPTS prompts as one safetensors file, written whole or not at all, so a killed run goes
on with the first shard that is missing. Every prompt's split, temperature and seed follow from its text and place alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from dspark.engine import ConfigError, Engine, EngineConfig, Request, SamplingParams
from dspark.training.progress import progress_bar

SHARD_PROMPTS = 256
LONGEST_PROMPT = 300
"""Tokens; longer prompts are left out, since their answers are few tokens for much computing."""
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Prompt:
    """kind: the domain that results are grouped by."""

    kind: str
    text: str

    @property
    def held_out(self) -> bool:
        """Never trained on: decided by the text, so that it stays so in every run and file order."""
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64 < HELD_OUT_SHARE


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: [prompt + answer] int64; the answer begins at `prompt_len` and ends with the end-of-text token, if reached.

    seed: of the request, the prompt's place in the list.
    """

    kind: str
    tokens: NDArray[np.int64]
    prompt_len: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class AnswerConfig:
    """How the target answers.

    target: as `EngineConfig.model`.  max_tokens: of the longest answer.  slots: answers computed at once.
    """

    target: str | None
    max_tokens: int
    slots: int
    threads: int


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """One prompt a line: plain text, or JSON objects with `prompt` and optionally `kind` (else the file's name).

    Raises ConfigError("prompts") for a file that cannot be read so.
    """
    prompts = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("prompts", f"{path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompts.append(_parsed(line, path, number) if path.suffix == ".jsonl" else Prompt(path.stem, line))
    return prompts


def _parsed(line: str, path: Path, number: int) -> Prompt:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError("prompts", f"{path}, line {number}: not valid JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ConfigError("prompts", f"{path}, line {number}: must be an object with the text of a `prompt`")
    return Prompt(str(fields.get("kind", path.stem)), fields["prompt"])


def temperature_of(index: int) -> float:
    """0 for 40 % of the prompts, 0.7 and 1 for 30 % each: a drafter must follow both greedy and sampled text."""
    return (0.0, 1.0, 0.7, 0.0, 1.0, 0.7, 0.0, 1.0, 0.7, 0.0)[index % 10]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], longest: int, most: int | None = None
) -> list[tuple[str, list[int]]]:
    """(kind, ids) of each prompt as a chat of one user message; those of more than `longest` tokens are left out.

    most: prompts that are wanted; the rest is not looked at.
    """
    encoded: list[tuple[str, list[int]]] = []
    for prompt in prompts:
        if len(encoded) == most:
            break
        messages = [{"role": "user", "content": prompt.text}]
        ids = cast(list[int], tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if len(ids) <= longest:
            encoded.append((prompt.kind, ids))
    return encoded


def record_answers(
    config: AnswerConfig, prompts: Sequence[tuple[str, Sequence[int]]], folders: Mapping[Path, Callable[[int], float]]
) -> None:
    """Answer (kind, prompt ids) pairs into shards in each folder, at the temperature that it gives to a prompt's place.

    Shards that are there are kept, and without any missing no engine is started. Raises ConfigError("out") where there
    are some that answer other prompts.
    """
    for folder in folders:
        _check_prompts(folder, prompts)
    shards = range(-(-len(prompts) // SHARD_PROMPTS))
    if not all(shard_path(folder, number).exists() for folder in folders for number in shards):
        asyncio.run(_record(config, prompts, folders))


def _check_prompts(folder: Path, prompts: Sequence[tuple[str, Sequence[int]]]) -> None:
    for path in folder.glob("answers-*.safetensors"):
        answers = read_shard(path)
        wanted = prompts[answers[0].seed : answers[0].seed + SHARD_PROMPTS]
        if [one.tokens[: one.prompt_len].tolist() for one in answers] != [list(ids) for _, ids in wanted]:
            raise ConfigError("out", f"{folder} holds the answers to other prompts; give another folder or remove it")


async def _record(
    config: AnswerConfig, prompts: Sequence[tuple[str, Sequence[int]]], folders: Mapping[Path, Callable[[int], float]]
) -> None:
    engine_config = EngineConfig(
        model=config.target,
        drafter="lookup",  # the text is the same with any
        max_num_seqs=config.slots,
        max_num_batched_tokens=max(512, config.slots),
        max_queued_requests=4 * config.slots,
        max_model_len=LONGEST_PROMPT + config.max_tokens,
        threads=config.threads,
    )
    engine = await asyncio.to_thread(Engine.load, engine_config)
    await engine.start()
    try:
        for folder, temperature in folders.items():
            bar = progress_bar(folder.name)
            await answer_prompts(
                engine, prompts, folder, max_tokens=config.max_tokens, temperature=temperature, progress=bar
            )
    finally:
        await engine.close()


async def answer_prompts(
    engine: Engine,
    prompts: Sequence[tuple[str, Sequence[int]]],
    folder: Path,
    *,
    max_tokens: int,
    temperature: Callable[[int], float] = temperature_of,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer (kind, prompt ids) pairs into shards in `folder`; the engine must be running.

    Twice as many requests are submitted as the engine has slots, so that no slot waits for its next prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(prompts), SHARD_PROMPTS)
    missing = [start for start in starts if not shard_path(folder, start // SHARD_PROMPTS).exists()]
    slots = asyncio.Semaphore(2 * engine.info.max_num_seqs)
    done = len(starts) - len(missing)

    async def answer(index: int) -> Answer:
        kind, ids = prompts[index]
        degrees = temperature(index)
        params = SamplingParams(temperature=degrees, seed=index, max_tokens=max_tokens)
        tokens = list(ids)
        async with slots, engine.submit(Request(tuple(ids), params)) as stream:
            async for delta in stream:
                tokens += delta.token_ids
        return Answer(kind, np.array(tokens, np.int64), len(ids), degrees, index)

    async def shard(start: int) -> None:
        nonlocal done
        stop = min(start + SHARD_PROMPTS, len(prompts))
        answers = await asyncio.gather(*map(answer, range(start, stop)))
        write_shard(shard_path(folder, start // SHARD_PROMPTS), answers)
        done += 1
        progress(done, len(starts))

    for first, second in zip(missing[::2], [*missing[1::2], None], strict=False):  # two at once: no gap between shards
        await asyncio.gather(shard(first), *([shard(second)] if second is not None else []))


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"answers-{number:05d}.safetensors"


def write_shard(path: Path, answers: Sequence[Answer]) -> None:
    tensors = {
        "tokens": np.concatenate([one.tokens for one in answers]).astype(np.int32),
        "lengths": np.array([len(one.tokens) for one in answers], np.int32),
        "prompt_lens": np.array([one.prompt_len for one in answers], np.int32),
        "temperatures": np.array([one.temperature for one in answers], np.float32),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"kinds": "\n".join(one.kind for one in answers)})
    partial.replace(path)


def read_shards(folder: Path) -> list[list[Answer]]:
    """The answers of every shard in `folder`, in the order of the prompts."""
    return [read_shard(path) for path in sorted(folder.glob("answers-*.safetensors"))]


def read_shard(path: Path) -> list[Answer]:
    first = int(path.stem.rpartition("-")[2]) * SHARD_PROMPTS
    tensors = load_file(path)
    with safe_open(path, framework="np") as file:
        kinds = file.metadata()["kinds"].split("\n")
    ends = np.cumsum(tensors["lengths"])
    answers = []
    for i, end in enumerate(ends):
        tokens = tensors["tokens"][end - tensors["lengths"][i] : end].astype(np.int64)
        prompt_len, temperature = int(tensors["prompt_lens"][i]), float(tensors["temperatures"][i])
        answers.append(Answer(kinds[i], tokens, prompt_len, temperature, seed=first + i))
    return answers
