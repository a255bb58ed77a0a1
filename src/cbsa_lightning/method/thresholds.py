"""Exact computation of class-wise thresholds in linear time and with little additional memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cbsa_lightning.arguments import check_number
from cbsa_lightning.errors import DataError, listed

# Maximum number of scores in a block of columns. Blocks are copied to make their columns contiguous, so this limits a
# copy to 512 MiB in float32. A class with more scores forms a block of its own.
BLOCK = 2**27
# Number of scores per chunk in all other loops. A chunk and its temporaries fit in the cache of a core.
STRIP = 2**15


def class_thresholds(
    scores: Tensor, positive_rate: Tensor, eta_pos: float = 1.0, eta_neg: float = 0.998
) -> tuple[Tensor, Tensor]:
    """Computes the class-wise thresholds of CAT, at which pseudo-labels have the class proportions of the labeled set.

    For a class with n scores and positive rate ``gamma``, ``tau_pos`` is the r_pos-th largest score and ``tau_neg`` is
    the r_neg-th smallest score, where ``r_pos = int(eta_pos * gamma * n)`` and
    ``r_neg = int(eta_neg * (1 - gamma) * n)``. If ``r_pos`` is 0, ``tau_pos`` is +inf, so that there are no positives.
    If ``r_neg`` is 0, ``tau_neg`` is -inf. ``tau_neg <= tau_pos`` always holds.

    Because a rate is a quotient of counts, a rounding error can make the product slightly smaller than a whole number
    (0.29 * 100 = 28.999...). The product is therefore increased by four rounding steps of the rate's dtype before it is
    truncated. For exact counts, pass float64 rates, as returned by
    :func:`~cbsa_lightning.method.labelers.positive_rates`.

    The running time is linear in ``n * C``. On the CPU, one block of columns is copied, which takes 512 MiB or, if it
    is larger, the memory of one class. No selection is needed if eta is 0. On an accelerator, sorting needs a few times
    as much memory.

    Args:
        scores: ``(n, C)`` on any device; compared in float32.
        positive_rate: ``(C,)`` in [0, 1].
        eta_pos: fraction of the expected positives that are labeled, in [0, 1].
        eta_neg: fraction of the expected negatives that are labeled, in [0, 1].

    Returns:
        ``tau_pos (C,)`` and ``tau_neg (C,)``, float32 on the scores' device.

    Raises:
        DataError: If there are no scores, a score is not finite, or the rates do not fit the scores.
        ConfigError: If an eta is outside [0, 1].
    """
    check_etas(eta_pos, eta_neg)
    check_scores(scores)
    n, num_classes = scores.shape
    r_pos, r_neg = _counts(n, num_classes, positive_rate, eta_pos, eta_neg)
    select = _partitioned if scores.device.type == "cpu" else _sorted
    tau_pos = torch.empty(num_classes, device=scores.device).float()
    tau_neg = torch.empty_like(tau_pos)
    for block in _column_blocks(n, num_classes, BLOCK):
        tau_pos[block], tau_neg[block] = select(_columns(scores, block), r_pos[block], r_neg[block])
    return tau_pos, tau_neg


def positive_counts(n: int, positive_rate: Tensor, eta_pos: float = 1.0) -> Tensor:
    """Returns ``r_pos`` of :func:`class_thresholds`, int64 on the CPU: the number of positives per class.

    Args:
        n: Number of images.
        positive_rate: ``(C,)`` in [0, 1].
        eta_pos: fraction of the expected positives that are labeled, in [0, 1].

    Raises:
        DataError: If a rate is outside [0, 1].
    """
    rate = _checked_rate(positive_rate, len(positive_rate))
    return _whole(eta_pos * rate * n, _slack(positive_rate)).clamp(max=n)


def row_strips(scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Iterates over scores a few rows at a time, so that temporaries stay small.

    Args:
        scores: ``(n, C)``, any type.

    Yields:
        Slices of rows with their scores in float32.
    """
    n, num_classes = scores.shape
    step = max(1, STRIP // max(1, num_classes))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        yield rows, scores[rows].detach().float()


def check_scores(scores: Tensor) -> None:
    """Checks that scores are a matrix of finite values.

    Args:
        scores: ``(n, C)``.

    Raises:
        DataError: If ``scores`` is not a matrix, or a score is not finite in float32. The message contains the number
            of such scores per class.
    """
    if scores.ndim != 2:
        raise DataError(f"scores must have the shape (images, classes), got {tuple(scores.shape)}")
    if scores.numel() == 0:
        return
    # If a score is NaN or infinite, so is the minimum or the maximum. aminmax computes both in one pass without a mask.
    extremes = torch.stack([torch.stack(torch.aminmax(strip)) for _, strip in row_strips(scores)])
    if not extremes.isfinite().all():
        per_class = torch.stack([(~strip.isfinite()).sum(dim=0) for _, strip in row_strips(scores)]).sum(dim=0).cpu()
        raise DataError(
            f"{int(per_class.sum())} of {scores.numel()} scores are not finite; classes (counts): "
            f"{_with_counts(per_class)}. Training has diverged: lower the learning rate, or compute the scores in "
            "float32."
        )


def check_etas(eta_pos: float, eta_neg: float) -> None:
    """Checks that both fractions are in [0, 1].

    Raises:
        ConfigError: If an eta is outside [0, 1].
    """
    check_number("eta_pos", eta_pos, 0, 1)
    check_number("eta_neg", eta_neg, 0, 1)


def _counts(n: int, num_classes: int, positive_rate: Tensor, eta_pos: float, eta_neg: float) -> tuple[Tensor, Tensor]:
    """Returns ``r_pos`` and ``r_neg`` of :func:`class_thresholds`, int64 on the CPU; ``r_pos + r_neg <= n``."""
    if n == 0:
        raise DataError("class thresholds: there are no scores (n = 0)")
    rate = _checked_rate(positive_rate, num_classes)
    r_pos = positive_counts(n, positive_rate, eta_pos)
    return r_pos, torch.minimum(_whole(eta_neg * (1 - rate) * n, _slack(positive_rate)), n - r_pos)


def _slack(positive_rate: Tensor) -> float:
    return 4 * torch.finfo(positive_rate.dtype if positive_rate.is_floating_point() else torch.float64).eps


def _whole(expected: Tensor, slack: float) -> Tensor:
    """Truncates expected counts to whole numbers, allowing for rounding errors of relative size ``slack``."""
    return (expected * (1 + slack)).floor().long()


def _checked_rate(positive_rate: Tensor, num_classes: int) -> Tensor:
    rate = positive_rate.detach().cpu().double()
    if rate.shape != (num_classes,):
        raise DataError(f"class thresholds: {num_classes} classes need one rate each, got {tuple(rate.shape)}")
    wrong = ~((rate >= 0) & (rate <= 1))
    if wrong.any():
        found = [f"class {k}: {float(rate[k])}" for k in wrong.nonzero()[:, 0].tolist()]
        raise DataError(f"class thresholds: positive rates must be in [0, 1]; {listed(found)}")
    return rate


def _with_counts(per_class: Tensor) -> str:
    return listed(f"{k} ({int(per_class[k])})" for k in per_class.nonzero()[:, 0].tolist())


def _column_blocks(n: int, num_classes: int, size: int) -> Iterator[slice]:
    """Yields slices of the classes. Each slice has at most ``size`` scores, or consists of one class."""
    width = max(1, size // max(1, n))
    for start in range(0, num_classes, width):
        yield slice(start, start + width)


def _columns(scores: Tensor, block: slice) -> Tensor:
    """Returns a float32 copy of some columns, ``(width, n)``.

    The copy is made in chunks of rows, because a copy by column would load each cache line once per column.
    """
    columns = scores.detach()[:, block]
    n, width = columns.shape
    copy = torch.empty(width, n, device=scores.device).float()
    step = max(1, STRIP // width)
    for start in range(0, n, step):
        copy[:, start : start + step] = columns[start : start + step].T
    return copy


def _partitioned(columns: Tensor, r_pos: Tensor, r_neg: Tensor) -> tuple[Tensor, Tensor]:
    """Computes thresholds by selection, for the CPU; reorders ``columns (width, n)`` in place.

    NumPy selects in linear time for every input, whereas torch.kthvalue takes quadratic time on decreasing scores.
    """
    tau_pos = torch.full((len(columns),), torch.inf).float()
    tau_neg = torch.full_like(tau_pos, -torch.inf)
    for k, (column, top, bottom) in enumerate(zip(columns.numpy(), r_pos.tolist(), r_neg.tolist(), strict=True)):
        if bottom:
            column.partition(bottom - 1)
            tau_neg[k] = float(column[bottom - 1])
        if top:
            above = column[bottom:]  # usually few scores, since most images lack the class
            above.partition(len(above) - top)
            tau_pos[k] = float(above[-top])
    return tau_pos, tau_neg


def _sorted(columns: Tensor, r_pos: Tensor, r_neg: Tensor) -> tuple[Tensor, Tensor]:
    """Computes thresholds by sorting, for accelerators. A radix sort is linear and sorts all classes at once."""
    ascending = columns.sort(dim=1).values
    n = columns.shape[1]
    r_pos, r_neg = r_pos.to(columns.device), r_neg.to(columns.device)
    largest = ascending.gather(1, (n - r_pos).clamp(max=n - 1)[:, None])[:, 0]
    smallest = ascending.gather(1, (r_neg - 1).clamp(min=0)[:, None])[:, 0]
    return _or_infinite(largest, smallest, r_pos, r_neg)


def _or_infinite(largest: Tensor, smallest: Tensor, r_pos: Tensor, r_neg: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the selected scores, or an infinity if the count is 0."""
    return largest.masked_fill(r_pos == 0, torch.inf), smallest.masked_fill(r_neg == 0, -torch.inf)
