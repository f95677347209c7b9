"""The recommendation track for embedders: prepared sets as retrieval tasks of `mteb`, and the leaderboard.

A query is a user's history before the test target, newest item first; the corpus is the catalogue; the next item is the
one relevant document. mteb's retrieval has no way to leave documents out for one query, so items that a user already
has stay among the candidates, and the description of each task says so: its `ndcg_at_10` is our slice `seen_kept`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import torch
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.models import ModelMeta

from textrec.data.item_text import item_attributes, item_texts
from textrec.data.prepared import PreparedSet
from textrec.data.preparing import prepare
from textrec.evaluation.ranking import VectorScorer, top_k
from textrec.models.sequence_model import SequenceModel
from textrec.models.text_encoder import TextEncoder
from textrec.training.embedder_rows import encoded, history_texts

K_VALUES = (1, 5, 10, 20, 50, 100)


class RecommendationTask(AbsTaskRetrieval):
    """One prepared set; ids of queries and documents are our user and item numbers, as texts."""

    k_values = K_VALUES

    def __init__(self, prepared: PreparedSet, max_items: int = 50):
        self.prepared, self.max_items = prepared, max_items
        super().__init__()

    @cached_property  # made again where mteb, unloading the data, removes it
    def metadata(self) -> mteb.TaskMetadata:
        """What the task is, in mteb's terms."""
        name = self.prepared.name
        return mteb.TaskMetadata(
            name=f"NextItem-{name}", description=f"{name}: the next item of a history among all items, seen ones kept.",
            dataset={"path": name, "revision": self.prepared.fingerprint}, type="Retrieval", category="t2t",
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
            prompt={"query": "Given what a user bought, newest first, retrieve the next purchase"},
        )  # fmt: skip

    def load_data(self, *args: Any, **options: Any) -> None:
        """Write the set as mteb's datasets."""
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()  # of what takes no time
        texts, (users_U, ends_U) = _item_texts(self.prepared), self.prepared.split.targets("test")
        targets_U = self.prepared.histories.at(users_U, ends_U)
        users, items = list(map(str, users_U)), [str(item) for item in range(1, len(texts) + 1)]
        queries = history_texts(self.prepared, texts, max_items=self.max_items)
        self.dataset = {"default": {"test": {
            "queries": Dataset.from_dict({"id": users, "text": queries}),
            "corpus": Dataset.from_dict({"id": items, "text": texts}),
            "relevant_docs": {user: {str(item): 1} for user, item in zip(users, targets_U, strict=True)},
            "top_ranked": None,
        }}}  # fmt: skip
        self.data_loaded = True


def recommendation_tasks(sets: Iterable[str | PreparedSet], *, max_items: int = 50) -> list[RecommendationTask]:
    """Return a task per set or name of one: what `mteb.evaluate(model, tasks)` runs without a network."""
    return [RecommendationTask(prepare(each) if isinstance(each, str) else each, max_items) for each in sets]


class StoredEncoder:
    """An embedder in mteb's `EncoderProtocol` whose vectors come from, and go to, a folder: no text is read twice."""

    def __init__(self, encoder: TextEncoder, folder: Path, name: str = "embedder"):
        self.encoder, self.folder = encoder, folder
        self.mteb_model_meta = _meta(name)

    def encode(self, inputs: Iterable[Mapping], *, prompt_type: Any = None, **options: Any) -> np.ndarray:
        """Return the vectors of the batches' texts as queries or documents."""
        texts = [text for batch in inputs for text in batch["text"]]
        side = "document" if prompt_type is None else prompt_type.value
        return encoded(self.encoder, texts, side, folder=self.folder).vectors.numpy()

    def similarity(self, first: Any, second: Any) -> torch.Tensor:
        return torch.as_tensor(first) @ torch.as_tensor(second).T

    def similarity_pairwise(self, first: Any, second: Any) -> torch.Tensor:
        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(1)


class HistorySearch:
    """A sequence model in mteb's `SearchProtocol`: a query is answered from its user's items, not from its text."""

    def __init__(self, model: SequenceModel, prepared: PreparedSet):
        self.model, self.prepared = model.eval(), prepared
        self.mteb_model_meta = _meta(type(model).__name__)

    def index(self, corpus: Any, **options: Any) -> None:
        """Do nothing: the model knows its items."""

    @torch.no_grad()
    def search(self, queries: Any, *, top_k: int, **options: Any) -> dict[str, dict[str, float]]:
        """Return the best items of each user, seen ones among them, best first by falling scores."""
        users_U, histories = np.array([int(user) for user in queries["id"]]), self.prepared.histories
        ends_U = self.prepared.split.test_target_U[users_U]

        def user_vectors(rows: slice) -> torch.Tensor:
            windows = histories.windows(users_U[rows], ends_U[rows], self.model.config.max_sequence_length)
            return self.model.encode(*map(torch.from_numpy, windows[: 1 + self.model.reads_times]))

        scorer = VectorScorer(user_vectors, self.model.item_vectors()[1:])
        lists_UK = best_items(scorer, users_U, top_k, self.prepared.num_items)
        return {user: {str(item): 1.0 / rank for rank, item in enumerate(row, 1)}
                for user, row in zip(queries["id"], lists_UK.tolist(), strict=True)}  # fmt: skip


def best_items(scorer: VectorScorer, users_U: np.ndarray, k: int, num_items: int) -> np.ndarray:
    """Return the best items [U, k] with none left out."""

    def nothing(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(0, np.int64), np.zeros(rows.stop - rows.start + 1, np.int64)

    return top_k(scorer, users_U, nothing, min(k, num_items), num_items=num_items)


def leaderboard(rows: Sequence[Mapping], encoding: Mapping[str, tuple[int, float]], metric: str = "ndcg@10"):
    """Return a frame of record rows, best first: quality, on cold items too, and what texts and training cost.

    `encoding` maps rows that start from given vectors to the tokens and seconds that those took, which their own cost
    lacks. `cpu_s` holds encoding and training.
    """
    import pandas

    lines = []
    for row in (row for row in rows if row["metrics"]):
        tokens, cpu_s = encoding.get(row["row"], (row["cost"].get("tokens", 0), 0.0))
        cpu_s, value = cpu_s + row["cost"]["cpu_s"], row["metrics"][metric]["value"]
        cold = row["slices"].get("cold_items", {}).get(metric, {}).get("value")
        lines.append({
            "row": row["row"], metric: value, f"{metric} cold": cold, "million tokens": tokens / 1e6, "cpu_s": cpu_s,
            "per million tokens": value / (tokens / 1e6) if tokens else None, "per cpu_s": value / max(cpu_s, 0.01),
        })  # fmt: skip
    return pandas.DataFrame(lines).sort_values(metric, ascending=False, ignore_index=True)


def _item_texts(prepared: PreparedSet) -> list[str]:
    return list(item_texts(item_attributes(prepared.catalogue)))


def _meta(name: str) -> ModelMeta:
    return ModelMeta.create_empty(overwrites={"name": f"textrec/{name}", "revision": "local"})
