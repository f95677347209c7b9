"""The losses of RecFormer's pretraining (section 2.4): item-item contrast and masked words, as sums over rows.

B rows of this process · G rows of all processes · D width
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from textrec.data.examples import IGNORED
from textrec.models.recformer import RecFormerForPretraining
from textrec.training.text_ranking import PACKED


def item_contrast(
    users_BD: Tensor,
    items_BD: Tensor,
    targets_B: Tensor,
    temperature: float,
    *,
    mask_duplicates: bool = True,
    gather: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of each history's own next item, and in how many rows it scores highest.

    Scores are cosines over `temperature`; the other candidates are the next items of all other rows, with `gather`
    those of other processes, too, and gradients reach them there. One direction: histories choose items. `targets_B`
    are item ids: with `mask_duplicates`, another row's copy of one's own target is no candidate; the published code
    leaves it in. Every process must have equally many rows.
    """
    users_BD, items_BD = (F.normalize(vectors, dim=-1, eps=1e-8) for vectors in (users_BD, items_BD))
    items_GD, targets_G, first = gathered(items_BD, targets_B) if gather else (items_BD, targets_B, 0)
    scores_BG = users_BD @ items_GD.T / temperature
    own_B = torch.arange(len(users_BD), device=users_BD.device) + first
    if mask_duplicates:
        copies_BG = (targets_B[:, None] == targets_G).scatter(1, own_B[:, None], False)
        scores_BG = scores_BG.masked_fill(copies_BG, -torch.inf)
    return F.cross_entropy(scores_BG, own_B, reduction="sum"), (scores_BG.argmax(1) == own_B).sum()


def gathered(vectors_BD: Tensor, ids_B: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the rows of all processes, their ids, and where this process's rows begin."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return vectors_BD, ids_B, 0
    parts = [torch.empty_like(ids_B) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, ids_B.contiguous())
    return _Gathered.apply(vectors_BD), torch.cat(parts), torch.distributed.get_rank() * len(ids_B)


class _Gathered(torch.autograd.Function):
    """Each process's rows get the gradients of all processes' losses: without them the contrast would weigh less."""

    @staticmethod
    def forward(ctx, vectors_BD: Tensor) -> Tensor:
        parts = [torch.empty_like(vectors_BD) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, vectors_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad_GD: Tensor) -> Tensor:
        grad_GD = grad_GD.contiguous().clone()
        torch.distributed.all_reduce(grad_GD)
        return grad_GD.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


SUMS = ("contrast", "correct", "rows", "mlm_history", "masked_history", "mlm_item", "masked_item", "tokens")


def pretraining_sums(
    model: RecFormerForPretraining, batch: dict, *, mask_duplicates: bool = True, masked_words: bool = True,
    gather: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the summed losses of a batch and what to divide them by, one tensor for each of `SUMS`.

    Both views go through the encoder as one packed batch, once as they are and, with `masked_words`, once with words
    masked. `tokens` are the real tokens of both views. Where no token is masked the sum and its gradient are zero.
    """
    views = batch["history"], batch["item"]
    both = {name: torch.cat([view[name] for view in views]) for name in views[0]}
    users_BD, items_BD = model.encoder.encode(*(both[name] for name in PACKED)).float().chunk(2)
    others = {"mask_duplicates": mask_duplicates, "gather": gather}
    with torch.autocast(users_BD.device.type, enabled=False):  # in bf16 near cosines are ties
        contrast, correct = item_contrast(users_BD, items_BD, batch["targets_B"], model.config.temperature, **others)
    loss_N, in_history_N = users_BD.new_zeros(0), users_BD.new_zeros(0, dtype=torch.bool)
    if masked_words:
        masked_N = (both["labels_T"] != IGNORED).nonzero()[:, 0]
        logits = model(both["masked_ids_T"], *(both[name] for name in PACKED[1:]), masked_N).float()
        loss_N = F.cross_entropy(logits, both["labels_T"][masked_N], reduction="none")
        in_history_N = masked_N < len(views[0]["token_ids_T"])
    sums = (
        contrast, correct, len(users_BD), loss_N[in_history_N].sum(), in_history_N.sum(), loss_N[~in_history_N].sum(),
        (~in_history_N).sum(), len(both["token_ids_T"]),
    )  # fmt: skip
    return {name: torch.as_tensor(value, device=users_BD.device) for name, value in zip(SUMS, sums, strict=True)}
