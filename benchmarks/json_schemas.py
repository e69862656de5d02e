"""Do answers keep to their JSON schema, and tool calls to their tools? At temperature 1, speculating, over HTTP.

    python -m dspark.benchmarks.json_schemas [--url URL] [--requests 300] [--tool-requests 60] [--json OUT]

Ten schemas in turn, each request with a seed of its own. Every answer that says it is complete is parsed and validated by
jsonschema (of the `test` extra), which shares no code with the server's grammars. All are asked again without
speculation: the text must be the same. Exit status 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, ValidationError

from dspark.benchmarks.claims import Claim, print_claims
from dspark.benchmarks.endpoint import Endpoint, EndpointError
from dspark.benchmarks.load import align, positive
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.server_process import StartError, given_or_started

Body = dict[str, Any]

MAX_TOKENS = 512
"""Of an answer. The longest that a schema below allows need more, but only if every string is made of rare characters."""
LEAST_COMPLETE = 0.95
PLAIN: Body = {"speculation": {"mode": "off"}}


def text(longest: int) -> Body:
    return {"type": "string", "minLength": 1, "maxLength": longest}


def one_of(*options: Any) -> Body:
    return {"enum": list(options)}


def whole(low: int, high: int) -> Body:
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float, high: float) -> Body:
    return {"type": "number", "minimum": low, "maximum": high}


def several(items: Body, fewest: int, most: int) -> Body:
    return {"type": "array", "items": items, "minItems": fewest, "maxItems": most}


def thing(optional: Sequence[str] = (), **properties: Body) -> Body:
    """An object with these properties and no others, the `optional` ones of which may be missing."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


SCHEMAS: dict[str, tuple[str, Body]] = {
    "person": (
        "Invent a person",
        thing(["email"], name=text(30), age=whole(0, 120), role=one_of("admin", "editor", "reader"), email=text(40)),
    ),
    "recipe": (
        "Give a simple recipe",
        thing(
            title=text(40),
            minutes=whole(1, 240),
            ingredients=several(thing(["unit"], name=text(20), amount=number(0, 1000), unit=one_of("g", "ml")), 1, 4),
            steps=several(text(60), 1, 4),
        ),
    ),
    "review": (
        "Write a short review of a book",
        thing(
            stars=whole(1, 5), sentiment=one_of("good", "mixed", "bad"), summary=text(120), spoiler={"type": "boolean"}
        ),
    ),
    "place": (
        "Describe a city",
        thing(
            ["nickname"],
            name=text(30),
            position=thing(latitude=number(-90, 90), longitude=number(-180, 180)),
            nickname={"type": ["string", "null"], "maxLength": 30},
            languages=several(one_of("en", "fr", "de", "es", "zh", "ar"), 1, 3),
        ),
    ),
    "order": (
        "Make up an order at a hardware shop",
        thing(
            ["note"],
            number={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            lines=several(thing(article=text(25), count=whole(1, 99), price=number(0, 500)), 1, 3),
            paid={"type": "boolean"},
            note=text(60),
        ),
    ),
    "event": (
        "Plan an event for next month",
        thing(
            ["ends"],
            title=text(40),
            starts={"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$"},
            ends={"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"},
            guests=several(thing(name=text(20), comes=one_of("yes", "no", "perhaps")), 0, 4),
        ),
    ),
    "shape": (
        "Choose a geometric shape and give its measures",
        {
            "anyOf": [
                thing(kind={"const": "circle"}, radius=number(0, 100)),
                thing(kind={"const": "rectangle"}, width=number(0, 100), height=number(0, 100)),
                thing(kind={"const": "polygon"}, corners=several(several(whole(-50, 50), 2, 2), 3, 5)),
            ]
        },
    ),
    "family": (
        "Describe a small family tree",
        {
            **thing(root={"$ref": "#/$defs/person"}),
            "$defs": {
                "person": thing(["children"], name=text(20), children=several({"$ref": "#/$defs/child"}, 1, 3)),
                "child": thing(["age"], name=text(20), age=whole(0, 99)),
            },
        },
    ),
    "settings": (
        "Write the settings of a music player",
        thing(
            ["theme", "equaliser"],
            volume=whole(0, 100),
            shuffle={"type": "boolean"},
            theme=one_of("light", "dark", "system"),
            equaliser=thing(["middle"], bass=number(-12, 12), middle=number(-12, 12), treble=number(-12, 12)),
            last_played=several(text(30), 0, 3),
        ),
    ),
    "ticket": (
        "Report a software bug",
        thing(
            ["duplicate_of"],
            title=text(60),
            severity=whole(1, 4),
            labels=several(one_of("bug", "crash", "slow", "docs", "ui"), 1, 3),
            seen_on=thing(["version"], system=one_of("linux", "macos", "windows"), version=text(12)),
            duplicate_of={"type": ["integer", "null"], "minimum": 1, "maximum": 9999},
        ),
    ),
}
"""Name -> (what is asked for, its schema)."""

TOOLS: dict[str, Body] = {
    "get_weather": thing(["days"], city=text(30), unit=one_of("celsius", "fahrenheit"), days=whole(1, 14)),
    "book_flight": thing(
        ["seat"],
        origin={"type": "string", "pattern": "^[A-Z]{3}$"},
        destination={"type": "string", "pattern": "^[A-Z]{3}$"},
        passengers=several(thing(name=text(25), age=whole(0, 110)), 1, 3),
        seat=one_of("window", "aisle"),
    ),
    "send_message": thing(["urgent"], to=several(text(20), 1, 2), message=text(100), urgent={"type": "boolean"}),
}
"""Name -> schema of its arguments."""
ERRANDS = (
    "What will the weather be like in Lisbon this week?",
    "Book a flight from Oslo to Rome for my mother and me.",
    "Tell Ada and Grace that I am going to be late.",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """kind: what the table counts it under."""

    kind: str
    body: Body

    def plain(self) -> Asked:
        """The same without speculation."""
        return Asked(self.kind, self.body | PLAIN)


@dataclass(frozen=True, slots=True)
class Answer:
    """text: all that the model wrote, the calls as JSON. fault: why what claims to be complete is not valid."""

    kind: str
    finish_reason: str
    text: str
    fault: str | None
    tokens: int
    verified: int
    accepted: int

    @property
    def complete(self) -> bool:
        return self.finish_reason in ("stop", "tool_calls")


def schema_requests(count: int) -> list[Asked]:
    """Request i is of schema i modulo their number, with seed i."""
    asked = []
    for seed in range(count):
        name = list(SCHEMAS)[seed % len(SCHEMAS)]
        task, schema = SCHEMAS[name]
        structure = {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
        asked.append(Asked(name, _body(f"{task}. Answer in JSON.", seed, response_format=structure)))
    return asked


def tool_requests(count: int) -> list[Asked]:
    """By turns with any tool required and with one named."""
    tools = [{"type": "function", "function": {"name": n, "parameters": schema}} for n, schema in TOOLS.items()]
    asked = []
    for seed in range(count):
        turn = seed // 2
        named = list(TOOLS)[turn % len(TOOLS)]
        kind, choice = ("required", "required") if seed % 2 == 0 else ("named", _named(named))
        errand = ERRANDS[turn % len(ERRANDS)]
        # up to sixteen calls may be made at once
        asked.append(Asked(kind, _body(errand, seed, tools=tools, tool_choice=choice, max_tokens=3 * MAX_TOKENS)))
    return asked


def _body(content: str, seed: int, **fields: Any) -> Body:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "temperature": 1, "seed": seed, "max_tokens": MAX_TOKENS} | fields


def _named(tool: str) -> Body:
    return {"type": "function", "function": {"name": tool}}


async def ask_all(endpoint: Endpoint, asked: Sequence[Asked], concurrency: int) -> list[Answer]:
    """In the order of `asked`. Raises EndpointError when one is refused or fails."""
    slots = asyncio.Semaphore(concurrency)

    async def ask(one: Asked) -> Answer:
        async with slots:
            return read_answer(one, await endpoint.complete(**one.body))

    return await asyncio.gather(*map(ask, asked))


def read_answer(asked: Asked, answer: Body) -> Answer:
    """The parts that are judged of a chat completion."""
    choice, usage = answer["choices"][0], answer["usage"]
    message, finish_reason = choice["message"], choice["finish_reason"]
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    fault = None
    if finish_reason in ("stop", "tool_calls"):
        fault = _fault_of_calls(asked.body, functions) if "tools" in asked.body else _fault_of_text(asked, message)
    return Answer(
        asked.kind,
        finish_reason,
        json.dumps(functions) if functions else message["content"] or "",
        fault,
        usage["completion_tokens"],
        usage["speculation"]["verified"],
        usage["speculation"]["accepted"],
    )


def _fault_of_text(asked: Asked, message: Body) -> str | None:
    return _fault(message["content"] or "", SCHEMAS[asked.kind][1])


def _fault_of_calls(body: Body, functions: Sequence[Body]) -> str | None:
    choice = body["tool_choice"]
    expected = set(TOOLS) if choice == "required" else {choice["function"]["name"]}
    if not functions:
        return "no call"
    for function in functions:
        if function["name"] not in expected:
            return f"a call of {function['name']!r}"
        fault = _fault(function["arguments"], TOOLS[function["name"]])
        if fault is not None:
            return f"{function['name']}: {fault}"
    return None


def _fault(document: str, schema: Body) -> str | None:
    try:
        Draft202012Validator(schema).validate(json.loads(document))
    except (json.JSONDecodeError, ValidationError) as error:
        return f"{str(error).splitlines()[0]} in {document[:200]!r}"
    return None


def judge(schemas: Sequence[Answer], plain: Sequence[Answer], tools: Sequence[Answer]) -> list[Claim]:
    """plain: `schemas` without speculation, in the same order."""
    complete = [answer for answer in schemas if answer.complete]
    faults = [answer.fault for answer in schemas if answer.fault is not None]
    bad_calls = [a.fault or a.finish_reason for a in tools if a.fault is not None or a.finish_reason != "tool_calls"]
    same = sum(_said(a) == _said(b) for a, b in zip(schemas, plain, strict=True))
    accepted, verified = (sum(getattr(a, name) for a in schemas) for name in ("accepted", "verified"))
    return [
        Claim("answers that end parse and validate", not faults, _count(len(complete) - len(faults), complete, faults)),
        Claim(
            f"at least {LEAST_COMPLETE:.0%} end",
            len(complete) >= LEAST_COMPLETE * len(schemas),
            _count(len(complete), schemas),
        ),
        Claim("drafts are accepted under the grammar", accepted > 0, f"{accepted} of {verified} verified"),
        Claim("the text is the same without speculation", same == len(schemas), _count(same, schemas)),
        Claim("without speculation nothing is verified", not any(a.verified for a in plain), _count(0, plain)),
        Claim(
            "required and named calls are valid", not bad_calls, _count(len(tools) - len(bad_calls), tools, bad_calls)
        ),
    ]


def _said(answer: Answer) -> tuple[str, str, int]:
    return answer.text, answer.finish_reason, answer.tokens


def _count(good: int, of: Sequence[Answer], faults: Sequence[str] = ()) -> str:
    return f"{good} of {len(of)}" + "".join(f"\n          {fault}" for fault in faults[:5])


def table(answers: Sequence[Answer]) -> str:
    """One row per kind; tokens are the mean of an answer."""
    rows = [["kind", "requests", "complete", "valid", "tokens", "verified", "accepted"]]
    for kind in dict.fromkeys(answer.kind for answer in answers):
        of = [answer for answer in answers if answer.kind == kind]
        complete = [answer for answer in of if answer.complete]
        counts = [len(of), len(complete), sum(answer.fault is None for answer in complete)]
        counts += [round(sum(a.tokens for a in of) / len(of)), sum(a.verified for a in of), sum(a.accepted for a in of)]
        rows.append([kind, *map(str, counts)])
    return align(rows)


async def measure(args: argparse.Namespace, url: str) -> tuple[list[Answer], list[Answer], list[Answer]]:
    """(schemas, the same without speculation, tools)."""
    asked = schema_requests(args.requests)
    async with Endpoint(url, request_timeout_s=3600.0) as endpoint:
        schemas = await ask_all(endpoint, asked, args.concurrency)
        print(f"{len(schemas)} schema requests done", file=sys.stderr)
        plain = await ask_all(endpoint, [one.plain() for one in asked], args.concurrency)
        print("the same without speculation done", file=sys.stderr)
        tools = await ask_all(endpoint, tool_requests(args.tool_requests), args.concurrency)
    return schemas, plain, tools


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="server that runs already (default: starts `dspark serve`)")
    parser.add_argument("--requests", type=positive(int), default=300)
    parser.add_argument("--tool-requests", type=positive(int), default=60)
    parser.add_argument("--concurrency", type=positive(int), default=16)
    parser.add_argument("--threads", type=positive(int), default=1, help="of the server that is started")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every answer and the machine's facts here")
    args = parser.parse_args()
    try:
        with given_or_started(args.url, args.threads) as url:
            schemas, plain, tools = asyncio.run(measure(args, url))
    except (StartError, EndpointError) as error:
        print(f"json_schemas: {error}", file=sys.stderr)
        return 1
    machine = describe_machine()
    print(f"{machine.line()}\n\n{table([*schemas, *tools])}\n")
    if args.json:
        facts: dict[str, object] = {
            "machine": machine.as_dict(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        answers = {"schemas": schemas, "plain": plain, "tools": tools}
        facts |= {name: [asdict(one) for one in of] for name, of in answers.items()}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return print_claims(judge(schemas, plain, tools))


if __name__ == "__main__":
    raise SystemExit(main())
