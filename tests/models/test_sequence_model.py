"""The padding-free layout: what goes in comes out, whatever the padding."""

import torch

from textrec.models.sequence_model import Layout, newest

BLOCK = torch.tensor([[0, 0, 1, 2], [3, 0, 4, 0], [0, 0, 0, 0], [5, 0, 0, 0]])


def test_layout_by_hand():
    layout = Layout.of(BLOCK != 0)
    assert layout.rows_T.tolist() == [0, 0, 1, 1, 3]
    assert layout.columns_T.tolist() == [0, 1, 0, 1, 0]
    assert layout.lengths_B.tolist() == [2, 2, 0, 1] and layout.max_length == 2
    packed = BLOCK[BLOCK != 0].float()[:, None]
    padded = layout.pad(packed)
    assert padded[..., 0].tolist() == [[1, 2], [3, 4], [0, 0], [5, 0]]
    assert torch.equal(layout.pack(padded), packed)
    assert layout.last(packed)[:, 0].tolist() == [2, 4, 0, 5]


def test_layout_of_nothing():
    for block in (torch.zeros(2, 3), torch.zeros(2, 0)):
        layout = Layout.of(block != 0)
        assert layout.pad(torch.zeros(0, 7)).shape == (len(block), 1, 7)
        assert layout.last(torch.zeros(0, 7)).shape == (len(block), 7)


def test_newest_by_hand():
    assert newest(BLOCK, 1).tolist() == [[0, 0, 0, 2], [0, 0, 4, 0], [0, 0, 0, 0], [5, 0, 0, 0]]
    assert newest(BLOCK, 4) is BLOCK
