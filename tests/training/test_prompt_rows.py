"""Rows of an asked language model: ranks by hand, no target in a prompt, caches kept apart, scores without a model."""

import numpy as np
import pytest
import torch
from models.local_server import local_server
from training.text_sets import brand_set

from textrec.evaluation.metrics import mean_metrics
from textrec.models.language_servers import EndpointModel, Recorded
from textrec.models.listwise_prompt import NUMBER
from textrec.schema import InputError
from textrec.seeding import derive_seed
from textrec.training import prompt_rows
from textrec.training.prompt_rows import PROMPT_ROWS, PromptConfig, Prompting, run_prompt_rows

SMALL = PromptConfig(users=60, candidates=8, history=4, shuffles=2)
ROWS = list(PROMPT_ROWS)


class Clerk:
    """A language model that answers in the order shown, says yes to short prompts, and counts what it is asked."""

    def __init__(self, name="clerk", order=slice(None)):
        self.identity, self.order, self.asked, self.max_tokens = name, order, 0, 1024

    def embed(self, texts):
        self.asked += len(texts)
        cut = [text[: self.max_tokens] for text in texts]
        return np.stack([np.random.default_rng(derive_seed(text)).normal(size=8) for text in cut]).astype(np.float32)

    def generate(self, prompts, decoding):
        self.asked += len(prompts)
        last = [NUMBER.findall(prompt.partition("Order the numbers")[2])[1] for prompt in prompts]
        return [", ".join(map(str, list(range(1, int(n) + 1))[self.order])) for n in last]

    def log_likelihood(self, prompts, continuations):
        self.asked += len(prompts)
        pairs = zip(prompts, continuations, strict=True)
        return np.array([-len(prompt) if answer == " Yes" else 0.0 for prompt, answer in pairs])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return brand_set(tmp_path_factory.mktemp("sets") / "brands", seed=0, num_users=400)


@pytest.fixture
def asked(prepared, tmp_path):
    def make(model=None, config=SMALL, seed=0, **more):
        place = {"generations": tmp_path / "generations.jsonl", "vectors": tmp_path / "vectors"}
        return Prompting(prepared, model or Clerk(), config, seed=seed, **place | more)

    return make


def test_who_repeats_the_first_stage_ranks_as_it_does_and_who_says_nothing_as_chance(asked):
    same, nothing = asked(), asked(Clerk("silent", order=slice(0)))
    for one, row, other in ((same, "listwise", "first_stage"), (nothing, "listwise", "chance"),
                            (nothing, "listwise_forced", "chance_forced")):  # fmt: skip
        mine, theirs = one.ranks(row), one.ranks(other)
        assert (mine.filtered.higher_U == theirs.filtered.higher_U).all()
        assert (mine.filtered.ties_U == theirs.filtered.ties_U).all()
    assert not (same.ranks("first_stage").filtered.higher_U == same.ranks("chance").filtered.higher_U).all()


def test_a_target_that_was_not_retrieved_is_at_the_worst_rank_and_else_at_its_place(asked):
    one = asked()
    ranks, lists_UC = one.ranks("first_stage"), one.candidates_UC
    for user, target in enumerate(one.targets_U):
        items, _ = one.seen(slice(user, user + 1))
        unseen = one.prepared.num_items - len(set(items) - {target})
        place = np.flatnonzero(lists_UC[user] == target)
        assert ranks.filtered.candidates_U[user] == unseen and ranks.kept.candidates_U[user] == one.prepared.num_items
        assert ranks.filtered.higher_U[user] == (place[0] if len(place) else unseen - 1)
        assert not set(lists_UC[user]) & set(items)
    found_U = (lists_UC == one.targets_U[:, None]).any(1)
    assert 0 < found_U.mean() < 1
    assert mean_metrics(one.ranks("chance").filtered, ks=(8,))["recall@8"] == pytest.approx(found_U.mean())
    assert mean_metrics(one.ranks("chance_forced").filtered, ks=(8,))["recall@8"] == 1
    assert mean_metrics(one.ranks("chance_forced").filtered, ks=(1,))["recall@1"] == pytest.approx(1 / 8)


def test_borda_adds_the_places_of_all_shuffles(asked):
    one = asked()
    told = one.points("listwise_consistent")
    by_hand = np.zeros_like(told)
    for shuffle in range(2):
        for user, row in enumerate(one.shown("listwise_consistent", shuffle)):
            for place, candidate in enumerate(row):
                by_hand[user, candidate] += (8 - place) / 2
    assert (told == by_hand).all() and len(np.unique(told, axis=0)) > 10


def test_no_prompt_depends_on_a_target_unless_it_is_forced_and_labelled(asked, monkeypatch):
    one, other = asked(), asked()
    other.targets_U = other.targets_U[::-1].copy()
    for row, preset in ((row, preset) for row, preset in PROMPT_ROWS.items() if preset.asked == "list"):
        assert (one.prompts(row) == other.prompts(row)) == (not preset.forced)
        assert preset.forced == ("forced" in preset.changed)
        assert (one.leaks(row) > 0) == preset.forced
    for row in ("listwise_consistent", "pointwise", "first_stage"):
        assert (one.points(row) == other.points(row)).all()
    honest = Prompting.lists

    def forcing(self, row):  # a mutant: the target slips into every list
        lists_UC = honest(self, row)
        lists_UC[:, -1] = self.targets_U
        return lists_UC

    monkeypatch.setattr(Prompting, "lists", forcing)
    assert one.prompts("listwise") != other.prompts("listwise") and one.leaks("listwise") > 10


def test_a_history_that_reads_one_item_too_many_leaks(asked, prepared):
    one = asked()
    items_UL, _, lengths_U = prepared.histories.windows(one.users_U, one.ends_U + 1, SMALL.history + 1)
    late = [[one.texts[item - 1] for item in row[:n]] for row, n in zip(items_UL, lengths_U, strict=True)]
    honest = one.histories
    assert one.leaks("listwise") == 0 and all(row[-1] == text[-2] for row, text in zip(honest, late, strict=True))
    prompts = [prompt_rows.prompting.listwise_prompt(history, [one.texts[i - 1] for i in items])
               for history, items in zip(late, one.candidates_UC, strict=True)]  # fmt: skip
    one.prompts = lambda row: prompts
    assert one.leaks("listwise") > 10


def test_rows_run_once_and_are_scored_again_from_the_recording_alone(asked, tmp_path):
    clerk = Clerk()
    results = run_prompt_rows(ROWS, asked(clerk), run_dir=tmp_path / "run")
    assert [result.status for result in results] == ["ok"] * len(ROWS)
    once = clerk.asked
    run_prompt_rows(ROWS, asked(clerk), run_dir=tmp_path / "run")
    assert clerk.asked == once  # rows and answers are read back
    again = run_prompt_rows(ROWS, asked(Recorded("clerk")), run_dir=tmp_path / "elsewhere")
    for first, second in zip(results, again, strict=True):
        assert (first.ranks.filtered.higher_U == second.ranks.filtered.higher_U).all()
    with pytest.raises(InputError, match="an answer of 'clerk' is not on disk"):
        run_prompt_rows(["listwise"], asked(Recorded("clerk"), seed=1), run_dir=tmp_path / "seed1")
    (tmp_path / "generations.jsonl").unlink()
    with pytest.raises(InputError, match="an answer of 'clerk' is not on disk"):
        run_prompt_rows(["listwise"], asked(Recorded("clerk")), run_dir=tmp_path / "lost")


def test_no_two_models_share_answers_or_vectors(asked, tmp_path):
    one, other = Clerk("one"), Clerk("other", order=slice(None, None, -1))
    rows = ["listwise", "pointwise", "embedding_template"]
    results = [run_prompt_rows(rows, asked(model), run_dir=tmp_path / "run") for model in (one, other)]
    assert one.asked == other.asked > 0
    higher = [found[0].ranks.filtered.higher_U for found in results]
    assert (higher[0] != higher[1]).any()
    assert len(list((tmp_path / "vectors").iterdir())) == 2


def test_two_limits_of_one_model_share_no_vectors_and_no_rows(asked, tmp_path):
    whole, short, row = Clerk(), Clerk(), "embedding_no_template"
    short.max_tokens = 5
    first, second = (run_prompt_rows([row], asked(model), run_dir=tmp_path / "run")[0] for model in (whole, short))
    alone = asked(short, vectors=tmp_path / "fresh").ranks(row)
    assert (second.ranks.filtered.higher_U == alone.filtered.higher_U).all()
    assert (second.ranks.filtered.higher_U != first.ranks.filtered.higher_U).any()
    assert [each.parameters["max_tokens"] for each in (first, second)] == [1024, 5]


def test_templates_do_not_share_vectors_and_vectors_rank_all_items(asked):
    one = asked()
    plain, template = (one.ranks(f"embedding_{name}template") for name in ("no_", ""))
    assert (plain.filtered.higher_U != template.filtered.higher_U).any()
    assert plain.kept.candidates_U.min() == one.prepared.num_items and plain.filtered.higher_U.max() > SMALL.candidates


def test_a_user_of_one_item_is_not_far_from_it(asked, monkeypatch):
    """Both sides go through one model and one pooling: equal texts have equal vectors."""
    monkeypatch.setattr(prompt_rows, "MAX_EMBEDDED_ITEMS", 1)
    one = asked()
    monkeypatch.setattr(one, "targets_U", one.prepared.histories.at(one.users_U, one.ends_U - 1))
    assert one.ranks("embedding_no_template").filtered.higher_U.max() == 0  # the last item itself comes first


def test_pointwise_orders_by_yes_over_no(asked):
    one = asked()
    texts = [[len(one.texts[item - 1]) for item in items] for items in one.candidates_UC]
    told = one.points("pointwise")
    assert (np.argsort(-told, axis=1, kind="stable") == np.argsort(texts, axis=1, kind="stable")).all()


def test_a_report_counts_and_replays_agree(asked):
    clerk = Clerk("short", order=slice(3))
    one = asked(clerk)
    told = one.report("listwise")
    assert told["partial"] == 1 and told["leaks"] == 0 and told["position_bias"] > 0.5
    before = clerk.asked
    assert one.agreement("listwise", 3) == {"text": 1.0, "order": 1.0, "first item": 1.0}
    assert clerk.asked == before + 2 * 60  # the first replay is what was scored
    answers = iter(["1, 2", "1, 3"])
    one.model.generate = lambda prompts, decoding: [next(answers)] * len(prompts)
    assert one.agreement("listwise", 2, temperature=0.7) == {"text": 0.0, "order": 0.0, "first item": 1.0}


@pytest.mark.parametrize("kind", ["no word of them", "of what it wrote alone"])
def test_what_an_endpoint_cannot_do_is_not_attempted_and_the_rest_is_run(asked, tmp_path, kind):
    rows = ["first_stage", "listwise", "listwise_constrained", "pointwise"]

    def reply(body):
        told = {"text_offset": [len(body["prompt"])], "token_logprobs": [-1.0]}
        return {"choices": [{"text": "2, 1"} | ({"logprobs": told} if "alone" in kind else {})]}

    with local_server() as server:
        server.replies = [(200, reply)]
        model = EndpointModel(server.url, "mistral", wait_s=0.01, timeout_s=5)
        results = run_prompt_rows(rows, asked(model), run_dir=tmp_path)
    assert [each.status for each in results] == ["ok", "ok", "not_attempted", "not_attempted"]
    assert "cannot be kept to given choices" in results[2].reason and "(echo)" in results[3].reason
    with pytest.raises(InputError, match="failed 4 times"):  # a server that is down is no lack of its protocol
        run_prompt_rows(["listwise"], asked(model, seed=1), run_dir=tmp_path)


def test_another_scorer_is_another_first_stage(asked, prepared):
    scorer = lambda rows: -torch.arange(prepared.num_items).float().expand(rows.stop - rows.start, -1)  # noqa: E731
    given = asked(scorer=scorer)
    assert (np.diff(given.candidates_UC, axis=1) > 0).all() and given.candidates_UC[:, 0].max() < 20
    for name in ("last_item", "popularity"):
        assert asked(config=PromptConfig(users=60, candidates=8, first_stage=name)).candidates_UC.shape == (60, 8)


def test_the_sample_is_seeded_and_labels_are_written(asked, tmp_path):
    assert (asked().users_U == asked().users_U).all() and (asked(seed=1).users_U != asked().users_U).any()
    one = asked(config=PromptConfig(users=999, candidates=8, label="plumbing"))
    assert len(one.users_U) == 400
    rows = ["first_stage", "listwise", "pointwise"]
    results = run_prompt_rows(rows, one, run_dir=tmp_path, skipped={"pointwise": "too dear"})
    assert [each.changed.startswith("plumbing: ") for each in results] == [False, True, True]
    assert (results[2].status, results[2].reason) == ("not_attempted", "too dear")


def test_mistakes_are_named(asked, tmp_path):
    for settings, message in (
        ({"first_stage": "oracle"}, "first_stage is 'oracle'; expected markov"),
        ({"candidates": 1}, "candidates is 1; expected at least 2"),
        ({"wrap": "[INST]"}, "wrap is '\\[INST\\]'; expected a text with {}"),
    ):
        with pytest.raises(InputError, match=message):
            PromptConfig(**settings)
    with pytest.raises(InputError, match=r"row 'listwize' is unknown \(did you mean 'listwise'\?\)"):
        run_prompt_rows(["listwize"], asked(), run_dir=tmp_path)
    with pytest.raises(InputError, match="candidates=240: expected at most the unseen items"):
        asked(config=PromptConfig(candidates=240)).ranks("first_stage")
