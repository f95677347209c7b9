"""H&M's transactions: ids keep their zeros, days become seconds."""

import duckdb
import pytest

from textrec.data.sources import hm
from textrec.schema import InputError

TRANSACTIONS = """t_dat,customer_id,article_id,price,sales_channel_id
2018-09-20,00ab,0108775015,0.05,2
soon,00ab,0108775044,0.01,1
"""
COLUMNS = "article_id,prod_name,product_type_name,product_group_name,colour_group_name,department_name,section_name"
ARTICLES = (
    COLUMNS
    + ",detail_desc"
    + '\n0108775015,Strap top,Vest top,Garment Upper body,Black,Jersey,Womens,"Jersey, narrow"\n'
)


def test_ids_days_and_texts(tmp_path):
    (tmp_path / "t.csv").write_text(TRANSACTIONS, encoding="utf-8")
    (tmp_path / "a.csv").write_text(ARTICLES, encoding="utf-8")
    connection = duckdb.connect()
    tables = hm.read(connection, {"interactions": tmp_path / "t.csv", "items": tmp_path / "a.csv"})
    first, second = connection.sql(tables.interactions).fetchall()
    assert first == ("00ab", "0108775015", "1537401600")  # midnight UTC of 2018-09-20
    assert second[2] == "soon"  # handed on to the check that names the line
    item = connection.sql(tables.items).fetchall()[0]
    assert item[:3] == ("0108775015", "Strap top", ["Garment Upper body", "Vest top", "Womens"])
    assert item[-1] == "Jersey, narrow"


def test_a_missing_column_is_named_with_its_file(tmp_path):
    (tmp_path / "t.csv").write_text(TRANSACTIONS, encoding="utf-8")
    (tmp_path / "a.csv").write_text(ARTICLES.replace("prod_name", "name"), encoding="utf-8")
    with pytest.raises(InputError, match=r"a.csv has no column 'prod_name'; its columns are article_id, name"):
        hm.read(duckdb.connect(), {"interactions": tmp_path / "t.csv", "items": tmp_path / "a.csv"})
