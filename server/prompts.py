"""From a request's body to what the engine gets: token ids, sampling, grammar, prediction, and each choice's text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from dspark.engine import EngineInfo, Grammar, Request, SamplingParams
from dspark.server.answer_form import AnswerForm, Structure, answer_form, described, structured_outputs
from dspark.server.errors import InvalidRequestError
from dspark.server.generation import PromptRequest
from dspark.server.grammars import Grammars
from dspark.server.reasoning import END_THINK, THINK
from dspark.server.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    Prediction,
    SamplingFields,
    TokenizeRequest,
    Tool,
)
from dspark.server.text import ChoiceText, Detokenizer, ModelText
from dspark.server.tool_calls import CALL_FORMATS, HERMES, MISTRAL, call_format_of, short_call_id, with_tools_in_text
from dspark.server.translate import check_token_ids, sampling_params, template_messages

Result = TypeVar("Result")

INLINE_SIZE = 4096
"""Work on up to so many characters, bytes or token ids is done on the event loop, in about a millisecond; on more in a
thread."""


async def off_loop_if_large(size: int, work: Callable[[], Result]) -> Result:
    """size: characters, bytes or token ids that the work goes through."""
    return work() if size <= INLINE_SIZE else await asyncio.to_thread(work)


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """tool_call_parser: a name of `CALL_FORMATS`, or auto: what the chat template teaches.
    reasoning_parser: think, none, or auto: think where the template knows `<think>`.
    template_kwargs: what `chat_template_kwargs` may hold.
    """

    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    template_kwargs: frozenset[str] = frozenset({"enable_thinking", "thinking"})


class Prompts:
    """Turns bodies into engine requests, for one model. Every method raises InvalidRequestError."""

    def __init__(self, info: EngineInfo, text: ModelText, settings: ChatSettings) -> None:
        template = text.template
        self._info = info
        self._text = text
        self._settings = settings
        self._template_variables = frozenset() if template is None else frozenset(template.variables)
        source = "" if template is None else template.source
        named = CALL_FORMATS.get(settings.tool_call_parser)
        self._call_format = named or (call_format_of(source) if self._template_knows_tools else HERMES)
        parser = settings.reasoning_parser
        self._reasoning = END_THINK in source if parser == "auto" else parser == "think"
        self.grammars = Grammars(text.tokenizer, info.vocab_size, info.eos_token_ids)

    @property
    def _template_knows_tools(self) -> bool:
        return "tools" in self._template_variables

    async def chat(self, body: ChatCompletionRequest, tenant: bytes, seed: int | None) -> list[PromptRequest]:
        """seed: of the text where the body has none."""
        sampling = sampling_params(body, self._info.vocab_size, seed)
        form = answer_form(body, self._call_format, reasoning=self._reasoning)
        shown = [] if body.tool_choice is not None and body.tool_choice.type == "none" else body.tools or []
        variables = self._variables(body, form)
        token_ids = await self._encode_chat(body.messages, shown, variables)
        begun = self._text.ends_with(token_ids, THINK)
        choices = [
            self._choice(body, sampling, form=form, reasoning_begun=begun, continues_text=False)
            for _ in range(body.n or 1)
        ]
        return [await self._request(body, token_ids, sampling, choices, tenant, "messages", form, body.prediction)]

    async def completions(self, body: CompletionRequest, tenant: bytes, seed: int | None) -> list[PromptRequest]:
        """One per prompt. seed: of the text where the body has none."""
        sampling = sampling_params(body, self._info.vocab_size, seed)
        form = AnswerForm(structured_outputs(body.structured_outputs))
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                token_ids = await off_loop_if_large(len(prompt), partial(self._text.encode, prompt))
                echo = prompt
            else:
                check = partial(check_token_ids, "prompt", prompt, self._info.vocab_size)
                await off_loop_if_large(len(prompt), check)
                token_ids = prompt
                echo = self._text.decode(prompt) if body.echo else ""
            choices = [
                self._choice(body, sampling, form=form, continues_text=True, echo=echo if body.echo else "")
                for _ in range(body.n or 1)
            ]
            prompts.append(await self._request(body, token_ids, sampling, choices, tenant, "prompt", form))
        return prompts

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        if body.messages is None:
            prompt, special = body.prompt or "", body.add_special_tokens is not False
            return await off_loop_if_large(len(prompt), partial(self._text.encode, prompt, add_special_tokens=special))
        variables = self._template_kwargs(body.chat_template_kwargs or {})
        variables["add_generation_prompt"] = body.add_generation_prompt
        return await self._encode_chat(body.messages, body.tools or [], variables)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        check_token_ids("tokens", token_ids, self._info.vocab_size)
        return await off_loop_if_large(len(token_ids), partial(self._text.decode, token_ids))

    async def _encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> list[int]:
        known = template_messages(messages)
        described_tools = described(tools)
        if self._template_knows_tools:
            if self._call_format is MISTRAL:
                known = [_with_short_ids(message) for message in known]
            variables = {**variables, "tools": described_tools or None}
        else:
            known = with_tools_in_text(known, described_tools)
        # rendering runs the model's own program: never on the event loop
        return await asyncio.to_thread(partial(self._text.encode_chat, known, **variables))

    def _variables(self, body: ChatCompletionRequest, form: AnswerForm) -> dict[str, Any]:
        variables = self._template_kwargs(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
            if body.reasoning_effort == "none":
                variables.setdefault("enable_thinking", False)
        if form.structure is not None:
            # it holds from the first token on
            variables.setdefault("enable_thinking", False)
        return variables

    def _template_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        allowed = self._settings.template_kwargs
        for name in given:
            if name not in allowed:
                param = f"chat_template_kwargs.{name[:80]}"
                names = ", ".join(sorted(allowed)) or "none"
                raise InvalidRequestError(f"Invalid value for '{param}': this server passes on {names}", param)
        return dict(given)

    def _choice(
        self,
        body: SamplingFields,
        sampling: SamplingParams,
        *,
        form: AnswerForm,
        continues_text: bool,
        reasoning_begun: bool = False,
        echo: str = "",
    ) -> ChoiceText:
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= frozenset(self._info.eos_token_ids)
        return ChoiceText(
            Detokenizer(
                self._text.vocabulary,
                continues_text=continues_text,
                shown_ids=self._text.control_ids(form.markers) - ends,
            ),
            stops=body.stop or (),
            min_tokens=sampling.min_tokens,
            end_token_ids=ends,
            echo=echo,
            parser=form.parser(reasoning_begun=reasoning_begun),
        )

    async def _request(
        self,
        body: SamplingFields,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        choices: Sequence[ChoiceText],
        tenant: bytes,
        param: str,
        form: AnswerForm,
        prediction: Prediction | None = None,
    ) -> PromptRequest:
        if not token_ids:
            raise InvalidRequestError(
                f"Invalid value for '{param}': it should have at least 1 token, but has none", param
            )
        unused = iter(choices)  # the engine asks once per choice, in the order of their indices
        speculation = body.speculation
        request = Request(
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
            n=len(choices),
            make_stop_check=(lambda: next(unused)) if body.stop or form.ends_itself else None,
            make_grammar=await self._grammar(form.structure),
            predicted_token_ids=await self._predicted(prediction),
            speculate=speculation is None or speculation.mode == "auto",
            max_draft_tokens=None if speculation is None else speculation.max_draft_tokens,
            priority=body.priority or 0,
            cache_salt=tenant,
        )
        return PromptRequest(request, choices)

    async def _grammar(self, structure: Structure | None) -> Callable[[], Grammar] | None:
        return None if structure is None else await self.grammars.compile(structure.spec, structure.param)

    async def _predicted(self, prediction: Prediction | None) -> tuple[int, ...]:
        if prediction is None:
            return ()
        text = prediction.text
        token_ids = await off_loop_if_large(len(text), partial(self._text.encode, text, add_special_tokens=False))
        # no output is longer than the context
        return tuple(token_ids[: self._info.max_model_len])


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    short = dict(message)
    if "tool_call_id" in short:
        short["tool_call_id"] = short_call_id(short["tool_call_id"])
    if "tool_calls" in short:
        short["tool_calls"] = [call | {"id": short_call_id(call["id"])} for call in short["tool_calls"]]
    return short
