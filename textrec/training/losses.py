"""Losses as pure functions of tensors; each returns the SUM over the T target positions, so that a caller can divide by
the number of positions of all processes.

`hidden_TD` are states, `items_ID` the output table with padding row 0, `targets_T` item ids (>= 1). Sampled losses take
`negatives` of shape (N,), shared by all positions, or (T, N). Shape suffixes: see `textrec.schema`.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from scipy.sparse import csc_array
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

BLOCK_NUMBERS = 1 << 21  # scores held at once by the blocked functions: 8 MiB in fp32, so that they stay in cache


def full_softmax(
    hidden_TD: Tensor, items_ID: Tensor, targets_T: Tensor, drawn_BI: Tensor | None = None, rows_T: Tensor | None = None
) -> Tensor:
    """Cross-entropy over the whole catalogue (llama_hstu section 5.4: the padding class is left out).

    With a mask `drawn_BI`, over the target and the items that were drawn for the position's row `rows_T` (section 5.5).
    Scores are made, used and overwritten block by block, the gradient with them: memory does not grow with T x I. Under
    bf16 autocast the three products take rounded factors; softmax, sums and what is returned stay in fp32.
    """
    drawn_BI = None if drawn_BI is None else drawn_BI[:, 1:]
    device = hidden_TD.device.type
    rounded = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    with torch.autocast(device, enabled=False):
        return _FullSoftmax.apply(hidden_TD, items_ID[1:], targets_T - 1, drawn_BI, rows_T, rounded)


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, items_ID: Tensor, targets_T: Tensor, drawn_BI, rows_T, rounded: bool) -> Tensor:
        hidden_wants, items_want, *_ = ctx.needs_input_grad  # a frozen table wants none
        grad_hidden_TD = torch.empty_like(hidden_TD) if hidden_wants else None
        grad_items_ID = torch.zeros_like(items_ID) if items_want else None
        total = hidden_TD.new_zeros(())
        step = max((BLOCK_NUMBERS << rounded) // len(items_ID), 64)
        buffer = hidden_TD.new_empty(min(step, max(len(hidden_TD), 1)), len(items_ID))
        if rounded:
            hidden_TD, items_ID = hidden_TD.bfloat16(), items_ID.bfloat16()
        for start in range(0, len(hidden_TD), step):
            hidden_CD, targets_C1 = hidden_TD[start : start + step], targets_T[start : start + step, None]
            scores_CI = buffer[: len(hidden_CD)]
            scores_CI.copy_(hidden_CD @ items_ID.T) if rounded else torch.mm(hidden_CD, items_ID.T, out=scores_CI)
            if drawn_BI is not None:
                target_C1 = scores_CI.gather(1, targets_C1)
                scores_CI.masked_fill_(~drawn_BI[rows_T[start : start + step]], -torch.inf)
                scores_CI.scatter_(1, targets_C1, target_C1)
            scores_CI -= scores_CI.amax(1, keepdim=True)
            total -= scores_CI.gather(1, targets_C1).sum()
            sums_C1 = scores_CI.exp_().sum(1, keepdim=True)
            total += sums_C1.log().sum()
            if hidden_wants or items_want:
                scores_CI /= sums_C1
                scores_CI.scatter_add_(1, targets_C1, scores_CI.new_full(targets_C1.shape, -1.0))
            scores_CI = scores_CI.to(items_ID.dtype)
            if hidden_wants:
                grad_hidden_TD[start : start + step] = scores_CI @ items_ID
            if items_want and rounded:
                grad_items_ID += scores_CI.T @ hidden_CD
            elif items_want:
                grad_items_ID.addmm_(scores_CI.T, hidden_CD)
        ctx.save_for_backward(grad_hidden_TD, grad_items_ID)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *(None if each is None else each * grad for each in ctx.saved_tensors), None, None, None, None


def sampled_softmax(
    hidden_TD: Tensor, items_ID: Tensor, targets_T: Tensor, negatives: Tensor, log_probability_I: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the target against sampled negatives; a negative equal to the target is masked.

    `log_probability_I` (I,) is the log of the expected count of each item among the negatives: subtracted from their
    scores (logQ correction) it makes the estimate of the full softmax consistent. The target is there for certain, so
    its score stays as it is (Blanc & Rendle 2018).
    """
    target_T1 = (hidden_TD * F.embedding(targets_T, items_ID)).sum(1, keepdim=True)
    if negatives.dim() == 1:
        scores_TN = hidden_TD @ F.embedding(negatives, items_ID).T
    else:
        scores_TN = picked_scores(hidden_TD, items_ID, negatives)
    if log_probability_I is not None:
        scores_TN = scores_TN - log_probability_I[negatives]
    return _contrast(target_T1, scores_TN, negatives == targets_T[:, None])


def mixture_softmax(mixture, hidden_TD: Tensor, items_ID: Tensor, targets_T: Tensor, negatives_N: Tensor) -> Tensor:
    """Return the sampled softmax of the scores of a `MixtureOfLogits`, whose negatives all positions share.

    Positions go block by block, and a block's scores are made again for its gradient: memory does not grow with T.
    """
    shared = mixture.items(F.embedding(negatives_N, items_ID))

    def part(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        scores = mixture.contrasted(hidden_CD, mixture.items(F.embedding(targets_C, items_ID)), shared)
        return _contrast(scores[:, :1], scores[:, 1:], negatives_N == targets_C[:, None])

    step = max(BLOCK_NUMBERS // (len(negatives_N) * shared[1].shape[1]), 64)
    blocks = zip(hidden_TD.split(step), targets_T.split(step), strict=True)
    return sum((checkpoint(part, *block, use_reentrant=False) for block in blocks), hidden_TD.new_zeros(()))


def _contrast(target_T1: Tensor, scores_TN: Tensor, same_TN: Tensor) -> Tensor:
    others_T = scores_TN.masked_fill(same_TN, torch.finfo(scores_TN.dtype).min).logsumexp(1)
    return F.softplus(others_T - target_T1[:, 0]).sum()


def gbce(
    hidden_TD: Tensor, items_ID: Tensor, targets_T: Tensor, negatives_TN: Tensor, calibration: float = 0.0
) -> Tensor:
    """Generalised binary cross-entropy (gSASRec, Petrov & Macdonald 2023), the mean over the N + 1 terms of a position.

    With sampling rate a = N / (I - 1) the target's term is weighted by b = 1 - t (1 - a), `calibration` t; t = 0 is
    plain binary cross-entropy. b * softplus(-s) is exact where the published transform saturates.
    """
    num_negatives, num_items = negatives_TN.shape[1], len(items_ID) - 1
    weight = 1.0 - calibration * (1.0 - num_negatives / (num_items - 1))
    picked = picked_scores(hidden_TD, items_ID, torch.cat([targets_T[:, None], negatives_TN], 1))
    return (weight * F.softplus(-picked[:, 0]) + F.softplus(picked[:, 1:]).sum(1)).sum() / (num_negatives + 1)


def picked_scores(hidden_TD: Tensor, items_ID: Tensor, picks_TN: Tensor) -> Tensor:
    """Return the scores (T, N) of chosen items.

    On a CPU few picks are the numbers of a sparse matrix, whose products read the picked rows from cache. Many picks of
    a small catalogue go through the full product in blocks, which is cheaper than N rows per position from memory.
    """
    if hidden_TD.device.type == "cpu" and picks_TN.shape[1] * 8 < len(items_ID):
        return _SparseScores.apply(hidden_TD, items_ID, picks_TN)
    if picks_TN.shape[1] * 64 < len(items_ID):
        return torch.einsum("td,tnd->tn", hidden_TD, F.embedding(picks_TN, items_ID))
    return _PickedScores.apply(hidden_TD, items_ID, picks_TN)


class _SparseScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, items_ID: Tensor, picks_TN: Tensor) -> Tensor:
        starts = torch.arange(0, picks_TN.numel() + 1, picks_TN.shape[1])
        ctx.save_for_backward(hidden_TD, items_ID, picks_TN, starts)
        values, size = hidden_TD.new_zeros(picks_TN.numel()), (len(picks_TN), len(items_ID))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(starts, picks_TN.flatten(), values, size, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, hidden_TD, items_ID.T, beta=0.0).values().view(picks_TN.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TN: Tensor):
        hidden_TD, items_ID, picks_TN, starts = ctx.saved_tensors
        grad_hidden_TD = F.embedding_bag(picks_TN, items_ID, per_sample_weights=grad_TN.contiguous(), mode="sum")
        # torch has no product with the transposed matrix that does not sort all picks first
        parts = (each.numpy() for each in (grad_TN.flatten(), picks_TN.flatten().int(), starts.int()))
        by_item = csc_array(tuple(parts), shape=(len(items_ID), len(picks_TN)))
        return grad_hidden_TD, torch.from_numpy(by_item @ hidden_TD.numpy()), None


class _PickedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, items_ID: Tensor, picks_TN: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TD, items_ID, picks_TN)
        step = max(BLOCK_NUMBERS // len(items_ID), 64)
        picked_TN = hidden_TD.new_empty(picks_TN.shape)
        for start in range(0, len(hidden_TD), step):
            rows = slice(start, start + step)
            torch.gather(hidden_TD[rows] @ items_ID.T, 1, picks_TN[rows], out=picked_TN[rows])
        return picked_TN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TN: Tensor):
        hidden_TD, items_ID, picks_TN = ctx.saved_tensors
        grad_hidden_TD, grad_items_ID = torch.empty_like(hidden_TD), torch.zeros_like(items_ID)
        step = max(BLOCK_NUMBERS // len(items_ID), 64)
        for start in range(0, len(hidden_TD), step):
            rows = slice(start, start + step)
            spread_CI = hidden_TD.new_zeros(len(hidden_TD[rows]), len(items_ID))
            spread_CI.scatter_add_(1, picks_TN[rows], grad_TN[rows])
            torch.mm(spread_CI, items_ID, out=grad_hidden_TD[rows])
            grad_items_ID.addmm_(spread_CI.T, hidden_TD[rows])
        return grad_hidden_TD, grad_items_ID, None


def uniform_log_probability(num_items: int, num_negatives: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the log expected count (num_items + 1,) of an item among `num_negatives` uniform draws."""
    return torch.full((num_items + 1,), math.log(num_negatives / num_items), device=device)
