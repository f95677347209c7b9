"""Prompts about a user's next item, and the order of numbered candidates that an answer gives, read strictly or not.

An answer becomes points, one number per candidate, most for the first; candidates that it does not name share the mean
of what is left, so that they tie and an answer without a number says nothing. Everything later is a comparison of
points: Borda's count over shuffles is their mean.

N answers · C candidates
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from textrec.seeding import generator

LABELS = {"title": "Item Title", "brand": "Brand", "category": "Category"}  # as in the study that prompted Mistral
NUMBER = re.compile(r"(?<![\w.])\d+(?!\w|\.\d)")
ONLY_NUMBERS = re.compile(r"\s*\d+(?:\s*[,;>\n]\s*\d+)*\s*[,.]?\s*")


def described_item(attributes: Mapping[str, str], template: bool) -> str:
    """Return the text of an item to embed: labelled values, or as the study had it, a mapping as Python writes it."""
    if not template:
        return repr(dict(attributes))
    return ", ".join(f"{LABELS.get(name, name)}: {value}" for name, value in attributes.items())


def described_history(items: Sequence[str], template: bool) -> str:
    """Return the text of a history to embed, newest item first; the template puts one line before it."""
    return ("The item sequence of the user is as follows: " if template else "") + ", ".join(items)


def listwise_prompt(history: Sequence[str], candidates: Sequence[str], wrap: str = "{}") -> str:
    """Return a prompt that asks for an order of all candidates; `history` is oldest first.

    `wrap` is what the model expects around an instruction, e.g. "[INST] {} [/INST]".
    """
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(candidates, 1))
    return wrap.replace("{}", f"""A user bought these items, the oldest first:
{_listed(history)}

Which of the following will the user buy next?
{numbered}

Order the numbers 1 to {len(candidates)} from the most to the least likely item. Answer with the numbers alone, separated by commas.
Answer:""")  # fmt: skip # noqa: E501


def pointwise_prompt(history: Sequence[str], candidate: str, wrap: str = "{}") -> str:
    """Return a prompt that asks for yes or no about one candidate."""
    return wrap.replace("{}", f"""A user bought these items, the oldest first:
{_listed(history)}

Will the user buy this item next?
- {candidate}

Answer with Yes or No.
Answer:""")  # fmt: skip


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts) or "- nothing yet"


def choices(num_candidates: int) -> tuple[str, ...]:
    """Return what a constrained answer is made of: the numbers, each with its comma, so that none begins another."""
    return tuple(f"{number}," for number in range(1, num_candidates + 1))


def shuffled_orders(num_rows: int, num_candidates: int, *seed: int | str) -> np.ndarray:
    """Return which candidate stands at which place [N, C]: an order per row, drawn at random."""
    return generator(*seed).permuted(np.tile(np.arange(num_candidates), (num_rows, 1)), axis=1)


@dataclass(frozen=True)
class Parsed:
    """The candidates (from 0) that an answer names, in its order, and what was wrong with it."""

    order: tuple[int, ...]
    strict: bool  # numbers alone, each of them once
    duplicates: int = 0
    out_of_range: int = 0
    missing: int = 0

    @property
    def kind(self) -> str:
        """Return how far it got: strict | complete (among other words) | partial | empty."""
        if self.strict:
            return "strict"
        return "empty" if not self.order else "partial" if self.missing else "complete"


def parse(answer: str, num_candidates: int) -> Parsed:
    """Read the numbers of an answer leniently: words are passed over, the first mention of a candidate counts."""
    numbers = [int(found) for found in NUMBER.findall(answer)]
    valid = [number - 1 for number in numbers if 1 <= number <= num_candidates]
    order = tuple(dict.fromkeys(valid))
    alone = ONLY_NUMBERS.fullmatch(answer) is not None and len(numbers) == len(order) == num_candidates
    duplicates, outside = len(valid) - len(order), len(numbers) - len(valid)
    return Parsed(order, alone, duplicates, outside, num_candidates - len(order))


def points(order: Sequence[int], num_candidates: int) -> np.ndarray:
    """Return points [C] of an order: C for the first, one less for each that follows, and the mean of the rest."""
    found = np.full(num_candidates, (num_candidates - len(order) + 1) / 2)
    found[list(order)] = num_candidates - np.arange(len(order))
    return found


def answer_points(parsed: Sequence[Parsed], shown_NC: np.ndarray, strict: bool = False) -> np.ndarray:
    """Return the points [N, C] of candidates, given which of them stood where; a strict reading drops other answers."""
    placed_NC = np.stack([points(() if strict and not each.strict else each.order, shown_NC.shape[1])
                          for each in parsed])  # fmt: skip
    found_NC = np.empty_like(placed_NC)
    np.put_along_axis(found_NC, shown_NC, placed_NC, axis=1)
    return found_NC


def counters(parsed: Sequence[Parsed]) -> dict[str, float]:
    """Return shares of answers: by how far they got, and with a number twice or a number of no candidate."""
    kinds = {kind: float(np.mean([each.kind == kind for each in parsed]))
             for kind in ("strict", "complete", "partial", "empty")}  # fmt: skip
    faults = {"duplicates": [each.duplicates > 0 for each in parsed],
              "out_of_range": [each.out_of_range > 0 for each in parsed]}  # fmt: skip
    return kinds | {name: float(np.mean(found)) for name, found in faults.items()}


def first_places(parsed: Sequence[Parsed], num_candidates: int) -> np.ndarray:
    """Return how often the item at each place [C] was named first: with shuffled candidates, flat without a bias."""
    return np.bincount([each.order[0] for each in parsed if each.order], minlength=num_candidates)


def position_bias(parsed: Sequence[Parsed], num_candidates: int) -> float:
    """Return the mean correlation of early places and early mentions: 1 copies the order shown, 0 does not heed it."""
    places_C = -np.arange(num_candidates)
    told = [points(each.order, num_candidates) for each in parsed if each.order]
    return float(np.mean([np.corrcoef(places_C, each)[0, 1] for each in told])) if told and num_candidates > 1 else 0.0


def leaked(prompt: str, target: str, shown: Iterable[str]) -> bool:
    """Return whether the target's text stands in a prompt more often than the items that may be shown account for."""
    return bool(target) and prompt.count(target) > sum(text.count(target) for text in shown)
