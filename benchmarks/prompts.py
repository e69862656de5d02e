"""Built-in chat prompts for load tests: sixty requests of the kinds that people send.

The kinds matter for speculation: code, arithmetic and rewriting are easy to draft, stories and dialogue are hard.
Requests about a given text repeat it in the answer, which is where n-gram lookup earns its keep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message. `kind` groups results."""

    kind: str
    text: str


INSTRUCTIONS = (
    "Explain to a ten-year-old why the sky is blue but sunsets are red.",
    "Give me a step-by-step plan to repot a houseplant that has outgrown its pot.",
    "What should I check before buying a used bicycle? Answer as a numbered list.",
    "Describe how a refrigerator keeps food cold, in plain words.",
    "List five ways to save water at home and say how much each one helps.",
    "How do I remove a red wine stain from a cotton shirt?",
    "Explain the difference between weather and climate with one example for each.",
    "Write a packing list for a three-day hike in cool and rainy weather.",
    "What happens to a letter between the mailbox and the door of the person it is sent to?",
    "Teach me how to tie a bowline knot using only words.",
)

DIALOGUE = (
    "Hi! I have just moved to a new city and I do not know anyone here. Any ideas how to meet people?",
    "My manager wants me to present on Monday and I hate speaking in public. Can you help me feel better about it?",
    "Let's play a game: you are a shopkeeper who sells only impossible things, and I have just walked in.",
    "I can't decide between adopting a cat or a dog. Ask me three questions and then give your opinion.",
    "You are a patient librarian. I am looking for a book, but I only remember that its cover was green.",
    "I argued with my best friend about money and I think I was wrong. What could I say to her?",
    "Pretend to be a pirate who has become an accountant. How was your day?",
    "I am bored on a long train ride. Keep me company for a while and start with a riddle.",
)

ARITHMETIC = (
    "What is 17 times 24? Show each step of the multiplication.",
    "A train leaves at 09:40 and arrives at 13:05. How long is the journey? Explain.",
    "Write the multiplication table of 7 from 7 x 1 to 7 x 12, one line each.",
    "Count from 1 to 40 and put the word fizz in place of every multiple of 3.",
    "I buy 3 notebooks at 2.40 each and 5 pens at 0.85 each and pay with a 20. How much change do I get?",
    "List the first fifteen square numbers together with the difference to the one before.",
    "A recipe for 4 people needs 300 g of flour, 2 eggs and 150 ml of milk. What is needed for 10 people?",
    "Convert 5 feet 11 inches to centimetres and show the calculation.",
    "What are all the divisors of 360? Find them in pairs.",
    "If a plant grows 1.5 cm per day and is 12 cm tall now, write its height for each of the next ten days.",
)

CODE = (
    "Write a Python function that checks whether a string is a palindrome, ignoring spaces and capital letters.",
    "Write a Python class for a bank account with deposit, withdraw and balance, and raise errors for bad amounts.",
    "Show me how to read a CSV file in Python and print the average of the column named price.",
    "Write an SQL query that lists the ten customers with the highest total order value in 2023.",
    "Write a C function that reverses a linked list and explain it line by line.",
    "Write a bash script that renames every .jpeg file in a folder to .jpg.",
    "Write a JSON document that describes three books with title, author, year and a list of tags.",
    "Turn this loop into a list comprehension:\n"
    "result = []\nfor number in numbers:\n    if number % 2 == 0:\n        result.append(number * number)",
    "Write an HTML page with a heading, a table of three fruits and their colours, and a footer.",
    "Find the mistake and write the corrected function:\n"
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "        return total / len(values)",
    "Write unit tests with pytest for a function add(a, b) that adds two numbers.",
    "Write a JavaScript function that groups an array of objects by the value of one of their keys.",
)

STORIES = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle addressed to him.",
    "Write a poem of four stanzas about the first snow of the winter.",
    "Tell me a fairy tale in which the dragon is afraid of the knight.",
    "Begin a detective story set in a bakery at four in the morning.",
    "Describe a market on the moon, with its smells, sounds and customers.",
    "Write a letter from a retired robot to the children it used to look after.",
    "Write a scene in which two strangers share an umbrella and neither of them says where they are going.",
    "Invent a myth that explains why cats land on their feet.",
)

_MEETING = (
    "Minutes of the allotment society, 4 May. Present: Mrs Adeyemi (chair), Mr Lund, Ms Okafor, Mr Brandt, Mrs "
    "Silva. The chair opened the meeting at 18:30. Mr Lund reported that the water pump by the south gate had "
    "failed again and that a new pump would cost 480. Ms Okafor proposed to rent a pump until September for 35 a "
    "month. The proposal was accepted with four votes to one. Mr Brandt reminded everyone that the compost heap "
    "must not take cooked food. Mrs Silva will organise the summer fair on 21 June and needs six helpers. Mr Lund "
    "and Ms Okafor offered to help. The next meeting is on 1 June at 18:30. The chair closed the meeting at "
    "19:45."
)

_PRODUCT = (
    "The Fernhill 20 is a cordless kettle made of brushed steel. It holds 1.7 litres and boils a full load in "
    "four minutes. The handle stays cool, the lid opens with one hand, and the base can be turned all the way "
    "round. A filter in the spout holds back limescale and can be washed in the dishwasher. The Fernhill 20 "
    "switches itself off when the water boils or when the kettle is empty. It is 24 cm high, weighs 1.1 kg and "
    "comes with a guarantee of three years. Spare filters can be ordered under the number FH-20-F."
)

_EMAIL = (
    "Dear Mr Tanaka, thank you for your order number 88213 of 14 March. Two of the four oak chairs (article "
    "C-410) are ready and will leave our workshop on 28 March. The other two chairs need a new seat because the "
    "leather that we received was scratched; they will follow on 9 April. The dining table (article T-77) is in "
    "stock. Would you like us to send the table with the first two chairs, or everything together on 9 April? "
    "Delivery is free in both cases. Please call us on 555 0142 or answer this message. Kind regards, Ines "
    "Moreau, Moreau Furniture"
)

_ARTICLE = (
    "The river Arl used to flood the lower town every few years. After the flood of 1998 the council bought the "
    "meadows upstream and let the river spread into them whenever its level rose by more than two metres. The "
    "first years were disappointing: the meadows filled too slowly, and cellars in Mill Street still ran full of "
    "water in 2003. Engineers then lowered the bank in three places. Since then the meadows have taken the water "
    "of eleven high tides and no cellar has flooded. Birds that had left the valley have come back: in 2019 "
    "volunteers counted forty pairs of lapwings, the highest number since counting began. Farmers still cut the "
    "grass once a year, in late August, and are paid for the hay that they lose when the water comes early."
)

_LOG = (
    "08:01:12 INFO gateway started on port 8443\n08:01:15 INFO connected to database orders\n"
    "08:03:47 WARN slow query on orders took 2140 ms\n08:04:02 ERROR payment service did not answer in 5000 ms\n"
    "08:04:07 INFO retrying payment service\n08:04:08 INFO payment service answered in 310 ms\n"
    "08:09:33 WARN slow query on customers took 1875 ms\n08:12:20 ERROR disk /var/data is 91 percent full\n"
    "08:12:21 INFO deleted 214 temporary files\n08:12:22 INFO disk /var/data is 64 percent full"
)

SUMMARIES = (
    f"Summarise these minutes in three sentences.\n\n{_MEETING}",
    f"Summarise this article in two sentences for a newspaper's front page.\n\n{_ARTICLE}",
    f"Write a headline and a one-sentence summary for this product text.\n\n{_PRODUCT}",
    f"Summarise this e-mail: what does the customer have to decide?\n\n{_EMAIL}",
    f"Explain in a few sentences what went wrong in this log and whether it was repaired.\n\n{_LOG}",
    f"List what was decided and who does what.\n\n{_MEETING}",
)

EXTRACTION = (
    f"Copy every line with the word WARN or ERROR from this log, unchanged.\n\n{_LOG}",
    f"Extract height, weight, capacity and guarantee of the kettle as JSON.\n\n{_PRODUCT}",
    f"Rewrite this e-mail so that it sounds friendlier. Keep all facts and numbers.\n\n{_EMAIL}",
    f"List all dates in this e-mail and what happens on each of them.\n\n{_EMAIL}",
    f"Repeat this article, but replace every number by its value in words.\n\n{_ARTICLE}",
    f"Correct nothing and change nothing: repeat the following text with one sentence on each line.\n\n{_PRODUCT}",
)

BUILT_IN: tuple[Prompt, ...] = tuple(
    Prompt(kind, text)
    for kind, texts in (
        ("instruction", INSTRUCTIONS),
        ("dialogue", DIALOGUE),
        ("arithmetic", ARITHMETIC),
        ("code", CODE),
        ("story", STORIES),
        ("summary", SUMMARIES),
        ("extraction", EXTRACTION),
    )
    for text in texts
)
"""Grouped by kind; `mixed` gives an order in which every stretch holds all kinds."""


def mixed(prompts: Sequence[Prompt] = BUILT_IN) -> list[Prompt]:
    """The same prompts, interleaved by kind, so that the first few already resemble the whole set."""
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.kind, []).append(prompt)
    # position of each prompt within its kind, as a fraction: a sort by it spreads every kind evenly
    spread = [((i + 0.5) / len(group), prompt) for group in kinds.values() for i, prompt in enumerate(group)]
    return [prompt for _, prompt in sorted(spread, key=lambda pair: pair[0])]


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line. `.jsonl`: a string, or an object with `prompt` and optionally `kind`; else plain text.

    Raises ValueError naming the line that cannot be read, OSError when the file cannot be opened.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line) if path.suffix == ".jsonl" else line
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        fields = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
            raise ValueError(f'{path}:{number} must be a string or an object with a string "prompt", got {line[:60]!r}')
        prompts.append(Prompt(str(fields.get("kind", "file")), fields["prompt"]))
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one on each line")
    return prompts
