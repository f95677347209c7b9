"""Recommend by texts alone: a RecFormer over any catalogue (a frame of items), those no training saw included."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from textrec.data.catalogue import build_catalogue, list_items
from textrec.data.item_text import item_attributes
from textrec.data.reading import readable
from textrec.data.sources import frames
from textrec.models.recformer import RecFormer, RecFormerForPretraining
from textrec.models.sequence_model import SequenceModel
from textrec.schema import InputError
from textrec.training.text_ranking import PACKED, TextSet, item_table, weights_digest
from textrec.training.two_stage import load_pair


class TextRecommender(SequenceModel):
    """An encoder and the items it chooses from: row k of `attributes` (see `item_attributes`) is item id k + 1."""

    def __init__(self, encoder: RecFormer, tokenizer, attributes):
        super().__init__(SimpleNamespace(num_items=len(attributes)))
        self.texts = TextSet.of(None, tokenizer, attributes=attributes)  # no histories are known
        self.encoder, self.attributes, self.scores = encoder, attributes, encoder.scores
        self.items_ID: torch.Tensor | None = None  # encoded when first asked for, unless there is a frozen one
        self.eval()

    def encode(self, items_BL: torch.Tensor, times_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Return the vectors (B, D) of histories by their items' texts; times are not read."""
        packed = self.texts.packed(items_BL.cpu().numpy(), self.encoder.config)
        return self.encoder.encode(*(torch.from_numpy(packed[name]).to(items_BL.device) for name in PACKED))

    def item_vectors(self) -> torch.Tensor:
        """Return the table (I, D), row 0 padding."""
        self.items_ID = item_table(self.encoder, self.texts) if self.items_ID is None else self.items_ID
        return self.items_ID

    def over(self, catalogue) -> "TextRecommender":
        """Return a recommender of other items, all encoded now: vectors of two models, or of I' and one, do not mix."""
        attributes = item_attributes(catalogue).reindex(columns=self.attributes.columns, fill_value="")
        return TextRecommender(self.encoder, self.texts.tokenizer, attributes)

    def recommend(self, history, k: int, filter_seen: bool = True, catalogue=None) -> list[tuple[int, float]]:
        """Do as every model does; ids are the rows of `catalogue`, where given (see `over`, for many histories)."""
        return SequenceModel.recommend(self if catalogue is None else self.over(catalogue), history, k, filter_seen)


def text_recommender(folder: Path, catalogue, fingerprint: str | None = None) -> TextRecommender:
    """Load a pretrained model, or a finetuned row (a folder around `model/`), for the items of `catalogue`.

    A row brings its table I' if the catalogue is that of the set it was finetuned on, named by `fingerprint`. Raises
    `InputError` where there is no such model, no tokenizer beside it, or no text in the catalogue.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    row, finetuned = folder / "row.json", (folder / "model").is_dir()
    place, kind = (folder / "model", RecFormer) if finetuned else (folder, RecFormerForPretraining)
    if not (place / "tokenizer.json").is_file():
        raise InputError(f"{place} holds no model that reads texts: tokenizer.json is missing")
    model, tokenizer = kind.from_pretrained(place), Tokenizer.from_file(str(place / "tokenizer.json"))
    found = TextRecommender(model if finetuned else model.encoder, tokenizer, item_attributes(catalogue))
    if row.is_file() and json.loads(row.read_text())["key"]["fingerprint"] == fingerprint:
        for pair in sorted(folder.glob("stage?/best.safetensors")):
            items_ID = load_pair(pair, twin := RecFormer(model.config))
            if weights_digest(twin) == weights_digest(model):  # else another stage's, or left by another run
                found.items_ID = items_ID
    return found


def with_new_items(catalogue, path: Path):
    """Return the catalogue and behind it, in order and cleaned likewise, the items of a file that it lacks."""
    import duckdb
    import pandas

    if not path.is_file():
        raise InputError(f"{path} is not a file")
    with readable({"items": path}), duckdb.connect() as connection:
        connection.execute("CREATE TABLE source_items (item VARCHAR, i INTEGER)")
        names = list_items(connection, frames._item_query(connection, path, {}), all_items=True)
        connection.execute("CREATE TABLE kept_items AS SELECT item, min(rowid) textrec_number FROM listed GROUP BY 1")
        build_catalogue(connection, names, duplicate_items="first_non_empty", unknown_items="keep")
        new = connection.execute("SELECT * EXCLUDE (textrec_number) FROM catalogue ORDER BY textrec_number").df()
    return pandas.concat([catalogue, new[~new["item"].isin(["", None, *catalogue["item"]])]]).fillna("")
