"""What a model may read about an item: its attributes in order, one plain text, and controls in which texts lie.

The catalogue of a prepared set goes in (row k is item id k + 1) and frames or series of the same rows come out. Lists
were joined by ", " when the set was prepared; RecFormer's own files join the category path by single spaces.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textrec.data.choices import closest
from textrec.schema import Column, InputError
from textrec.seeding import generator

if TYPE_CHECKING:
    from pandas import DataFrame, Series

ATTRIBUTES = (Column.title, "brand", "category")  # RecFormer's, in the order of its tokens
MERGED = "merged_text"  # publishers who give one sentence instead of attributes


def item_attributes(catalogue: "DataFrame", names: Sequence[str] | None = None) -> "DataFrame":
    """Return the text columns `names` in that order; an item without a value has an empty one, and keeps its key.

    By default title, brand and category, as far as any item has them; where none has, the merged text under the key
    `title`. Raises `InputError` for a column that the catalogue lacks, or where there is no text at all.
    """
    columns = [name for name in catalogue.columns if name != Column.item]
    for name in names or ():
        if name not in columns:
            told = f"the catalogue has no text column {name!r}{closest(name, columns)}"
            raise InputError(f"{told}; its columns are {', '.join(columns)}")
    filled = catalogue[columns].fillna("")
    wanted = list(names or ATTRIBUTES)
    found = [name for name in wanted if names or name in columns and (filled[name] != "").any()]
    if found and (filled[found] != "").any(axis=None):
        return filled[found]
    if not names and MERGED in columns and (filled[MERGED] != "").any():
        return filled[[MERGED]].rename(columns={MERGED: Column.title})
    told = f"none of the {len(catalogue)} items has a text in {', '.join(wanted)}{'' if names else f' or {MERGED}'}"
    known = f"the catalogue's columns are {', '.join(columns) or 'none'}"
    raise InputError(f"{told}: a model of texts needs an item table with one; {known}")


def item_texts(attributes: "DataFrame", separator: str = ". ") -> "Series":
    """Return one plain text per item for embedders: its values without keys, empty ones left out."""
    texts = attributes.iloc[:, 0].astype("str")
    for name in attributes.columns[1:]:
        between = ((texts != "") & (attributes[name] != "")).map({True: separator, False: ""})
        texts = texts + between + attributes[name]
    return texts.rename("item_text")


def duplicate_share(texts: "DataFrame | Series") -> float:
    """Return the share, 0 to 1, of items that another item equals in text: no reader of texts can tell them apart."""
    return float(texts.duplicated(keep=False).mean())


def shuffled_texts(texts: "DataFrame | Series", seed: int) -> "DataFrame | Series":
    """Return the rows permuted at random: each item gets some item's text, so the texts say nothing of the items."""
    order = generator(seed, "shuffled texts").permutation(len(texts))
    return texts.iloc[order].set_axis(texts.index)
