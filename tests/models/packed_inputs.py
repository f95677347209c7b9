"""Packed inputs of RecFormer, for tests of models that read texts."""

import torch


def random_inputs(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    source, total = torch.Generator().manual_seed(seed), sum(lengths)
    tokens, types, items = (
        torch.randint(low, high, (total,), generator=source) for low, high in ((3, 300), (1, 3), (1, 51))
    )
    lengths_B = torch.tensor(lengths)
    starts_B = lengths_B.cumsum(0) - lengths_B
    tokens[starts_B] = types[starts_B] = items[starts_B] = 0
    return [tokens, types, items, lengths_B]
