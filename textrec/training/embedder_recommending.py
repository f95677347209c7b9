"""A text embedder on files of one's own: vectors of an item file, and recommendations that need no training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from textrec.data.files import replacing
from textrec.data.item_text import item_attributes, item_texts
from textrec.data.prepared import PreparedSet
from textrec.data.preparing import prepare_frames
from textrec.models.text_encoder import TextEncoder, VectorModel, VectorModelConfig
from textrec.training.embedder_rows import encoded
from textrec.training.text_recommending import with_new_items


def write_item_vectors(
    items: Path, encoder: TextEncoder, out: Path, *, folder: Path, progress: Callable | None = None
) -> tuple[int, int]:
    """Write the unit vectors of an item file as safetensors; return how many items and how wide.

    The tensor `vectors` has a row for each item, in the order of the file; `items` in the file's metadata lists their
    ids as JSON. `folder` keeps vectors between calls (see `encoded`).
    """
    import pandas
    from safetensors.torch import save_file

    catalogue = with_new_items(pandas.DataFrame({"item": []}, dtype="str"), items)
    texts = list(item_texts(item_attributes(catalogue)))
    vectors = encoded(encoder, texts, "document", folder=folder, progress=progress).vectors
    told = {"items": json.dumps(catalogue["item"].tolist()), "encoder": encoder.identity}
    with replacing(Path(out)) as partial:
        save_file({"vectors": vectors.contiguous()}, partial, metadata=told)
    return tuple(vectors.shape)


def recommender_of_files(
    interactions: Path, items: Path, encoder: TextEncoder, *, folder: Path, progress: Callable | None = None
) -> tuple[PreparedSet, VectorModel, set[int]]:
    """Return two files as a set with every listed item, a recommender over it, and the items that nobody had.

    Histories are item vectors weighted by recency (see `VectorModel`).
    """
    name = f"{Path(interactions).name.partition('.')[0]}-all-items"
    prepared = prepare_frames(name, interactions, items, catalogue="all", validation="none")
    texts = list(item_texts(item_attributes(prepared.catalogue)))
    table_ID = F.pad(encoded(encoder, texts, "document", folder=folder, progress=progress).vectors, (0, 0, 1, 0))
    config = VectorModelConfig(num_items=prepared.num_items, embedding_dim=table_ID.shape[1])
    counts_I = np.bincount(prepared.histories.items_E, minlength=prepared.num_items + 1)
    return prepared, VectorModel(config, table_ID).eval(), set((np.flatnonzero(counts_I[1:] == 0) + 1).tolist())
