"""Makes fused optimizers work with gradient clipping."""

from __future__ import annotations

from torch.optim import Optimizer


def unfuse(optimizer: Optimizer) -> None:
    """Switches an optimizer to its unfused form, in place.

    Fused optimizers unscale float16 gradients within their step, so Lightning refuses to clip them. It checks the
    attribute below, even for bfloat16, which needs no scaling.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group.update(fused=False, foreach=True)
