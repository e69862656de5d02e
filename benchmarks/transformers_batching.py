"""transformers' continuous batching behind those few methods of our engine that the closed loop of `modes.py` uses.

It runs in this process, on the weights that `qwen3.RandomWeights` draws, which are those of the engine that ran before it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, Qwen3Config

from dspark.benchmarks.qwen3 import Model, RandomWeights
from dspark.engine import FinishReason, Request, StepFacts, TokenDelta


def make_model(model: Model, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    spec = model.target
    config = Qwen3Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        max_position_embeddings=spec.max_position,
        rope_parameters={"rope_type": spec.rope.kind, "rope_theta": spec.rope.theta},
        tie_word_embeddings=spec.tie_word_embeddings,
        eos_token_id=None,
        bos_token_id=None,
    )
    with device:
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    weights = RandomWeights(model.target_shapes, dtype, device)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(weights[name])
    return made.eval()


class TransformersEngine:
    """Greedy, every answer as long as it is asked to be. A step here is one delivery of tokens; its parts are not known.

    Its own defaults, but that nothing of a prompt is found in a cache: our requests are salted. On a CPU its cache is small,
    since it would take most of the memory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.controller = SimpleNamespace(mode="off")
        self.on_step: list[Callable[[StepFacts], None]] = []
        sizes: dict[str, Any] = {"num_blocks": 64, "max_batch_tokens": 512} if model.device.type == "cpu" else {}
        config = ContinuousBatchingConfig(allow_block_sharing=False, **sizes)
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
        # PreTrainedModel has it from a mixin of its subclasses
        make: Any = model.continuous_batching_context_manager
        self._running: AbstractContextManager[Any] = make(generation_config=greedy, continuous_batching_config=config)
        self._numbers = itertools.count()
        self._unfinished: set[str] = set()
        self._last_s = time.perf_counter()

    def start(self) -> None:
        self._manager = self._running.__enter__()

    def close(self) -> None:
        self._running.__exit__(None, None, None)

    def gauges(self) -> SimpleNamespace:
        return SimpleNamespace(sequences_running=len(self._unfinished))

    @asynccontextmanager
    async def submit(self, request: Request) -> AsyncIterator[AsyncIterator[TokenDelta]]:
        name = f"request {next(self._numbers)}"
        results: asyncio.Queue[Any] = asyncio.Queue()
        self._manager.register_result_handler(name, results.put_nowait)
        self._unfinished.add(name)
        prompt, most = list(request.prompt_token_ids), request.sampling.max_tokens
        self._manager.add_request(prompt, name, max_new_tokens=most, streaming=True, eos_token_id=-1)
        try:
            yield self._deltas(results)
        finally:
            if name in self._unfinished:
                self._manager.cancel_request(name)
                self._unfinished.remove(name)

    async def _deltas(self, results: asyncio.Queue[Any]) -> AsyncIterator[TokenDelta]:
        known = 0
        while True:
            result = await results.get()
            if result.error is not None:
                raise SystemExit(f"transformers' continuous batching failed: {result.error}")
            tokens = tuple(result.generated_tokens[known:])
            known += len(tokens)
            now_s = time.perf_counter()
            facts = StepFacts(generated=len(tokens), step_s=now_s - self._last_s)
            self._last_s = now_s
            for report in self.on_step:
                report(facts)
            ended = result.is_finished()
            if ended:
                self._unfinished.discard(result.request_id)
            yield TokenDelta(0, tokens, finish_reason=FinishReason.LENGTH if ended else None)
            if ended:
                return
