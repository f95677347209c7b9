"""MIND's impressions become histories: the longest history, then the clicks by time."""

import duckdb
import pytest

from textrec.data.sources import mind
from textrec.schema import InputError

TRAIN = """1\tU1\t11/11/2019 9:05:58 PM\tN1 N2\tN3-0 N4-1
2\tU2\t11/12/2019 7:00:00 AM\t\tN1-1 N3-1 N2-0
3\tU1\t11/11/2019 8:05:58 AM\tN1 N2\tN5-1 N1-0
"""
DEV = "1\tU1\t11/15/2019 1:00:00 AM\tN1 N2 N6\tN7-0 N3-1\n2\tU3\t11/15/2019 2:00:00 AM\tN1\tN2-0\n"
NEWS = 'N1\tsports\tsoccer\tThe "beautiful" game\tAbstract\thttps://x\t[{"a": 1}]\t[]\nN2\tnews\tworld\tTitle\t\thttps://x\t[]\t[]\n'


@pytest.fixture
def files(tmp_path):
    texts = {"interactions": TRAIN, "interactions_dev": DEV, "items": NEWS}
    for role, text in texts.items():
        (tmp_path / f"{role}.tsv").write_text(text, encoding="utf-8")
    return {role: tmp_path / f"{role}.tsv" for role in texts}


def test_history_then_clicks_in_time_order(files):
    connection = duckdb.connect()
    tables = mind.read(connection, files)
    rows = connection.sql(tables.interactions).fetchall()
    assert [item for user, item in rows if user == "U1"] == ["N1", "N2", "N6", "N5", "N4", "N3"]
    assert [item for user, item in rows if user == "U2"] == ["N1", "N3"]
    assert [item for user, item in rows if user == "U3"] == ["N1"]
    assert connection.sql(tables.items).fetchall()[0] == (
        "N1",
        'The "beautiful" game',
        ["sports", "soccer"],
        "Abstract",
    )


def test_clicks_alone_have_times(files):
    connection = duckdb.connect()
    tables = mind.read(connection, files, with_history=False)
    rows = connection.sql(tables.interactions).fetchall()
    assert ("U1", "N5", 1573459558) in rows  # 2019-11-11 08:05:58 UTC
    assert len(rows) == 5


def test_a_time_that_is_none_is_named_with_file_and_line(files):
    files["interactions_dev"].write_text(DEV.replace("11/15/2019 2:00:00 AM", "yesterday"), encoding="utf-8")
    with pytest.raises(InputError, match=r"interactions_dev.tsv, line 2: the time is 'yesterday'"):
        mind.read(duckdb.connect(), files)
