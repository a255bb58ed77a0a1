"""Options of context identification (section 3.2), the paper's auxiliary task."""

from __future__ import annotations

from typing import Literal

Assignment = Literal["cluster_qr", "kmeans", "kmeans_rownorm"]


class ContextTask:
    """How contexts are made from labels, and how much their loss weighs.

    Args:
        weight: Factor of the context loss in Eq. 12.
        confidence: tau of Eq. 11; an unlabelled image counts once its weak view is surer than this of its context.
        soft_targets: Counts of the labels' contexts as a distribution, instead of the majority's context (D2-10).
        assign: How eigenvectors become groups (D2-9); ``cluster_qr`` needs no random start.
        power: Exponent of the co-occurrence before it is made symmetric; 0.5 is CPSD's (D2-7).
        pseudo_weight: How much a pseudo-labelled image counts in the co-occurrence that is taken anew each epoch,
            beside 1 for a labelled image; 0 keeps the partition of the labelled images.
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
        self.weight = weight
        self.confidence = confidence
        self.soft_targets = soft_targets
        self.assign: Assignment = assign
        self.power = power
        self.pseudo_weight = pseudo_weight
