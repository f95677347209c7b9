"""H&M Personalized Fashion Recommendations: the competition's `transactions_train.csv` and `articles.csv`.

Article ids begin with a zero, so they stay text. Dates have day resolution: the purchases of one day are in file order.
The title is the product name; type, group, colour and department follow, then the description.
"""

from collections.abc import Mapping
from pathlib import Path

from textrec.data.sources import Tables
from textrec.data.sources.frames import header_names, scan
from textrec.schema import InputError

NEEDED = {
    "interactions": "t_dat customer_id article_id",
    "items": "article_id prod_name product_type_name product_group_name section_name colour_group_name department_name "
    "detail_desc",
}


def read(connection, files: Mapping[str, Path]) -> Tables:
    """Read transactions (31 million rows, streamed) and articles; a date that is none is handed on to be refused."""
    for role, names in NEEDED.items():
        header = header_names(files[role])
        for name in names.split():
            if name not in header:
                raise InputError(f"{files[role]} has no column {name!r}; its columns are {', '.join(header)}")
    day = "coalesce(CAST(CAST(epoch(try_cast(t_dat AS TIMESTAMP)) AS BIGINT) AS VARCHAR), t_dat)"
    return Tables(
        interactions=f"""SELECT customer_id AS user, article_id AS item, {day} AS time
            FROM {scan(files["interactions"])}""",
        items=f"""SELECT article_id AS item, prod_name AS title,
            [product_group_name, product_type_name, section_name] AS category, colour_group_name AS colour,
            department_name AS department, detail_desc AS description FROM {scan(files["items"])}""",
        first_line=2,
    )
