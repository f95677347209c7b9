"""The rows of a language model that is asked: its vectors by cosine, and its orders of candidates of a first stage.

Each user of a seeded sample gets C unseen items from a scorer that knows the training part alone; the language model
orders them. A target that was not retrieved is a miss, at the worst rank; in the forced rows, which say so, it takes
the last candidate's place. Answers are kept by `Generations`, so that rows are scored anew without the model.

U sampled users · C candidates of each · S shuffles
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from textrec.data.choices import closest
from textrec.data.generations import Generations
from textrec.data.item_text import item_attributes, item_texts
from textrec.data.prepared import PreparedSet
from textrec.data.vectors import text_vectors
from textrec.evaluation import controls
from textrec.evaluation.ranking import Counts, Ranks, Scorer, VectorScorer, rank_targets, top_k
from textrec.models import listwise_prompt as prompting
from textrec.models.language_backends import Decoding, LanguageModel, Unsupported
from textrec.paths import ROOT
from textrec.schema import InputError
from textrec.seeding import derive_seed, generator
from textrec.training.rows import RowResult, cached_row

_CODE = [ROOT / "textrec" / name for name in (
    "data/histories.py", "data/item_text.py", "evaluation/controls.py", "evaluation/metrics.py",
    "evaluation/ranking.py", "models/language_backends.py", "models/language_servers.py", "models/listwise_prompt.py",
    "seeding.py", "training/prompt_rows.py",
)]  # fmt: skip
MAX_EMBEDDED_ITEMS = 50


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is asked of whom, and how an answer is chosen."""

    users: int = 500  # sampled of those with a test target; fewer where there are fewer
    candidates: int = 20  # per user
    first_stage: str = "markov"  # markov | last_item | popularity
    history: int = 10  # newest items in a prompt
    characters: int = 100  # of an item's text in a prompt
    wrap: str = "{}"  # what the model expects around an instruction
    max_new_tokens: int = 96
    temperature: float = 0.0
    shuffles: int = 3  # of the self-consistent row
    label: str = ""  # e.g. plumbing: put before what every asked row changes

    def __post_init__(self) -> None:
        if self.first_stage not in ("markov", "last_item", "popularity"):
            raise InputError(f"first_stage is {self.first_stage!r}; expected markov, last_item or popularity")
        least = {"users": 1, "candidates": 2, "history": 1, "characters": 1, "shuffles": 1}
        if small := [name for name, number in least.items() if getattr(self, name) < number]:
            raise InputError(f"{small[0]} is {getattr(self, small[0])}; expected at least {least[small[0]]}")
        if "{}" not in self.wrap:
            raise InputError(f"wrap is {self.wrap!r}; expected a text with {{}}, where the prompt goes")


@dataclass(frozen=True)
class PromptRow:
    """What a row is, and the one thing in which it differs from `listwise`, or from `embedding_no_template`."""

    changed: str
    asked: str = "list"  # list | each | vectors | nobody
    forced: bool = False  # the target is put among the candidates
    shuffled: bool = False  # else the first stage's order is shown
    strict: bool = False
    constrained: bool = False
    consistent: bool = False
    template: bool = False


PROMPT_ROWS = {
    "first_stage": PromptRow("reference: the first stage's own order", asked="nobody"),
    "chance": PromptRow("any order of the candidates", asked="nobody", shuffled=True),
    "chance_forced": PromptRow("forced target: any order", asked="nobody", shuffled=True, forced=True),
    "listwise": PromptRow("the language model orders them"),
    "listwise_strict": PromptRow("answers that are no order of all say nothing", strict=True),
    "listwise_shuffled": PromptRow("candidates shown in random order", shuffled=True),
    "listwise_constrained": PromptRow("only numbers not yet given can be said", constrained=True),
    "listwise_consistent": PromptRow("Borda's count over random orders", shuffled=True, consistent=True),
    "listwise_forced": PromptRow("forced target, random order", shuffled=True, forced=True),
    "pointwise": PromptRow("yes or no to each candidate, by log-likelihood", asked="each"),
    "embedding_no_template": PromptRow("last token's vector, all items by cosine", asked="vectors"),
    "embedding_template": PromptRow("its text in a template", asked="vectors", template=True),
}


class Prompting:
    """One prepared set, language model, configuration and seed: who is asked what, and what the answers say."""

    def __init__(
        self, prepared: PreparedSet, model: LanguageModel, config: PromptConfig, *, seed: int, generations: Path,
        vectors: Path, scorer: Scorer | None = None,
    ):  # fmt: skip
        """`scorer`, of the rows of `users_U`, takes the place of the first stage; vectors and answers are kept."""
        self.prepared, self.model, self.config, self.seed = prepared, model, config, seed
        self.generations, self.vectors, self.scorer = Generations(generations), vectors, scorer
        users_U, ends_U = prepared.split.targets("test")
        source, number = generator(seed, "prompted users"), min(config.users, len(users_U))
        rows_U = np.sort(source.choice(len(users_U), number, replace=False))
        self.users_U, self.ends_U = users_U[rows_U], ends_U[rows_U]
        self.targets_U = prepared.histories.at(self.users_U, self.ends_U)
        attributes = item_attributes(prepared.catalogue)
        self.attributes = attributes.to_dict("records")
        self.texts = [text[: config.characters] for text in item_texts(attributes)]  # item i is text i - 1

    def seen(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return self.prepared.histories.prefixes(self.users_U[rows], self.ends_U[rows])

    @cached_property
    def candidates_UC(self) -> np.ndarray:
        """Return what the first stage retrieves, best first; it never sees a target."""
        histories, num_items = self.prepared.histories, self.prepared.num_items
        training = histories.items_E, histories.offsets_U1, self.prepared.split.train_end_U
        last_items_U = np.where(self.ends_U > 0, histories.at(self.users_U, np.maximum(self.ends_U - 1, 0)), 0)
        told = () if self.config.first_stage == "popularity" else (last_items_U,)
        scorer = self.scorer or getattr(controls, self.config.first_stage)(*training, *told, num_items=num_items)
        found_UC = top_k(scorer, self.users_U, self.seen, self.config.candidates, num_items=num_items)
        if not found_UC.all():
            raise InputError(f"candidates={self.config.candidates}: expected at most the unseen items of every user")
        return found_UC

    def lists(self, row: str) -> np.ndarray:
        """Return the candidates [U, C] of a row; with `forced`, a missing target takes the last place."""
        lists_UC = self.candidates_UC.copy()
        if PROMPT_ROWS[row].forced:
            missed_U = ~(lists_UC == self.targets_U[:, None]).any(1)
            lists_UC[missed_U, -1] = self.targets_U[missed_U]
        return lists_UC

    def shown(self, row: str, shuffle: int = 0) -> np.ndarray:
        """Return which candidate stands at which place of a row's prompts [U, C]."""
        shape = len(self.users_U), self.config.candidates
        if not PROMPT_ROWS[row].shuffled:
            return np.tile(np.arange(shape[1]), (shape[0], 1))
        return prompting.shuffled_orders(*shape, self.seed, "shown candidates", shuffle)

    @cached_property
    def histories(self) -> list[list[str]]:
        items_UL, _, lengths_U = self.prepared.histories.windows(self.users_U, self.ends_U, self.config.history)
        return [[self.texts[item - 1] for item in row[:n]] for row, n in zip(items_UL, lengths_U, strict=True)]

    def prompts(self, row: str, shuffle: int = 0) -> list[str]:
        """Return the listwise prompts of a row, one per user."""
        placed_UC = np.take_along_axis(self.lists(row), self.shown(row, shuffle), axis=1)
        return [prompting.listwise_prompt(history, [self.texts[item - 1] for item in items], self.config.wrap)
                for history, items in zip(self.histories, placed_UC, strict=True)]  # fmt: skip

    def answers(self, row: str, shuffle: int = 0, *, replay: int = 0, temperature: float | None = None) -> list[str]:
        """Return the model's answers to the prompts of a row; those on disk are not asked for again."""
        config = self.config
        decoding = Decoding(
            config.max_new_tokens, config.temperature if temperature is None else temperature, self.seed, replay,
            prompting.choices(config.candidates) if PROMPT_ROWS[row].constrained else (),
        )  # fmt: skip
        kept = {"model": self.model.identity, "decoding": asdict(decoding)}
        return self.generations.answers(
            self.prompts(row, shuffle), lambda prompts: self.model.generate(prompts, decoding), **kept
        )

    def parsed(self, row: str, shuffle: int = 0, **asked) -> list[prompting.Parsed]:
        return [prompting.parse(answer, self.config.candidates) for answer in self.answers(row, shuffle, **asked)]

    def points(self, row: str) -> np.ndarray:
        """Return the points [U, C] that a row gives to its candidates."""
        preset, shape = PROMPT_ROWS[row], self.candidates_UC.shape
        if preset.asked == "nobody":
            return np.zeros(shape) if preset.shuffled else -np.tile(np.arange(shape[1]), (shape[0], 1))
        if preset.asked == "each":
            return self._yes_over_no(row)
        shuffles = range(self.config.shuffles if preset.consistent else 1)
        told = [prompting.answer_points(self.parsed(row, s), self.shown(row, s), preset.strict) for s in shuffles]
        return np.mean(told, axis=0)

    def _yes_over_no(self, row: str) -> np.ndarray:
        lists_UC, wrap = self.lists(row), self.config.wrap
        asked = [prompting.pointwise_prompt(history, self.texts[item - 1], wrap)
                 for history, items in zip(self.histories, lists_UC, strict=True) for item in items]  # fmt: skip
        pairs = [[prompt, answer] for prompt in asked for answer in (" Yes", " No")]
        told = self.generations.answers(
            pairs, lambda part: self.model.log_likelihood(*zip(*part, strict=True)).tolist(),
            model=self.model.identity, decoding={"log_likelihood": True}, chunk=512,
        )  # fmt: skip
        yes_no_N2 = np.array(told).reshape(-1, 2)
        return (yes_no_N2[:, 0] - yes_no_N2[:, 1]).reshape(lists_UC.shape)

    def leaks(self, row: str) -> int:
        """Count prompts with the target's text in a place that neither history, first stage nor template explains."""
        found = zip(self.prompts(row), self.targets_U, self.histories, self.candidates_UC, strict=True)
        return sum(
            prompting.leaked(prompt, self.texts[target - 1], [
                prompting.listwise_prompt([""] * len(history), [""] * len(items), self.config.wrap),
                *history, *(self.texts[item - 1] for item in items),
            ]) for prompt, target, history, items in found
        )  # fmt: skip

    def report(self, row: str) -> dict[str, float]:
        """Return the counters of a listwise row's answers, its bias towards early places and its leaks."""
        parsed = self.parsed(row)
        bias = {"position_bias": prompting.position_bias(parsed, self.config.candidates)}
        return prompting.counters(parsed) | bias | {"leaks": self.leaks(row)}

    def agreement(self, row: str, replays: int, temperature: float | None = None) -> dict[str, float]:
        """Return the shares of prompts to which all replays gave the same text, order, and first item."""
        told = [self.answers(row, replay=replay, temperature=temperature) for replay in range(replays)]
        orders = [[prompting.parse(answer, self.config.candidates).order for answer in one] for one in told]
        firsts = [[order[:1] for order in one] for one in orders]
        return {name: float(np.mean([len(set(same)) == 1 for same in zip(*each, strict=True)]))
                for name, each in (("text", told), ("order", orders), ("first item", firsts))}  # fmt: skip

    def ranks(self, row: str) -> Ranks:
        """Rank the targets: full catalogue for vectors, else within the candidates, and worst where not among them."""
        if PROMPT_ROWS[row].asked == "vectors":
            return self._ranks_by_vectors(PROMPT_ROWS[row].template)
        lists_UC, points_UC = self.lists(row), self.points(row)
        target_UC = lists_UC == self.targets_U[:, None]
        own_U1 = (points_UC * target_UC).sum(1, keepdims=True)
        items_E, offsets_U1 = self.seen(slice(None))
        pairs = np.repeat(np.arange(len(self.users_U)), np.diff(offsets_U1)), items_E
        seen_U = np.bincount(np.unique(np.stack(pairs)[:, items_E != self.targets_U[pairs[0]]], axis=1)[0],
                             minlength=len(self.users_U))  # fmt: skip
        everything_U = np.full(len(self.users_U), self.prepared.num_items)
        counts, retrieved_U = [], target_UC.any(1)
        for candidates_U in (everything_U - seen_U, everything_U):
            higher_U = np.where(retrieved_U, (points_UC > own_U1).sum(1), candidates_U - 1)
            ties_U = np.where(retrieved_U, ((points_UC == own_U1) & ~target_UC).sum(1), 0)
            counts.append(Counts(higher_U, ties_U, candidates_U))
        return Ranks(self.users_U, self.targets_U, *counts)

    def _ranks_by_vectors(self, template: bool) -> Ranks:
        texts = [prompting.described_item(each, template) for each in self.attributes]
        items_UL, _, lengths_U = self.prepared.histories.windows(self.users_U, self.ends_U, MAX_EMBEDDED_ITEMS)
        read = [prompting.described_history([texts[item - 1] for item in row[:n][::-1]], template)
                for row, n in zip(items_UL, lengths_U, strict=True)]  # fmt: skip
        how = {"folder": self.vectors, "encoder": self.model.identity, "pooling": "last token",
               "max_tokens": self.model.max_tokens}  # fmt: skip
        items_ID, users_UD = (F.normalize(torch.from_numpy(np.asarray(text_vectors(each, self.model.embed, **how))))
                              for each in (texts, read))  # fmt: skip
        scorer = VectorScorer(lambda rows: users_UD[rows], items_ID)
        return rank_targets(scorer, self.users_U, self.targets_U, self.seen, num_items=self.prepared.num_items)


def run_prompt_rows(
    rows: Sequence[str], asked: Prompting, *, run_dir: Path, skipped: Mapping[str, str] | None = None
) -> list[RowResult]:
    """Run the named rows of `PROMPT_ROWS`; finished ones are read back, a broken one is a result with its reason.

    `skipped` maps a row that is not to be run to the reason; what the model's backend cannot do is not attempted
    either. Raises `InputError` for an unknown row, for an endpoint that is down and for an answer a recording lacks.
    """
    skipped, results = skipped or {}, []
    for row in (*rows, *skipped):
        if row not in PROMPT_ROWS or row not in rows:
            raise InputError(
                f"row {row!r} is unknown{closest(row, PROMPT_ROWS)}; expected one of {sorted(PROMPT_ROWS)}"
            )
    for row in rows:
        preset = PROMPT_ROWS[row]
        changed = f"{asked.config.label}: " * bool(asked.config.label and preset.asked != "nobody") + preset.changed
        model = {"model": asked.model.identity, "max_tokens": asked.model.max_tokens}
        parameters = json.loads(json.dumps(model | asdict(preset) | asdict(asked.config)))
        if row in skipped:
            results.append(RowResult(row, changed, parameters, "not_attempted", skipped[row]))
            continue
        key: dict[str, Any] = {"fingerprint": asked.prepared.fingerprint, "seed": asked.seed}
        if preset.asked != "vectors":
            key["candidates"] = derive_seed(asked.candidates_UC.tobytes().hex())
        place, run = Path(run_dir) / "rows" / row, partial(_ranked, asked, row)
        try:
            results.append(cached_row(row, changed, parameters, key, place, _CODE, run))
        except Unsupported as error:
            results.append(RowResult(row, changed, parameters, "not_attempted", str(error)))
    return results


def _ranked(asked: Prompting, row: str) -> tuple[Ranks, list, tuple]:
    return asked.ranks(row), [], (0, 0.0)
