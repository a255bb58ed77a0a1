"""Detects and names values that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cbsa_lightning.errors import NotFiniteError, listed

REMEDY = (
    "Training has diverged, or a value is too large for the precision: lower the learning rate, or train in "
    "bf16-mixed or 32-true precision"
)


def all_finite(values: Sequence[Tensor | None]) -> Tensor:
    """Returns whether all values are finite, as a bool tensor; sums suffice, since they preserve NaN and infinity."""
    return torch.stack([value.detach().float().sum() for value in values if value is not None]).isfinite().all()


def not_finite(values: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the floating-point tensors that contain NaN or infinity; synchronizes with a device once."""
    floating = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
    if not floating:
        return []
    finite = torch.stack([value.detach().isfinite().all() for value in floating.values()])
    return [name for name, ok in zip(floating, finite.tolist(), strict=True) if not ok]


def rows_not_finite(values: Tensor) -> list[int]:
    """Returns the indices of the rows of ``values (B, ...)`` that contain NaN or infinity."""
    wrong = ~values.detach().isfinite().flatten(1).all(1)
    return wrong.nonzero()[:, 0].tolist()


def refuse_scores(scores: Tensor, name_of: Callable[[int], object], what: str) -> None:
    """Raises an error if scores ``(n, C)`` are not finite.

    Args:
        scores: Scores of any floating type.
        name_of: Returns the name of the image in a row.
        what: Name of the scores for the message.

    Raises:
        NotFiniteError: If a score is not finite; the message names the images.
    """
    if bool(all_finite([scores])):
        return
    found = [name_of(row) for row in rows_not_finite(scores)]
    if found:  # if none is found, all scores are finite and only their sum overflowed
        raise NotFiniteError(f"{what} of {len(found)} image(s) are not finite: {listed(found, 5)}. {REMEDY}.")


def problem_of_step(values: Mapping[str, Tensor], name_of: Callable[[int], object], weights: Sequence[str]) -> str:
    """Describes which loss terms, images and weights of a step are not finite.

    Args:
        values: Loss terms, each a scalar, and per-image tensors, each ``(B, ...)``.
        name_of: Returns the name of the image in a row.
        weights: Names of the weights that are not finite.
    """
    rows = sorted({row for value in values.values() if value.ndim > 1 for row in rows_not_finite(value)})
    images = [name_of(row) for row in rows]
    return (
        f"not finite: {listed(not_finite(values)) or 'values on another process, or a sum'}"
        + (f", of {len(images)} image(s): {listed(images, 5)}" if images else "")
        + (f"; the weights {listed(weights, 5)} are not finite either" if weights else "")
    )
