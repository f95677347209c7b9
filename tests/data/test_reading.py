"""Broken inputs end in one sentence that names the file and the line, and leave nothing behind."""

import gzip
import os

import pytest

from textrec.data.preparing import prepare_frames
from textrec.data.reading import natural
from textrec.schema import InputError

HEADER = "user_id\titem_id\ttimestamp\n"
GOOD = HEADER + "".join(f"u{user}\ti{(user + k) % 7}\t{k}00\n" for user in range(5) for k in range(4))  # 21 lines


def write(path, text: str, encoding: str = "utf-8"):
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def truncated(path):
    data = gzip.compress((GOOD * 200).encode())
    path.write_bytes(data[: len(data) // 2])
    return path


BROKEN = {
    "truncated gzip": (
        lambda folder: truncated(folder / "log.tsv.gz"),
        "log.tsv.gz cannot be read: Unexpected end of GZIP",
    ),
    "no gzip at all": (lambda folder: write(folder / "log.tsv", GOOD).rename(folder / "log.tsv.gz"), "log.tsv.gz"),
    "wrong encoding": (
        lambda folder: write(folder / "log.tsv", GOOD + "ué\ti1\t3\n", "latin-1"),
        "log.tsv cannot be read: CSV Error on Line: 22; Invalid unicode (byte sequence mismatch) detected",
    ),
    "missing column": (
        lambda folder: write(folder / "log.tsv", GOOD.replace("item_id", "asin")),
        "log.tsv has no column 'item_id' for the item; its columns are user_id, asin, timestamp",
    ),
    "time that is no number": (
        lambda folder: write(folder / "log.tsv", GOOD + "u1\ti1\tNaN\n"),
        "log.tsv, line 22: the time is 'NaN'; expected unix seconds or a blank",
    ),
    "time in words": (
        lambda folder: write(folder / "log.tsv", GOOD + "u1\ti1\tyesterday\n"),
        "log.tsv, line 22: the time is 'yesterday'",
    ),
    "blank time": (
        lambda folder: write(folder / "log.tsv", GOOD + "u1\ti1\t\n"),
        "log.tsv, line 22: the time is blank (1 rows in all); choose missing_time_rule 'drop' or 'row_order'",
    ),
    "empty user": (
        lambda folder: write(folder / "log.tsv", GOOD + " \ti1\t7\n"),
        "log.tsv, line 22: the user is ''; expected a user id",
    ),
    "empty item": (
        lambda folder: write(folder / "log.tsv", GOOD + "u1\t\t7\n"),
        "log.tsv, line 22: the item is ''; expected an item id",
    ),
    "one value too many": (
        lambda folder: write(folder / "log.tsv", GOOD + "u1\ti1\t7\t8\n"),
        "log.tsv cannot be read: CSV Error on Line: 22; Expected Number of Columns: 3 Found: 4",
    ),
    "one value too few": (
        lambda folder: write(folder / "log.tsv", GOOD + "u1\ti1\n"),
        "log.tsv cannot be read: CSV Error on Line: 22; Expected Number of Columns: 3 Found: 2",
    ),
    "empty file": (lambda folder: write(folder / "log.tsv", ""), "log.tsv, line 1: expected a header"),
    "header only": (lambda folder: write(folder / "log.tsv", HEADER), "no interaction is left after the step 'read'"),
    "broken JSON": (
        lambda folder: write(folder / "log.jsonl", '{"user": 1, "item": 2}\n{"user": 1, "it'),
        "log.jsonl cannot be read: Malformed JSON",
    ),
    "unknown format": (lambda folder: write(folder / "log.xls", GOOD), "log.xls has the suffix '.xls'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_sentence_and_the_old_set_stays(tmp_path, case):
    make, sentence = BROKEN[case]
    processed = tmp_path / "processed"
    kept = prepare_frames("shop", write(tmp_path / "good.tsv", GOOD), processed=processed)
    with pytest.raises(InputError) as caught:
        prepare_frames("shop", make(tmp_path), processed=processed)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(processed) == ["shop"]
    assert type(kept).load(kept.folder).fingerprint == kept.fingerprint


def test_a_wrong_rating_is_named_where_ratings_decide(tmp_path):
    log = write(tmp_path / "log.tsv", "user\titem\trating\nu\ti\t4\nu\tj\tgood\n")
    with pytest.raises(InputError, match="log.tsv, line 3: the rating is 'good'; expected a number or a blank"):
        prepare_frames("set", log, processed=tmp_path, min_rating=2)
    assert prepare_frames("set", log, processed=tmp_path).details["counts"]["interactions"] == 2


def test_rows_keep_the_order_of_the_file_however_many_cores_read_them(tmp_path):
    items = [(k * 7919) % 300_007 for k in range(300_000)]
    log = write(tmp_path / "log.tsv", "user\titem\n" + "".join(f"u\t{item}\n" for item in items))
    prepared = prepare_frames("set", log, processed=tmp_path)
    found = prepared.catalogue["item"].to_numpy()[prepared.histories.items_E - 1]
    assert found.astype(int).tolist() == items


def test_spaces_around_ids_and_numbers_do_not_count(tmp_path):
    rows = [("u", "a", "1"), ("v", "b", "2"), ("u", "b", "3"), ("u", "c", "4")]
    spaced = [(" u", "a ", "\u00a01"), ("v", "b", "2 "), ("u", "b", " 3 "), ("u ", "\u00a0c", "4")]
    plain, other = (
        prepare_frames(name, write(tmp_path / f"{name}.tsv", HEADER + "".join("\t".join(row) + "\n" for row in log)),
                       processed=tmp_path, time_tie_rule="hash")
        for name, log in (("plain", rows), ("other", spaced))
    )  # fmt: skip
    assert other.users.tolist() == ["u", "v"] and other.fingerprint == plain.fingerprint


def test_blank_times_take_the_time_of_the_row_before_or_go(tmp_path):
    rows = "u\ta\t\nu\tb\t50\nv\tx\t10\nu\tc\t\nu\td\t40\nw\tz\t\n"  # w has no time at all
    log = write(tmp_path / "log.tsv", HEADER + rows)
    filled = prepare_frames("filled", log, processed=tmp_path, missing_time_rule="row_order")
    # u: a 50 (from the next row, as none is before), b 50, c 50, d 40; oldest first, equal times in file order
    assert filled.histories.times_E.tolist() == [40, 50, 50, 50, 10, 0]
    assert [filled.catalogue["item"][item - 1] for item in filled.histories.items_E] == ["d", "a", "b", "c", "x", "z"]
    dropped = prepare_frames("dropped", log, processed=tmp_path, missing_time_rule="drop")
    assert dropped.histories.times_E.tolist() == [40, 50, 10] and dropped.users.tolist() == ["u", "v"]


def test_rules_that_need_times_are_refused_without_them(tmp_path):
    log = write(tmp_path / "log.tsv", "user_id\titem_id\nu\ta\nu\tb\n")
    with pytest.raises(InputError, match="has no times: choose 'given'"):
        prepare_frames("set", log, processed=tmp_path, time_tie_rule="hash")
    prepared = prepare_frames("set", log, processed=tmp_path)
    assert prepared.details["times"] == "order" and prepared.details["ties"] is None


def test_fractions_of_a_second_order_but_are_not_stored(tmp_path):
    log = write(tmp_path / "log.csv", "user,item,time\nu,a,7.5\nu,b,7.25\nu,c,6\n")
    prepared = prepare_frames("set", log, processed=tmp_path)
    assert [prepared.catalogue["item"][item - 1] for item in prepared.histories.items_E] == ["c", "b", "a"]
    assert prepared.histories.times_E.tolist() == [6, 7, 7]


def test_numeric_ids_are_ordered_by_value():
    import duckdb

    query = f"SELECT id FROM (VALUES ('10'), ('9'), ('b'), ('a'), ('009')) AS t(id) ORDER BY {natural('id')}"
    assert [row[0] for row in duckdb.sql(query).fetchall()] == ["009", "9", "10", "a", "b"]
