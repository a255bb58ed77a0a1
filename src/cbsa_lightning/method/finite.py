"""Numbers that are NaN or infinite: noticed before they do harm, and named."""

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
    """Whether all of them are, as a bool tensor; a sum keeps NaN and infinity, so no mask of each is needed."""
    return torch.stack([value.detach().float().sum() for value in values if value is not None]).isfinite().all()


def not_finite(values: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity; waits for a device once."""
    floating = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
    if not floating:
        return []
    finite = torch.stack([value.detach().isfinite().all() for value in floating.values()])
    return [name for name, ok in zip(floating, finite.tolist(), strict=True) if not ok]


def rows_not_finite(values: Tensor) -> list[int]:
    """Rows of ``(B, ...)`` in which a value is NaN or infinite."""
    wrong = ~values.detach().isfinite().flatten(1).all(1)
    return wrong.nonzero()[:, 0].tolist()


def refuse_scores(scores: Tensor, name_of: Callable[[int], object], what: str) -> None:
    """Refuses scores ``(n, C)`` that are not finite.

    Args:
        scores: Any floating type.
        name_of: Name of the image of a row.
        what: The scores, for the message.

    Raises:
        NotFiniteError: Naming the images.
    """
    if bool(all_finite([scores])):
        return
    found = [name_of(row) for row in rows_not_finite(scores)]
    if found:  # none: the sum alone was too large
        raise NotFiniteError(f"{what} of {len(found)} image(s) are not finite: {listed(found, 5)}. {REMEDY}.")


def problem_of_step(values: Mapping[str, Tensor], name_of: Callable[[int], object], weights: Sequence[str]) -> str:
    """Says what is wrong in a step: which terms, of which images, and which weights.

    Args:
        values: Terms of the loss, each a number, and what is there for each image, each ``(B, ...)``.
        name_of: Name of the image of a row.
        weights: Names of the weights that are not finite.
    """
    rows = sorted({row for value in values.values() if value.ndim > 1 for row in rows_not_finite(value)})
    images = [name_of(row) for row in rows]
    return (
        f"not finite are {listed(not_finite(values)) or 'values on another process, or a sum'}"
        + (f", of {len(images)} image(s): {listed(images, 5)}" if images else "")
        + (f"; so are the weights {listed(weights, 5)}" if weights else "")
    )
