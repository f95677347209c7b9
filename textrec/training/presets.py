"""The named rows of the ID-baseline ladder: which model, which configuration, which training, and what it changes.

Published settings as the specifications of SASRec (pmixer's port), gSASRec, "Turning Dross into Gold Loss", eSASRec and
BERT4Rec give them; `sasrec_*` rows differ from the reference row `sasrec_ce` in one thing each.
"""

from dataclasses import dataclass, field
from typing import Any

CONTROLS = ("popularity", "last_item", "markov", "random")


@dataclass(frozen=True)
class Preset:
    """A row of a table before a data set is chosen."""

    model: str  # SASRec | BERT4Rec | GRU4Rec, or a control of textrec.evaluation.controls
    changed: str  # the one difference from the reference row
    model_settings: dict[str, Any] = field(default_factory=dict)
    training_settings: dict[str, Any] = field(default_factory=dict)


# the reference: Dross into Gold's SASRec+ with padding-free pre-norm blocks
_SASREC = {"embedding_dim": 64, "num_blocks": 2, "num_heads": 1, "dropout": 0.2, "attention_dropout": 0.0}
_DROSS = {
    **_SASREC, "dropout": 0.1, "attention_dropout": 0.1, "norm": "original", "scale_item_table": False,
    "initial_std": 0.02, "norm_eps": 1e-5,
}  # fmt: skip
_PMIXER = {
    "embedding_dim": 50, "num_blocks": 2, "num_heads": 1, "dropout": 0.2, "attention_dropout": 0.2, "norm": "post",
    "attend_padding": True, "norm_eps": 1e-8,
}  # fmt: skip
_GSASREC = {
    "embedding_dim": 128, "num_blocks": 2, "num_heads": 1, "dropout": 0.5, "attention_dropout": 0.5, "norm": "original",
    "tie_item_table": False, "scale_item_table": False, "output_projection": False, "norm_eps": 1e-5,
    "initial_table_std": 1.0, "initial_std": 0.051,  # torch's defaults: N(0, 1) tables, U(-1/sqrt(d), 1/sqrt(d)) layers
}  # fmt: skip
_ESASREC = {
    "embedding_dim": 64, "num_blocks": 2, "num_heads": 1, "dropout": 0.1, "attention_dropout": 0.1, "block": "ligr",
    "hidden_multiplier": 4, "norm_eps": 1e-5,
}  # fmt: skip
_BCE = {"loss": "gbce", "num_negatives": 1, "reject_history": True}
_GBCE = {"loss": "gbce", "num_negatives": 256, "calibration": 0.75}

PRESETS: dict[str, Preset] = {
    "popularity": Preset("popularity", "no personalisation: training counts"),
    "last_item": Preset("last_item", "co-occurrence with the newest item only"),
    "markov": Preset("markov", "first-order transitions of the newest item"),
    "random": Preset("random", "random user and item vectors: the chance level"),
    "sasrec_ce": Preset("SASRec", "reference: softmax over the catalogue", _SASREC),
    "sasrec_bce": Preset("SASRec", "loss: binary cross-entropy, one negative", _SASREC, _BCE),
    "sasrec_ss": Preset(
        "SASRec", "loss: sampled softmax, 256 uniform negatives per position", _SASREC,
        {"loss": "sampled_softmax", "share_negatives": False},
    ),
    "sasrec_shared": Preset(
        "SASRec", "loss: sampled softmax, 1,024 uniform negatives shared by the batch", _SASREC,
        {"loss": "sampled_softmax", "num_negatives": 1024},
    ),
    "sasrec_in_batch": Preset(
        "SASRec", "loss: sampled softmax, 1,024 in-batch negatives with logQ", _SASREC,
        {"loss": "sampled_softmax", "num_negatives": 1024, "negatives": "in_batch"},
    ),
    "sasrec_gbce": Preset("SASRec", "loss: gBCE, 256 negatives, t = 0.75", _SASREC, _GBCE),
    "sasrec_post": Preset("SASRec", "block: post-norm", {**_SASREC, "norm": "post"}),
    "sasrec_original": Preset("SASRec", "block: original arrangement", {**_SASREC, "norm": "original"}),
    "sasrec_pmixer": Preset("SASRec", "faithful: pmixer's port", _PMIXER, {**_BCE, "adam_betas": (0.9, 0.98)}),
    "sasrec_dross": Preset("SASRec", "faithful: Dross into Gold, SASRec+", _DROSS),
    "gsasrec": Preset("SASRec", "faithful: gSASRec", _GSASREC, _GBCE),
    "esasrec": Preset(
        "SASRec", "faithful: eSASRec, LiGR blocks and sampled softmax", _ESASREC,
        {"loss": "sampled_softmax", "share_negatives": False, "adam_betas": (0.9, 0.98)},
    ),
    "bert4rec": Preset(
        "BERT4Rec", "model: bidirectional, masked items",
        {"embedding_dim": 64, "num_blocks": 2, "num_heads": 2, "dropout": 0.1},
        {"objective": "masked_item", "max_epochs": 200, "patience": 20},
    ),
    "gru4rec": Preset("GRU4Rec", "model: recurrent", {"embedding_dim": 64, "dropout": 0.2}),
}  # fmt: skip
