"""From files to a prepared set: orders, fingerprints, reuse, kills, and the statistics of the real sets."""

import errno
import gzip
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from textrec.data import storage
from textrec.data.choices import Choices
from textrec.data.prepared import PreparedSet
from textrec.data.preparing import find_recipe, known_sets, prepare, prepare_frames
from textrec.schema import InputError

TWELVE = """user_id\titem_id\ttimestamp\trating
2\ta\t20\t5
1\tc\t10\t4
1\tb\t10\t3
1\ta\t10\t5
2\tb\t20\t1
1\td\t5\t5
3\ta\t7\t4
2\tc\t15\t5
3\td\t7\t4
3\tb\t9\t2
1\tb\t30\t5
3\te\t8\t4
"""


@pytest.fixture
def log(tmp_path) -> Path:
    path = tmp_path / "log.tsv"
    path.write_text(TWELVE, encoding="utf-8")
    return path


def sequences(prepared: PreparedSet) -> dict[str, str]:
    """Return the external item ids of each user as one word."""
    names, histories = prepared.catalogue["item"].to_numpy(), prepared.histories
    rows = np.split(names[np.asarray(histories.items_E) - 1], histories.offsets_U1[1:-1])
    return dict(zip(prepared.users, map("".join, rows), strict=True))


def array_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("stable", {"1": "dcbab", "2": "cab", "3": "adeb"}),
        ("item_id", {"1": "dabcb", "2": "cab", "3": "adeb"}),
        ("given", {"1": "cbadb", "2": "abc", "3": "adbe"}),
    ],
)
def test_the_tie_rule_decides_equal_times(log, tmp_path, rule, expected):
    prepared = prepare_frames("set", log, processed=tmp_path / "out", time_tie_rule=rule)
    assert sequences(prepared) == expected
    assert prepared.details["choices"]["time_tie_rule"] == rule


def test_the_hash_rule_depends_on_the_rows_only_not_on_their_place(log, tmp_path):
    first = prepare_frames("set", log, processed=tmp_path / "a", time_tie_rule="hash")
    header, *rows = TWELVE.splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.tsv"
    shuffled.write_text(header + "".join(reversed(rows)), encoding="utf-8")
    second = prepare_frames("set", shuffled, processed=tmp_path / "b", time_tie_rule="hash")
    assert sequences(first) == sequences(second) and first.fingerprint == second.fingerprint
    assert prepare_frames("set", shuffled, processed=tmp_path / "c").fingerprint != first.fingerprint


def test_duplicates_ratings_and_cores_change_the_counts(log, tmp_path):
    first = prepare_frames("first", log, processed=tmp_path, duplicate_rule="keep_first")
    last = prepare_frames("last", log, processed=tmp_path, duplicate_rule="keep_last")
    assert sequences(first)["1"] == "dcba" and sequences(last)["1"] == "dcab"
    liked = prepare_frames("liked", log, processed=tmp_path, min_rating=4)
    assert sequences(liked) == {"1": "dcab", "2": "ca", "3": "ade"}
    core = prepare_frames("core", log, processed=tmp_path, min_item=2, min_user=4)
    assert sequences(core) == {"1": "dcbab", "3": "adb"}
    assert [step["step"] for step in core.details["steps"]] == ["read", "interactions of users >= 4, items >= 2"]
    assert core.details["counts"] == {"users": 2, "items": 4, "interactions": 8}


def test_a_user_sample_keeps_the_catalogue_whole(log, tmp_path):
    one, again = (prepare_frames(name, log, processed=tmp_path, user_sample=1, seed=4) for name in ("one", "again"))
    assert one.histories.num_users == 1 and one.num_items == 5
    assert one.fingerprint == again.fingerprint
    assert (
        len({tuple(prepare_frames(f"s{s}", log, processed=tmp_path, user_sample=1, seed=s).users) for s in range(6)})
        > 1
    )
    with pytest.raises(InputError, match="user_sample is 4 but only 3 users are left"):
        prepare_frames("many", log, processed=tmp_path, user_sample=4)


def test_the_fingerprint_knows_choices_and_content_but_no_path(log, tmp_path):
    prepared = prepare_frames("set", log, processed=tmp_path / "a")
    packed = tmp_path / "elsewhere.tsv.gz"
    packed.write_bytes(gzip.compress(TWELVE.encode()))
    assert prepare_frames("other", packed, processed=tmp_path / "b").fingerprint == prepared.fingerprint
    for choices in ({"validation": "none"}, {"time_tie_rule": "item_id"}, {"cold_targets": "drop"}, {"seed": 1}):
        assert prepare_frames("set", log, processed=tmp_path / "c", **choices).fingerprint != prepared.fingerprint
    details = json.loads((prepared.folder / "fingerprint.json").read_text(encoding="utf-8"))
    assert details["sources"][0]["sha256"] == storage.sha256_of(log) and str(tmp_path) not in json.dumps(details)
    renamed = tmp_path / "renamed.tsv"
    renamed.write_text(TWELVE.replace("\ta\t", "\tA\t"), encoding="utf-8")
    assert prepare_frames("set", renamed, processed=tmp_path / "d").fingerprint != prepared.fingerprint


def test_an_unchanged_set_is_reused_and_a_changed_file_is_noticed(log, tmp_path):
    said = []
    folder = prepare_frames("set", log, processed=tmp_path / "out", progress=said.append).folder
    made = (folder / "fingerprint.json").stat().st_mtime_ns
    assert said == [f"reading {log}", "read: 3 users, 5 items, 12 interactions", "writing the histories"]
    prepare_frames("set", log, processed=tmp_path / "out", progress=said.append)
    assert (folder / "fingerprint.json").stat().st_mtime_ns == made and len(said) == 3
    log.write_text(TWELVE + "4\ta\t1\t1\n", encoding="utf-8")
    assert prepare_frames("set", log, processed=tmp_path / "out").histories.num_users == 4
    assert os.listdir(tmp_path / "out") == ["set"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(log, tmp_path, monkeypatch):
    def full(self, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.ArrayFile, "append", full)
    with pytest.raises(InputError, match=r"the disk of .*out is full: free some space and prepare set again"):
        prepare_frames("set", log, processed=tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_names_of_sets_are_checked(log, tmp_path):
    with pytest.raises(InputError, match="'ml-1m-w4' is no known data set .did you mean 'ml-1m-w"):
        prepare("ml-1m-w4", raw=tmp_path)
    with pytest.raises(InputError, match=r"ml-1m.txt.gz is missing: `textrec data download ml-1m-w1` fetches it"):
        prepare("ml-1m-w1", raw=tmp_path)
    with pytest.raises(InputError, match="cannot name a data set"):
        prepare_frames("../set", log, processed=tmp_path)
    with pytest.raises(InputError, match="none.tsv is not a file"):
        prepare_frames("set", tmp_path / "none.tsv", processed=tmp_path)


def test_a_set_of_your_own_opens_by_its_name(log, tmp_path):
    made = prepare_frames("shop", log, processed=tmp_path)
    assert prepare("shop", processed=tmp_path).fingerprint == made.fingerprint
    with pytest.raises(InputError, match="'shop' is no known data set"):
        prepare("shop", processed=tmp_path, seed=3)


def test_overridden_choices_never_replace_the_set(tmp_path):
    plain = prepare("synthetic", processed=tmp_path)
    variant = prepare("synthetic", processed=tmp_path, validation="none", seed=0)
    assert plain.folder.name == "synthetic" and variant.folder.name == "synthetic+validation=none"
    assert (plain.split.validation_target_U >= 0).all() and (variant.split.validation_target_U == -1).all()
    assert array_bytes(plain.folder)["items.npy"] == array_bytes(variant.folder)["items.npy"]


def test_a_category_fills_the_recipe_of_its_edition(tmp_path):
    assert find_recipe("amazon-2018-Video_Games").files["items"] == "raw/amazon-2018/meta_Video_Games.json.gz"
    assert find_recipe("amazon-2018-games").reader == "frames.read"
    assert find_recipe("amazon-2018-unheard-of") is None
    path = tmp_path / "raw/amazon-2014/reviews_Toys_5.json.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b'{"reviewerID": "A", "asin": "B", "unixReviewTime": 1, "overall": 5.0}\n'))
    (path.parent / "meta_Toys.json.gz").write_bytes(gzip.compress(b"{'asin': 'B', 'title': 'Top'}\n"))
    prepared = prepare("amazon-2014-Toys", raw=tmp_path, processed=tmp_path / "out")
    assert prepared.name == "amazon-2014-Toys" and prepared.catalogue["title"].tolist() == ["Top"]


def test_every_recipe_is_well_formed():
    for name, recipe in known_sets().items():
        module, function = recipe.reader.split(".")
        assert recipe.name == name and callable(getattr(import_module(f"textrec.data.sources.{module}"), function))
        assert Choices.of(recipe.choices)
        assert set(recipe.published) <= {"users", "items", "interactions"}


KILLER = """
import os, random, shutil, signal, sys
from pathlib import Path
import duckdb, pyarrow  # loaded, not used: a used DuckDB does not survive a fork
from textrec.data.preparing import prepare_frames

log, out, moments = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def run(folder, choices, kill_at=None):
    pid = os.fork()
    if pid == 0:
        calls = 0
        def count(frame, event, argument):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        prepare_frames("set", log, processed=folder, **choices)
        sys.setprofile(None)
        (out / "calls").write_text(str(calls))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def state(folder):
    path = folder / "set"
    names = ("items", "times", "offsets", "train_end", "validation_target", "test_target")
    return tuple((path / f"{name}.npy").read_bytes() for name in names) if path.exists() else None

old, new = {"time_tie_rule": "item_id"}, {"validation": "none"}
assert run(out / "a", old) == 0 and run(out / "b", new) == 0
before, after = state(out / "a"), state(out / "b")
assert before != after
total = int((out / "calls").read_text())
numbers = random.Random(0)
found = []
for moment in sorted(numbers.randrange(1, total) for _ in range(moments - 2)) + [total - 60, total - 20]:
    shutil.rmtree(out / "c", ignore_errors=True)
    shutil.copytree(out / "a", out / "c")
    assert run(out / "c", new, kill_at=moment) == -signal.SIGKILL
    found.append({before: "old", after: "new", None: "none"}[state(out / "c")])
    assert run(out / "c", new) == 0
    assert state(out / "c") == after and os.listdir(out / "c") == ["set"]
print(" ".join(found))
"""


def killed(tmp_path, moments: int) -> set[str]:
    numbers = np.random.default_rng(0)
    rows = zip(
        numbers.integers(60, size=2000), numbers.integers(90, size=2000), numbers.integers(300, size=2000), strict=True
    )
    log = tmp_path / "log.tsv"
    log.write_text("user\titem\ttime\n" + "".join(f"{u}\t{i}\t{t + 1}\n" for u, i, t in rows), encoding="utf-8")
    command = [sys.executable, "-c", KILLER, str(log), str(tmp_path / "out"), str(moments)]
    (tmp_path / "out").mkdir()
    outcome = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert outcome.returncode == 0, outcome.stderr
    return set(outcome.stdout.split())


def test_a_kill_at_any_moment_leaves_the_old_set_or_none(tmp_path):
    assert "old" in killed(tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    assert killed(tmp_path, 20) <= {"old", "none", "new"}


@pytest.fixture(scope="module")
def processed(tmp_path_factory) -> Path:
    """One folder for the real sets of this file: what one test prepared, the next one reuses."""
    return tmp_path_factory.mktemp("processed")


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name, recipe in known_sets().items() if recipe.files and recipe.published])
def test_statistics_of_the_real_sets_are_the_published_ones(real_data, processed, name):
    recipe = known_sets()[name]
    if not all((real_data / path).is_file() for path in recipe.files.values()):
        pytest.skip(f"{name} is not among the real data sets at hand")
    prepared = prepare(name, raw=real_data, processed=processed)
    assert {key: prepared.details["counts"][key] for key in recipe.published} == recipe.published
    lengths_U = prepared.histories.lengths_U
    assert lengths_U.sum() == prepared.details["counts"]["interactions"] and lengths_U.min() >= 1
    assert prepared.histories.items_E.min() == 1 and prepared.histories.items_E.max() <= prepared.num_items
    assert len(prepared.catalogue) == prepared.num_items and len(prepared.users) == prepared.histories.num_users
    backwards = np.diff(prepared.histories.times_E) < 0  # only from one user to the next
    assert set(np.flatnonzero(backwards) + 1) <= set(prepared.histories.offsets_U1.tolist())


@pytest.mark.real
def test_w3_has_the_published_number_of_test_users(real_data, processed):
    prepared = prepare("ml-1m-w3", raw=real_data, processed=processed)
    assert prepared.details["targets"] == {"validation": 6040, "test": 6038}


@pytest.mark.real
def test_the_published_ml_1m_sequences_are_rebuilt_from_the_ratings(real_data, processed):
    published = prepare("ml-1m-w1", raw=real_data, processed=processed)
    rebuilt = prepare("ml-1m-w1-rebuilt", raw=real_data, processed=processed)
    movie_of = dict(line.split() for line in (real_data / "ml-1m-sasrec/item_to_movie.txt").read_text().splitlines())
    user_of = dict(
        line.split() for line in (real_data / "ml-1m-sasrec/user_to_movielens_user.txt").read_text().splitlines()
    )
    movies = published.catalogue["item"].map(movie_of).to_numpy()
    names = rebuilt.catalogue["item"].to_numpy()
    row_of = {user: row for row, user in enumerate(rebuilt.users)}
    equal_users = equal_positions = 0
    for row, user in enumerate(published.users):
        other = row_of[user_of[user]]
        theirs = movies[published.histories.items_E[slice(*published.histories.offsets_U1[row : row + 2])] - 1]
        ours = names[rebuilt.histories.items_E[slice(*rebuilt.histories.offsets_U1[other : other + 2])] - 1]
        equal_positions += int((theirs == ours).sum())
        equal_users += bool((theirs == ours).all())
    assert (equal_users, equal_positions) == (6040, 999_611)
