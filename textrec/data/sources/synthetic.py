"""Interactions with planted order, text and time signals, and what the best possible reader scores on them.

Every next item is drawn from a known mixture over the items (with `repeats=False`: over those the user has not had):

    order_strength  the successor of the last item (order 2: of the last two items)
    text_strength   a uniform item of the last item's cluster; brand, title and category tell the cluster
    time_strength   a uniform item of the group that belongs to the bucket of an elapsed time
    the rest        a uniform item

Cold items are nobody's history: with probability `cold_share` a test target is one of them, of the last item's cluster
in the proportion text : text + rest, else any. So the true p(next | history, text, time) is known, and `optimum` is an
exact enumeration over it for the users at hand, not a simulation. The unlearnable twin draws uniformly from the items
the user has not had: no reader can beat `recall@k = k / candidates` with seen items filtered.

Shapes: U users · I items (column j is item j + 1) · L longest history · E interactions · K rows of the successor table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from textrec.data.sources import Tables
from textrec.schema import InputError
from textrec.seeding import generator

KS = (1, 5, 10, 20, 50, 100)
FIRST_TIME = 1_420_070_400  # 2015-01-01
ENUMERATION_CELLS = 2**22  # comparisons held at once while ranks are counted
ADJECTIVES = tuple('amber|small|foldable|crème|matte|12-inch|"classic"|heavy, lined|soft & light|plain'.split("|"))
THEMES = {  # category: nouns; a cluster is a brand within one theme
    "Coffee & Tea": ("kettle", "grinder", "espresso cup", "filter", "teapot", "milk frother"),
    "Camping": ("tent", "sleeping bag", "lantern", "stove", "rope", "hammock"),
    "Garden": ("spade", "hose", "seed tray", "rake", "watering can", "trellis"),
    "Music": ("guitar strings", "violin bow", "drum sticks", "tuner", "reed", "music stand"),
    "Laboratory": ("beaker", "pipette", "microscope slide", "burette", "petri dish", "centrifuge tube"),
    "Games": ("puzzle", "dice set", "racing wheel", "strategy game", "card deck", "joystick"),
    "Bicycles": ("saddle", "chain", "pedal", "inner tube", "handlebar", "helmet"),
    "Stationery": ("notebook", "fountain pen", "ink", "stapler", "ruler", "envelope"),
}


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The knobs of the generator; the strengths are shares of one mixture."""

    num_users: int = 200
    num_items: int = 60  # cold items included
    num_cold_items: int = 6  # nobody's history, only test targets; spread evenly over the clusters
    num_clusters: int = 6
    min_length: int = 8  # interactions of a user, test target included
    max_length: int = 20
    order: int = 1  # 1: the last item decides, 2: the last two
    order_strength: float = 0.5
    text_strength: float = 0.25
    time_strength: float = 0.15
    time_gap: str = "history"  # history: time between the last two known items | target: time since the last one
    num_time_buckets: int = 4
    cold_share: float = 0.15  # of the test targets
    repeats: bool = False  # may an item come twice in one history
    unlearnable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        strengths = (self.order_strength, self.text_strength, self.time_strength, self.cold_share)
        warm = self.num_items - self.num_cold_items
        lengths, cold = f"{self.min_length}..{self.max_length}", self.num_cold_items
        checks = (
            (min(strengths) >= 0 and sum(strengths[:3]) <= 1 + 1e-9,
             f"strengths {strengths} must not be negative, the first three not above 1 in sum"),
            (self.order in (1, 2), f"order={self.order} must be 1 or 2"),
            (self.time_gap in ("history", "target"), f"time_gap={self.time_gap!r} must be 'history' or 'target'"),
            (3 <= self.min_length <= self.max_length, f"lengths {lengths} must not fall and be at least 3"),
            (self.repeats or self.max_length < warm,
             f"max_length={self.max_length} leaves nothing new among {warm} warm items: set repeats or more items"),
            (self.num_clusters <= min(warm, cold or warm),
             f"num_clusters={self.num_clusters} must not exceed the {warm} warm items, nor {cold} cold items where "
             "there are any"),
        )  # fmt: skip
        for holds, message in checks:
            if not holds:
                raise InputError(f"the synthetic set cannot be made: {message}")


class Level(NamedTuple):
    """An expected metric, and the standard error of its mean over one draw of these users' targets (ties broken)."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Truth:
    """What was planted: the parameters of the true conditional distribution."""

    cluster_I: np.ndarray
    cold_I: np.ndarray
    time_group_I: np.ndarray
    successor_KI: np.ndarray  # order 1: one row; order 2: row k holds the successors of items that item k precedes


@dataclass(frozen=True)
class State:
    """All that the next item may depend on, for some users."""

    last_U: np.ndarray
    before_U: np.ndarray
    bucket_U: np.ndarray
    seen_UI: np.ndarray


@dataclass(frozen=True)
class SyntheticSet:
    """Generated histories with their truth. Item ids are 1..num_items, users 0..num_users - 1, oldest first."""

    config: SyntheticConfig
    truth: Truth
    items_E: np.ndarray
    times_E: np.ndarray
    offsets_U1: np.ndarray
    probabilities_UI: np.ndarray  # the true p(test target | history)
    state: State  # before the test target

    def interactions(self):
        """Return the canonical table as a pandas frame: user, item (text ids "1", "2", ...), time, row, rating."""
        import pandas

        users_E = np.repeat(np.arange(self.config.num_users), np.diff(self.offsets_U1))
        rating_E = generator(self.config.seed, "synthetic", "ratings").integers(1, 6, len(users_E))
        columns = {"user": (users_E + 1).astype(str), "item": self.items_E.astype(str), "time": self.times_E}
        return pandas.DataFrame({**columns, "row": np.arange(len(users_E)), "rating": rating_E.astype(float)})

    def items(self):
        """Return the item table as a pandas frame: item, title, brand, category (a list), description."""
        import pandas

        texts = _item_texts(self.truth, generator(self.config.seed, "synthetic", "texts"))
        return pandas.DataFrame(texts, columns=["item", "title", "brand", "category", "description"])

    @cached_property
    def optimum(self) -> dict[str, dict[str, dict[str, Level]]]:
        """Return the `Level` of the best readers: `optimum["id"]["filtered"]["ndcg@10"]` and so on.

        Readers: `full` knows all; `text_blind` cannot tell cold items apart; `time_blind` does not see times; `id` is
        time-blind and ranks cold items last, all that an ID model can learn; `chance` scores everything alike.
        Rankings: `kept` (all candidates), `filtered` (seen items removed, the target never), `cold` (filtered, given
        that the target is cold). All `num_items` are candidates: compare with a set prepared with `catalogue="all"`,
        which keeps the items that nobody has. Score ties count with their expected rank. The best order for `filtered`
        is exact where no item repeats; with repeats it is the level of scoring by the true probability.
        """
        full_UI, cold_I = self.probabilities_UI, self.truth.cold_I
        buckets = range(self.config.num_time_buckets)
        blind_states = (replace(self.state, bucket_U=np.full(self.config.num_users, bucket)) for bucket in buckets)
        time_blind_UI = sum(test_probabilities(self.config, self.truth, state) for state in blind_states) / len(buckets)
        text_blind_UI = full_UI.copy()
        text_blind_UI[:, cold_I] = full_UI[:, cold_I].mean(axis=1, keepdims=True) if cold_I.any() else 0
        readers = {"full": full_UI, "text_blind": text_blind_UI, "time_blind": time_blind_UI}
        readers |= {"id": np.where(cold_I, 0, time_blind_UI), "chance": np.zeros_like(full_UI)}
        return {name: self.levels(scores_UI) for name, scores_UI in readers.items()}

    def levels(self, scores_UI: np.ndarray) -> dict[str, dict[str, Level]]:
        """Return what any scores [U, I] are worth under the truth, by ranking: free of the luck of the draw."""
        seen_UI, cold_I = self.state.seen_UI, self.truth.cold_I
        anything = np.ones_like(cold_I)
        rankings = {"kept": (np.zeros_like(seen_UI), anything), "filtered": (seen_UI, anything)}
        if self.probabilities_UI[:, cold_I].any():
            rankings["cold"] = (seen_UI, cold_I)
        return {name: expected_metrics(self.probabilities_UI, scores_UI, *of) for name, of in rankings.items()}


def read(connection, files: Mapping[str, Path], **options) -> Tables:
    """Generate the set of `SyntheticConfig(**options)`; it reads no files."""
    made = generate(SyntheticConfig(**options))
    connection.register("synthetic_interactions", made.interactions())
    connection.register("synthetic_items", made.items())
    interactions = "SELECT user, item, time, rating FROM synthetic_interactions"
    return Tables(interactions=interactions, items="SELECT * FROM synthetic_items")


def generate(config: SyntheticConfig) -> SyntheticSet:
    """Draw the histories of all users; the same `config` gives the same arrays everywhere."""
    truth = _plant(config, generator(config.seed, "synthetic", "truth"))
    random = generator(config.seed, "synthetic", "histories")
    users_U = np.arange(config.num_users)
    lengths_U = random.integers(config.min_length, config.max_length + 1, config.num_users)
    buckets_UL = random.integers(config.num_time_buckets, size=(config.num_users, config.max_length))
    gaps_UL = (60 * 4.0**buckets_UL * (1 + random.random(buckets_UL.shape))).astype(np.int64)
    starts_U = FIRST_TIME + random.integers(0, 365 * 86_400, config.num_users)
    times_UL = starts_U[:, None] + gaps_UL.cumsum(axis=1)

    items_UL = np.zeros((config.num_users, config.max_length), dtype=np.int32)
    seen_UI = np.zeros((config.num_users, config.num_items), dtype=bool)
    items_UL[:, 0] = random.choice(np.flatnonzero(~truth.cold_I), config.num_users)
    targets_at = lengths_U - 1
    for step in range(1, config.max_length):
        growing = step <= targets_at  # the item of step - 1 belongs to the history, not to the target
        seen_UI[users_U[growing], items_UL[growing, step - 1]] = True
        state = _state(config, items_UL, buckets_UL, np.full(config.num_users, step), seen_UI)
        items_UL[:, step] = _draw(next_probabilities(config, truth, state), random)
    state = _state(config, items_UL, buckets_UL, targets_at, seen_UI)
    probabilities_UI = test_probabilities(config, truth, state)
    items_UL[users_U, targets_at] = _draw(probabilities_UI, random)

    real_UL = np.arange(config.max_length) < lengths_U[:, None]
    offsets_U1 = np.concatenate([[0], lengths_U.cumsum()])
    return SyntheticSet(config, truth, items_UL[real_UL] + 1, times_UL[real_UL], offsets_U1, probabilities_UI, state)


def next_probabilities(config: SyntheticConfig, truth: Truth, state: State) -> np.ndarray:
    """Return the true distribution [U, I] of the next item of a history; cold items have none of it."""
    warm_I = ~truth.cold_I
    planted_UI = np.tile(warm_I / warm_I.sum(), (len(state.last_U), 1))
    if not config.unlearnable:
        same_cluster_UI = (truth.cluster_I[state.last_U, None] == truth.cluster_I) & warm_I
        same_group_UI = (state.bucket_U[:, None] == truth.time_group_I) & warm_I
        planted_UI *= 1 - config.order_strength - config.text_strength - config.time_strength
        planted_UI += config.text_strength * _uniform(same_cluster_UI) + config.time_strength * _uniform(same_group_UI)
        successor_U = truth.successor_KI[state.before_U if config.order == 2 else 0, state.last_U]
        planted_UI[np.arange(len(successor_U)), successor_U] += config.order_strength
    if config.repeats:
        return planted_UI
    allowed_UI = np.where(state.seen_UI, 0, planted_UI)
    nothing_left_U = allowed_UI.sum(axis=1) <= 1e-12  # only where the strengths add up to 1
    allowed_UI[nothing_left_U] = (~state.seen_UI & warm_I)[nothing_left_U]
    return allowed_UI / allowed_UI.sum(axis=1, keepdims=True)


def test_probabilities(config: SyntheticConfig, truth: Truth, state: State) -> np.ndarray:
    """Return the true distribution [U, I] of the test target, cold items included."""
    warm_UI = next_probabilities(config, truth, state)
    if not truth.cold_I.any():
        return warm_UI
    if config.unlearnable:
        return _uniform(~state.seen_UI if not config.repeats else np.ones_like(state.seen_UI))
    rest = 1 - config.order_strength - config.text_strength - config.time_strength
    told = config.text_strength / max(config.text_strength + rest, 1e-12)
    same_cluster_UI = (truth.cluster_I[state.last_U, None] == truth.cluster_I) & truth.cold_I
    cold_UI = told * _uniform(same_cluster_UI) + (1 - told) * truth.cold_I / truth.cold_I.sum()
    return (1 - config.cold_share) * warm_UI + config.cold_share * cold_UI


test_probabilities.__test__ = False  # the name says what it is; it is no test of pytest's


def expected_metrics(
    probabilities_UI: np.ndarray, scores_UI: np.ndarray, removed_UI: np.ndarray, targets_I: np.ndarray
) -> dict[str, Level]:
    """Enumerate every possible target of every user under its true probability and average the metric of its rank.

    `removed_UI` marks candidates that are no rivals of the target; `targets_I` restricts the targets (a slice).
    """
    chances_UI = np.where(targets_I, probabilities_UI, 0)
    scores_UI = np.round(scores_UI, 12)  # equal probabilities must tie although they were summed in another order
    first_UI, last_UI = _rank_bounds(scores_UI, removed_UI)
    weight = chances_UI.sum()
    ranks = np.arange(1, scores_UI.shape[1] + 1)
    gains = {"mrr": 1 / ranks}
    for k in KS:
        gains |= {f"recall@{k}": (ranks <= k) * 1.0, f"ndcg@{k}": (ranks <= k) / np.log2(ranks + 1)}
    levels = {}
    for name, gain in gains.items():
        mean_UI, square_UI = (_mean_over_ties(power, first_UI, last_UI) for power in (gain, gain**2))
        mean_U = (chances_UI * mean_UI).sum(axis=1) / np.maximum(chances_UI.sum(axis=1), 1e-300)
        variance = (chances_UI * (square_UI - mean_U[:, None] ** 2)).sum()
        levels[name] = Level(float((chances_UI * mean_UI).sum() / weight), float(np.sqrt(max(variance, 0)) / weight))
    return levels


def _rank_bounds(scores_UI: np.ndarray, removed_UI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the best and worst rank of every item among the candidates and itself."""
    first_UI, last_UI = np.empty(scores_UI.shape, np.int64), np.empty(scores_UI.shape, np.int64)
    step = max(1, ENUMERATION_CELLS // scores_UI.shape[1] ** 2)
    for start in range(0, len(scores_UI), step):
        rows = slice(start, start + step)
        rivals_BI = np.where(removed_UI[rows], -np.inf, scores_UI[rows])
        above_BI = (rivals_BI[:, None, :] > scores_UI[rows, :, None]).sum(axis=2)
        equal_BI = (rivals_BI[:, None, :] == scores_UI[rows, :, None]).sum(axis=2)
        first_UI[rows] = above_BI + 1
        last_UI[rows] = above_BI + equal_BI + removed_UI[rows]  # a removed item that is the target ties with itself
    return first_UI, last_UI


def _mean_over_ties(gain: np.ndarray, first_UI: np.ndarray, last_UI: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], gain.cumsum()])
    return (total[last_UI] - total[first_UI - 1]) / (last_UI - first_UI + 1)


def _plant(config: SyntheticConfig, random: np.random.Generator) -> Truth:
    shuffled_I = random.permutation(config.num_items)
    cold_I = shuffled_I < config.num_cold_items
    cluster_I = shuffled_I % config.num_clusters
    warm = np.flatnonzero(~cold_I)
    successor_KI = np.zeros((1 if config.order == 1 else config.num_items, config.num_items), dtype=np.int64)
    for successor_I in successor_KI:
        cycle = random.permutation(warm)  # one cycle through all warm items: no item follows itself
        successor_I[cycle] = np.roll(cycle, -1)
    time_group_I = random.permutation(config.num_items) % config.num_time_buckets
    return Truth(cluster_I, cold_I, time_group_I, successor_KI)


def _state(config, items_UL, buckets_UL, step_U, seen_UI) -> State:
    """Return what is known before position `step_U`; a history of one item counts it as last and as the one before."""
    users_U = np.arange(len(items_UL))
    bucket_U = buckets_UL[users_U, step_U if config.time_gap == "target" else step_U - 1]
    return State(items_UL[users_U, step_U - 1], items_UL[users_U, np.maximum(step_U - 2, 0)], bucket_U, seen_UI)


def _uniform(members_UI: np.ndarray) -> np.ndarray:
    """Spread probability 1 over the members of every row; a row without members has none."""
    return members_UI / np.maximum(members_UI.sum(axis=1, keepdims=True), 1)


def _draw(probabilities_UI: np.ndarray, random: np.random.Generator) -> np.ndarray:
    total_UI = probabilities_UI.cumsum(axis=1)
    return (total_UI > random.random((len(total_UI), 1)) * total_UI[:, -1:]).argmax(axis=1)


def _item_texts(truth: Truth, random: np.random.Generator) -> list[tuple]:
    syllables = ["zor", "vak", "mi", "tel", "qua", "nib", "rho", "fen", "lu", "dax", "pry", "sko"]
    themes = list(THEMES)
    num_clusters = truth.cluster_I.max() + 1
    pairs = random.permutation(len(syllables) ** 2)[:num_clusters]
    brands = [(syllables[pair // 12] + syllables[pair % 12]).capitalize() for pair in pairs]
    items = []
    for item, cluster in enumerate(truth.cluster_I.tolist(), start=1):
        theme, brand = themes[cluster % len(themes)], brands[cluster]
        noun, adjective = random.choice(THEMES[theme]), random.choice(ADJECTIVES)
        description = f"A {adjective} {noun} by {brand}, number {item} of its range."
        title = f"{brand} {noun}, {adjective}, no. {item}"
        items.append((str(item), title, brand, [theme, brand], description))
    return items
