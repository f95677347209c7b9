"""The named rows of the ID-baseline ladder: which model, which configuration, which training, and what it changes.

Published settings as the specifications of SASRec (pmixer's port), gSASRec, "Turning Dross into Gold Loss", eSASRec,
BERT4Rec, HSTU, FuXi-alpha and Toy-RecLM give them; `sasrec_*` rows differ from the row `sasrec_ce`
in one thing each, `sasrec_cosine` from `sasrec_ss`.
"""

from dataclasses import dataclass, field
from typing import Any

CONTROLS = ("popularity", "last_item", "markov", "random")


@dataclass(frozen=True)
class Preset:
    """A row of a table before a data set is chosen."""

    model: str  # SASRec | BERT4Rec | GRU4Rec | HSTU | Llama, or a control of textrec.evaluation.controls
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
_HSTU_LARGE = {"num_blocks": 8, "num_heads": 2, "linear_dim": 25, "attention_dim": 25}
_TOY = {
    "block": "toy", "embedding_dim": 512, "num_blocks": 8, "num_heads": 8, "linear_dim": 64, "attention_dim": 64,
    "max_sequence_length": 50, "dropout": 0.0, "time_bias": False, "position_bias": False, "temperature": None,
}  # fmt: skip
_META = {
    "loss": "sampled_softmax", "num_negatives": 128, "share_negatives": False, "adam_betas": (0.9, 0.98),
    "max_epochs": 101,
}  # fmt: skip
_LLAMA = {"embedding_dim": 64, "num_blocks": 2, "num_heads": 1, "dropout": 0.2}
_TOY_LLAMA = {
    "max_sequence_length": 50, "embedding_dim": 512, "num_blocks": 8, "num_heads": 8, "dropout": 0.0, "faithful": True,
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
    "sasrec_cosine": Preset(
        "SASRec", "scores: cosines / 0.05; the loss of sasrec_ss", {**_SASREC, "temperature": 0.05},
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
    "sasrec_dross_3000": Preset(
        "SASRec", "faithful: Dross into Gold, 3,000 negatives a history", _DROSS,
        {"loss": "sampled_softmax", "num_negatives": 3000, "negatives": "outside_history"},
    ),
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
    "llama": Preset(
        "Llama", "model: LLaMA blocks, cosine / 0.05; the loss of sasrec_ss", {**_LLAMA, "temperature": 0.05},
        {"loss": "sampled_softmax", "share_negatives": False},
    ),
    "llama_ce": Preset("Llama", "model: LLaMA blocks", _LLAMA),
    "llama_toy": Preset(
        "Llama", "faithful: Toy-RecLM's LLaMA; the rate falls over the steps there are", _TOY_LLAMA,
        {**_BCE, "adam_betas": (0.9, 0.95), "learning_rate": 3e-4, "weight_decay": 0.1, "gradient_clip": 1.0,
         "batch_size": 32, "warmup_steps": 1000, "schedule": "cosine", "final_learning_rate": 1e-5,
         "max_epochs": 50, "patience": 50},
    ),
    # HSTU: configurations that Meta published for ML-1M; the others differ from `hstu` in what they name
    "hstu": Preset("HSTU", "faithful: HSTU, request time known", {}, _META),
    "hstu_large": Preset("HSTU", "faithful: HSTU-large, request time known", _HSTU_LARGE, _META),
    "hstu_no_bias": Preset("HSTU", "bias: none", {"time_bias": False, "position_bias": False}, _META),
    "hstu_position": Preset("HSTU", "bias: position only", {"time_bias": False}, _META),
    "hstu_time": Preset("HSTU", "bias: time only, request time known", {"position_bias": False}, _META),
    "hstu_self_time": Preset("HSTU", "bias: time up to the newest item", {"time_query": "self"}, _META),
    "hstu_mixture": Preset(
        "HSTU", "similarity: mixture of logits, negatives shared by the batch", {"mixture_groups": (8, 4)},
        _META | {"share_negatives": True},
    ),
    "fuxi": Preset("HSTU", "faithful: FuXi-alpha, request time known", {"block": "fuxi"}, _META),
    "hstu_toy": Preset(
        "HSTU", "faithful: Toy-RecLM's block of that name", _TOY,
        {**_BCE, "adam_betas": (0.9, 0.95), "learning_rate": 3e-4, "weight_decay": 0.1, "gradient_clip": 1.0,
         "batch_size": 32, "warmup_steps": 1000, "schedule": "cosine", "final_learning_rate": 1e-5,
         "max_epochs": 50, "patience": 50},
    ),
    "sasrec_meta": Preset(
        "SASRec", "model: SASRec in HSTU's recipe; its norms learn a scale and a last norm is added",
        {**_SASREC, "embedding_dim": 50, "norm": "original", "attention_dropout": 0.2, "temperature": 0.05,
         "initial_table_std": 0.02}, _META,
    ),
}  # fmt: skip
