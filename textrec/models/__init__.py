"""Sequence and text models as `torch.nn.Module`s. Knows no data source and no trainer."""
