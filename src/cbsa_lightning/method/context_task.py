"""Options of context identification (section 3.2), the paper's auxiliary task."""

from __future__ import annotations

from typing import get_args

from cbsa_lightning.arguments import check_choice, check_flags, check_number
from cbsa_lightning.method.contexts import Assignment


class ContextTask:
    """Settings of context identification: how contexts are made from labels, and the weight of their loss.

    Args:
        weight: Factor of the context loss in Eq. 12.
        confidence: tau of Eq. 11; an unlabeled image gets a context target only if the context probability of its weak
            view exceeds tau.
        soft_targets: Use the distribution over the contexts of an image's labels as target, instead of the majority
            context.
        assign: How the spectral embedding is turned into groups; ``cluster_qr`` needs no random start.
        power: Exponent of the co-occurrence before it is made symmetric; CPSD uses 0.5.
        pseudo_weight: Weight of a pseudo-labeled image in the co-occurrence that is recomputed in each epoch, relative
            to 1 for a labeled image; 0 keeps the partition of the labeled images.

    Raises:
        ConfigError: If an option has the wrong type or is outside its range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        confidence: float = 0.9,
        soft_targets: bool = False,
        assign: Assignment = "cluster_qr",
        power: float = 1.0,
        pseudo_weight: float = 1.0,
    ) -> None:
        for name, value in (("weight", weight), ("power", power), ("pseudo_weight", pseudo_weight)):
            check_number(f"contexts.{name}", value, 0)
        check_number("contexts.confidence", confidence, 0, 1)
        check_flags(soft_targets=soft_targets)
        check_choice("contexts.assign", assign, get_args(Assignment))
        self.weight = weight
        self.confidence = confidence
        self.soft_targets = soft_targets
        self.assign: Assignment = assign
        self.power = power
        self.pseudo_weight = pseudo_weight
