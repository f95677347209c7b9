"""What HSTU's biases have learned is drawn at the right time and distance, and is a difference along the curve."""

import math

import pytest
import torch

from textrec.models.hstu import HSTU, HSTUConfig
from textrec.study.bias_figures import bias_data, plot_biases


def model(**settings) -> HSTU:
    torch.manual_seed(0)
    return HSTU(
        HSTUConfig(num_items=5, max_sequence_length=6, embedding_dim=8, linear_dim=4, attention_dim=4, **settings)
    )


def test_a_peak_stands_where_the_model_applies_it():
    """The newest item's bias, raised, raises the score of distance 0 alone; so does bucket 13 that of a minute."""
    hstu = model(num_blocks=1).eval()
    block = hstu.blocks[0]
    with torch.no_grad():
        block.distances.zero_()
        block.buckets.zero_()
        block.distances[hstu.config.block_length - 1] += 1.0
        block.buckets[13] += 2.0
    data = bias_data(hstu)
    position = {point["x"]: point["value"] for point in data["position"]}
    assert max(position, key=position.get) == 0 and len(position) == 6
    assert position[0.0] - position[1.0] == pytest.approx(1.0)
    time = {point["x"]: point["value"] for point in data["time"]}
    assert math.floor(math.log(60) / 0.301) == 13 and max(time, key=time.get) == pytest.approx(math.exp(13 * 0.301))
    bias = block._bias(type("Tiles", (), {"length": 3})())  # what attention reads: rows are queries, columns keys
    assert bias[2, 2] == 1.0 and bias[2, 1] == 0.0


@pytest.mark.parametrize("kind", ["time", "position"])
def test_each_curve_has_mean_zero_and_a_missing_bias_has_none(kind):
    points = bias_data(model(num_blocks=2))[kind]
    assert {point["block"] for point in points} == {1, 2}
    for block in (1, 2):
        assert sum(point["value"] for point in points if point["block"] == block) == pytest.approx(0, abs=1e-4)
    assert bias_data(model(**{f"{kind}_bias": False}))[kind] == []


def test_both_panels_are_drawn_also_where_one_is_empty():
    import matplotlib.pyplot as plt

    full, half = plot_biases(bias_data(model())), plot_biases(bias_data(model(time_bias=False)))
    assert [len(axes.lines) for axes in full.axes] == [3, 3]  # two blocks and the zero line
    assert [text.get_text() for text in half.axes[0].texts] == ["no such bias"]
    plt.close("all")
