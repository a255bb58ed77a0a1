"""Options of context identification (section 3.2), the paper's auxiliary task."""

from __future__ import annotations

from typing import get_args

from cbsa_lightning.arguments import check_choice, check_flags, check_number
from cbsa_lightning.method.contexts import Assignment


class ContextTask:
    """How contexts are made from labels, and how much their loss weighs.

    Args:
        weight: Factor of the context loss in Eq. 12.
        confidence: tau of Eq. 11; an unlabeled image counts once its weak view is surer than this of its context.
        soft_targets: Counts of the labels' contexts as a distribution, instead of the majority's context.
        assign: How eigenvectors become groups; ``cluster_qr`` needs no random start.
        power: Exponent of the co-occurrence before it is made symmetric; 0.5 is CPSD's.
        pseudo_weight: How much a pseudo-labeled image counts in the co-occurrence that is recomputed each epoch,
            beside 1 for a labeled image; 0 keeps the partition of the labeled images.

    Raises:
        ConfigError: For an option of another type or outside its range.
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
