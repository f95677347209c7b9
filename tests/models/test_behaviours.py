"""Every sequence model keeps the promises of `behaviours`; broken twins show that the assertions can fail."""

import pytest
import torch
from models.behaviours import (
    assert_causal,
    assert_long_histories_keep_the_newest,
    assert_overfits_one_batch,
    assert_padding_is_invisible,
    assert_padding_rows_stay_zero,
    assert_recommends,
    assert_refit_is_fresh,
    assert_save_load_identical,
    later_items_move_earlier_states,
    random_histories,
)

from textrec.models.bert4rec import BERT4Rec, BERT4RecConfig
from textrec.models.gru4rec import GRU4Rec, GRU4RecConfig
from textrec.models.sasrec import FeedForward, SASRec, SASRecConfig
from textrec.models.sequence_model import SequenceModel
from textrec.schema import InputError

SIZE = {"num_items": 30, "max_sequence_length": 12, "embedding_dim": 16, "dropout": 0.0}
SASREC = SIZE | {"num_heads": 2, "attention_dropout": 0.0}
BUILDS = {
    "sasrec original": lambda: SASRec(SASRecConfig(**SASREC, norm="original")),
    "sasrec pre": lambda: SASRec(SASRecConfig(**SASREC, norm="pre")),
    "sasrec post": lambda: SASRec(SASRecConfig(**SASREC, norm="post")),
    "sasrec pmixer": lambda: SASRec(SASRecConfig(**SASREC, norm="post", attend_padding=True)),
    "gsasrec": lambda: SASRec(
        SASRecConfig(**SASREC, norm="original", tie_item_table=False, output_projection=False, scale_item_table=False)
    ),
    "gsasrec padded": lambda: SASRec(
        SASRecConfig(**SASREC, norm="original", tie_item_table=False, attend_padding=True, mask_padding_keys=True)
    ),
    "esasrec": lambda: SASRec(SASRecConfig(**SASREC, block="ligr", hidden_multiplier=4)),
    "sasrec cosine": lambda: SASRec(SASRecConfig(**SASREC, temperature=0.05)),
    "bert4rec": lambda: BERT4Rec(BERT4RecConfig(**SASREC)),
    "bert4rec untied": lambda: BERT4Rec(BERT4RecConfig(**SASREC, tie_item_table=False, norm_embedding=False)),
    "gru4rec": lambda: GRU4Rec(GRU4RecConfig(**SIZE)),
    "gru4rec untied": lambda: GRU4Rec(GRU4RecConfig(**SIZE, num_blocks=2, tie_item_table=False)),
}
every_model = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
every_causal_model = pytest.mark.parametrize(
    "build", [b for name, b in BUILDS.items() if "bert" not in name], ids=[n for n in BUILDS if "bert" not in n]
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@every_causal_model
def test_causal(build):
    assert_causal(build)


@every_model
def test_padding_is_invisible(build):
    assert_padding_is_invisible(build)


@every_model
def test_long_histories_keep_the_newest(build):
    assert_long_histories_keep_the_newest(build)


@every_model
def test_overfits_one_batch(build):
    assert_overfits_one_batch(build)


@every_model
def test_save_load_identical(build, tmp_path):
    assert_save_load_identical(build, tmp_path / "model")


@every_model
def test_refit_is_fresh(build):
    assert_refit_is_fresh(build)


@every_model
def test_padding_rows_stay_zero(build):
    assert_padding_rows_stay_zero(build)


@every_model
def test_recommends(build):
    assert_recommends(build)


@every_model
def test_states_and_item_vectors_fit_together(build):
    model = build()
    items_BL = random_histories(30, (2, 5))
    items_BL[0, :2] = 0
    hidden_TD, item_vectors = model(items_BL), model.item_vectors()
    assert hidden_TD.shape == (8, item_vectors.shape[1]) and len(item_vectors) == 31
    assert model.encode(items_BL).shape == (2, item_vectors.shape[1])


# twins: the assertions above must be able to fail


def test_bert4rec_reads_both_ways():
    model = BUILDS["bert4rec"]().eval()
    assert later_items_move_earlier_states(model, random_histories(30, (3, 9)), 4)
    with pytest.raises(AssertionError):
        assert_causal(BUILDS["bert4rec"])


def test_padding_that_counts_is_noticed():
    class Leaky(GRU4Rec):
        """Runs over the batch as it comes, pads included."""

        def forward(self, items_BL, times_BL=None):
            return self.recurrence(self.item_table(items_BL))[0][items_BL != 0] + items_BL.shape[1]

    with pytest.raises(AssertionError):
        assert_padding_is_invisible(lambda: Leaky(GRU4RecConfig(**SIZE)))


def test_a_model_that_cannot_learn_is_noticed():
    def build():
        model = BUILDS["gru4rec"]()
        model.recurrence.requires_grad_(False)
        model.item_table.weight.register_hook(torch.zeros_like)
        return model

    with pytest.raises(AssertionError):
        assert_overfits_one_batch(build)


def test_a_padding_row_that_is_a_class_is_noticed():
    class Ranked(GRU4Rec):
        """Lets the padding row compete by handing the loss a shifted table."""

        def item_vectors(self):
            return torch.cat([self.item_table.weight[:1], self.item_table.weight])

    with pytest.raises(AssertionError):
        assert_padding_rows_stay_zero(lambda: Ranked(GRU4RecConfig(**SIZE)))


# what each model adds


def test_the_feed_forward_network_bends():
    """pmixer's port once lacked its activation: an affine network has second differences of zero."""
    network = FeedForward(SASRecConfig(**SASREC)).eval()
    x, step = torch.randn(2, 64, 16)
    bend = network(x + step) - 2 * network(x) + network(x - step)
    assert bend.abs().max() > 1e-2
    network.activation = torch.nn.Identity()
    bend = network(x + step) - 2 * network(x) + network(x - step)
    assert bend.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("history", "k", "named"), [([31], 3, "item id 31"), ([0], 3, "item id 0"), ([1], 0, "k=0"), ([1], 31, "k=31")]
)
def test_recommend_refuses_what_is_no_item(history, k, named):
    with pytest.raises(InputError, match=named):
        BUILDS["sasrec pre"]().recommend(history, k)


def test_loading_names_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        SequenceModel.from_pretrained(tmp_path)
    BUILDS["gru4rec"]().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a GRU4Rec, not a SASRec"):
        SASRec.from_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace("GRU4Rec", "GRU5Rec")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="GRU5Rec"):
        SequenceModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config_class", "wrong", "named"),
    [
        (SASRecConfig, {"num_heads": 3}, "num_heads=3"), (SASRecConfig, {"norm": "batch"}, "norm='batch'"),
        (SASRecConfig, {"max_sequence_length": 0}, "max_sequence_length=0"),
        (BERT4RecConfig, {"num_heads": 3}, "num_heads=3"),
        (BERT4RecConfig, {"max_sequence_length": 1}, "max_sequence_length=1"),
        (GRU4RecConfig, {"num_blocks": 0}, "num_blocks=0"),
    ],
)  # fmt: skip
def test_configurations_refuse_what_cannot_be(config_class, wrong, named):
    with pytest.raises(ValueError, match=named):
        config_class(**(SIZE | wrong))
