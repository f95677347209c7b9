"""mteb's evaluation of our sets gives our numbers, for embedders and for sequence models; the leaderboard divides."""

import mteb
import numpy as np
import pytest
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from textrec.data.item_text import item_attributes, item_texts
from textrec.data.preparing import prepare
from textrec.data.tokenizing import train_tokenizer
from textrec.evaluation.metrics import per_user_metrics
from textrec.models.text_encoder import TextEncoder, VectorModel, VectorModelConfig, save_random_embedder
from textrec.study.mteb_tasks import HistorySearch, RecommendationTask, StoredEncoder, leaderboard, recommendation_tasks
from textrec.training.embedder_rows import encoded, run_embedder_rows

ROWS = ("zero_shot_concatenated", "zero_shot_recency", "zero_shot_permuted")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The synthetic set, an embedder that reads all of each history, and our own ranks of three rows."""
    prepared, place = prepare("synthetic"), tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer(item_attributes(prepared.catalogue), 400)
    save_random_embedder(tokenizer, place / "model", max_tokens=1024)
    encoder = TextEncoder(place / "model")
    results = run_embedder_rows(ROWS, prepared, encoder, seed=0, run_dir=place, store=place / "store")
    assert not any(result.ranks.kept.ties_U.any() for result in results), "mteb breaks ties by id"
    gains = {result.row: per_user_metrics(result.ranks.kept, ks=(10,))["ndcg@10"] for result in results}
    users = results[0].ranks.users_U
    return prepared, encoder, place, {row: dict(zip(users, values_U, strict=True)) for row, values_U in gains.items()}


def evaluated(model, prepared, monkeypatch):
    """Return what mteb finds for each user, and its score; mteb rounds the latter to five places."""
    told = {}
    monkeypatch.setattr(
        RecommendationTask, "task_specific_scores", lambda self, scores, *rest, **how: told.update(scores) or {}
    )
    result = mteb.evaluate(model, recommendation_tasks([prepared]), cache=None, show_progress_bar=False)
    return {int(user): scores["ndcg_cut_10"] for user, scores in told.items()}, result.task_results[0].get_score()


def model_of(kind, world):
    prepared, encoder, place, _ = world
    if kind == "sentence-transformers":
        return SentenceTransformer(str(place / "model"))
    if kind == "stored":
        return StoredEncoder(encoder, place / "store")
    texts = list(item_texts(item_attributes(prepared.catalogue)))
    table = F.pad(encoded(encoder, texts, "document", folder=place / "store").vectors, (0, 0, 1, 0))
    return HistorySearch(
        VectorModel(VectorModelConfig(num_items=prepared.num_items, embedding_dim=32), table), prepared
    )


KINDS = {"sentence-transformers": ROWS[0], "stored": ROWS[0], "history": ROWS[1]}


@pytest.mark.parametrize(("kind", "row"), KINDS.items(), ids=KINDS)
def test_mteb_finds_our_ndcg_of_every_user(kind, row, world, monkeypatch):
    theirs, score = evaluated(model_of(kind, world), world[0], monkeypatch)
    ours = world[3][row]
    assert theirs.keys() == ours.keys()
    np.testing.assert_allclose([theirs[user] for user in ours], list(ours.values()), atol=1e-6)
    assert score == pytest.approx(np.mean(list(ours.values())), abs=6e-6)
    exchanged = world[3]["zero_shot_permuted"]  # the twin: another order is noticed
    assert not np.allclose([theirs[user] for user in exchanged], list(exchanged.values()), atol=1e-6)


def test_a_stored_encoder_reads_no_text_twice(world, monkeypatch):
    monkeypatch.setattr(TextEncoder, "encode", None)
    evaluated(model_of("stored", world), world[0], monkeypatch)


def test_a_task_by_name_says_what_it_holds():
    (task,) = recommendation_tasks(["synthetic"], max_items=2)
    task.load_data()
    assert task.metadata.name == "NextItem-synthetic" and "seen ones kept" in task.metadata.description
    held = task.dataset["default"]["test"]
    assert len(held["queries"]) == len(held["relevant_docs"]) == 200 and len(held["corpus"]) == 60
    assert set(held["corpus"]["id"]) >= {item for items in held["relevant_docs"].values() for item in items}
    task.unload_data()
    assert task.metadata.name == "NextItem-synthetic"


def row(name, value, tokens, cpu_s, cold=None):
    slices = {} if cold is None else {"cold_items": {"ndcg@10": {"value": cold}}}
    return {"row": name, "metrics": {"ndcg@10": {"value": value}}, "slices": slices,
            "cost": {"tokens": tokens, "cpu_s": cpu_s}}  # fmt: skip


def test_the_leaderboard_divides_by_what_texts_and_training_cost():
    rows = [row("a", 0.1, 2_000_000, 4.0, cold=0.05), row("b", 0.2, 77, 6.0), row("failed", 0, 0, 0) | {"metrics": {}},
            row("ids", 0.05, 0, 0.0)]  # fmt: skip
    table = leaderboard(rows, {"b": (500_000, 2.0), "ids": (0, 0.0)}).set_index("row")
    assert list(table.index) == ["b", "a", "ids"]
    assert table.loc["a", ["per million tokens", "per cpu_s", "ndcg@10 cold"]].tolist() == pytest.approx(
        [0.05, 0.025, 0.05]
    )
    assert table.loc["b", ["million tokens", "cpu_s", "per million tokens"]].tolist() == pytest.approx([0.5, 8.0, 0.4])
    assert np.isnan(table.loc["ids", "per million tokens"])
