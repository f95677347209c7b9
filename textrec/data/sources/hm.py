"""H&M Personalized Fashion Recommendations: the competition's `transactions_train.csv` and `articles.csv`.

Article ids begin with a zero, so they stay text. Dates have day resolution: the purchases of one day are in file order.
The title is the product name; type, group, colour and department follow, then the description.
"""

from collections.abc import Mapping
from pathlib import Path

from textrec.data.sources import Tables
from textrec.data.sources.frames import literal


def read(connection, files: Mapping[str, Path]) -> Tables:
    """Read transactions (31 million rows, streamed) and articles; a date that is none is handed on to be refused."""
    day = "coalesce(CAST(CAST(epoch(try_cast(t_dat AS TIMESTAMP)) AS BIGINT) AS VARCHAR), t_dat)"
    return Tables(
        interactions=f"""SELECT customer_id AS user, article_id AS item, {day} AS time
            FROM {_scan(files["interactions"])}""",
        items=f"""SELECT article_id AS item, prod_name AS title,
            [product_group_name, product_type_name, section_name] AS category, colour_group_name AS colour,
            department_name AS department, detail_desc AS description FROM {_scan(files["items"])}""",
        first_line=2,
    )


def _scan(path: Path) -> str:
    return f"read_csv({literal(path)}, header=true, all_varchar=true, delim=',', quote='\"', escape='\"')"
