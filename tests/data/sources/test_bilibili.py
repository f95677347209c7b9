"""TCF's two files, with and without header lines."""

import duckdb
import pytest

from textrec.data.sources import bilibili
from textrec.schema import InputError


@pytest.mark.parametrize("header", [True, False])
def test_blank_joined_histories_and_texts_with_tabs(tmp_path, header):
    behaviors = ["userid\tbehaviors"] * header + ["u1\tv3 v1 v2", "u2\tv1"]
    videos = ["videoid\tdescription"] * header + ['v1\tA "quoted" title', "v2\twith\ta tab", "v3\t标题"]
    for name, lines in (("b.tsv", behaviors), ("v.tsv", videos)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    connection = duckdb.connect()
    tables = bilibili.read(connection, {"interactions": tmp_path / "b.tsv", "items": tmp_path / "v.tsv"})
    assert connection.sql(tables.interactions).fetchall() == [("u1", "v3"), ("u1", "v1"), ("u1", "v2"), ("u2", "v1")]
    assert connection.sql(tables.items).fetchall() == [
        ("v1", 'A "quoted" title'),
        ("v2", "with\ta tab"),
        ("v3", "标题"),
    ]


@pytest.mark.parametrize("line", ["alone", "u2\t ", "\tv1"])
def test_a_line_without_user_or_items_is_named(tmp_path, line):
    (tmp_path / "b.tsv").write_text(f"userid\tbehaviors\nu1\tv1\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"b.tsv, line 3: expected a user, a tab"):
        bilibili.read(duckdb.connect(), {"interactions": tmp_path / "b.tsv"})
