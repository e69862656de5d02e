"""Stage (a): the target answers the prompts, through the engine that will later serve them.

A shard holds the answers to SHARD_PROMPTS prompts as one safetensors file, written whole or not at all, so a killed run goes
on with the first shard that is missing. Every prompt's split, temperature and seed follow from its text and place alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dspark.engine import Engine, Request, SamplingParams

SHARD_PROMPTS = 256
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
    """tokens: [prompt + answer] int64; the answer begins at `prompt_len` and ends with the end-of-text token, if reached."""

    kind: str
    tokens: NDArray[np.int64]
    prompt_len: int
    temperature: float


def temperature_of(index: int) -> float:
    """0 for 40 % of the prompts, 0.7 and 1 for 30 % each: a drafter must follow both greedy and sampled text."""
    return (0.0, 1.0, 0.7, 0.0, 1.0, 0.7, 0.0, 1.0, 0.7, 0.0)[index % 10]


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
        return Answer(kind, np.array(tokens, np.int64), len(ids), degrees)

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


def read_shards(folder: Path) -> list[Answer]:
    """Every answer in `folder`, in the order of the prompts."""
    answers = []
    for path in sorted(folder.glob("answers-*.safetensors")):
        tensors = load_file(path)
        with safe_open(path, framework="np") as file:
            kinds = file.metadata()["kinds"].split("\n")
        ends = np.cumsum(tensors["lengths"])
        for i, end in enumerate(ends):
            tokens = tensors["tokens"][end - tensors["lengths"][i] : end].astype(np.int64)
            answers.append(Answer(kinds[i], tokens, int(tensors["prompt_lens"][i]), float(tensors["temperatures"][i])))
    return answers
