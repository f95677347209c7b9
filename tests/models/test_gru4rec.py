"""GRU4Rec is torch's GRU over the items of a history, however they are padded."""

import torch
from torch.nn.utils.rnn import pack_sequence

from textrec.models.gru4rec import GRU4Rec, GRU4RecConfig


def test_states_equal_a_packed_gru():
    torch.manual_seed(0)
    model = GRU4Rec(GRU4RecConfig(num_items=30, embedding_dim=8, num_blocks=2)).eval()
    rows = [torch.randint(1, 31, (length,)) for length in (6, 3, 1)]
    block = torch.zeros(3, 9, dtype=torch.long)
    block[0, 3:], block[1, :3], block[2, 4] = rows[0], rows[1], rows[2]
    packed, _ = model.recurrence(pack_sequence([model.item_table(row) for row in rows]))
    states, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    by_hand = torch.cat([states[b, :length] for b, length in enumerate(lengths)])
    torch.testing.assert_close(model(block), by_hand)


def test_parameters_by_hand():
    model = GRU4Rec(GRU4RecConfig(num_items=100, embedding_dim=16, num_blocks=2, tie_item_table=False))
    layer = 2 * 3 * 16 * 16 + 2 * 3 * 16  # input and recurrent weights of three gates, a bias each
    assert sum(p.numel() for p in model.parameters()) == 2 * 101 * 16 + 2 * layer


def test_recurrent_weights_start_orthogonal():
    weight = GRU4Rec(GRU4RecConfig(num_items=5, embedding_dim=16)).recurrence.weight_hh_l0
    for gate in weight.detach().chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(16), rtol=0, atol=1e-5)
