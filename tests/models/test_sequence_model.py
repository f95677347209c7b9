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


def mixed(block_BLC, tile):
    """A causal mean in which a misplaced position, a wrong length or a row of another length would show."""
    running = block_BLC.cumsum(1) / torch.arange(1, block_BLC.shape[1] + 1)[:, None]
    return running * tile.lengths_B[:, None, None].sqrt()


def test_blocks_of_like_length_give_what_one_block_gives():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 40, 0, 8, 9, 1, 64, 33, 16, 2])
    layout = Layout.of(torch.arange(70) < lengths[:, None])
    assert [tile.lengths_B.tolist() for tile in layout.tiles[2]] == [[3, 0, 8, 1, 2], [9, 16], [40, 64, 33]]
    assert [tile.max_length for tile in layout.tiles[2]] == [8, 16, 64]
    packed = torch.randn(int(lengths.sum()), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(packed.shape, dtype=torch.float64)
    whole = layout.pack(mixed(layout.pad(packed), layout))
    (expected,) = torch.autograd.grad((whole * weight).sum(), packed)
    tiled = layout.in_blocks(packed, mixed)
    (found,) = torch.autograd.grad((tiled * weight).sum(), packed)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_blocks_of_nothing_and_of_one_length():
    for real in (torch.zeros(2, 3), torch.ones(2, 3)):
        layout = Layout.of(real != 0)
        packed = torch.rand(len(layout.rows_T), 4)
        assert torch.equal(layout.in_blocks(packed, mixed), layout.pack(mixed(layout.pad(packed), layout)))


def test_newest_by_hand():
    assert newest(BLOCK, 1).tolist() == [[0, 0, 0, 2], [0, 0, 4, 0], [0, 0, 0, 0], [5, 0, 0, 0]]
    assert newest(BLOCK, 4) is BLOCK
