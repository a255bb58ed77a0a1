"""Options of context identification (section 3.2), the paper's auxiliary task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import get_args

from torch import Tensor

from cbsa_lightning.arguments import check_choice, check_flags, check_kind, check_number
from cbsa_lightning.method.contexts import Assignment, partition


class Partition(ABC):
    """How classes are grouped into contexts. Subclass it to try your own method."""

    @abstractmethod
    def __call__(self, S: Tensor, num_contexts: int) -> Tensor:
        """Groups the classes.

        Args:
            S: ``(C, C)`` float64 co-occurrence, see :func:`~cbsa_lightning.method.contexts.cooccurrence`.
            num_contexts: K.

        Returns:
            ``(C,)`` int64 context ids in [0, K).

        Raises:
            ConfigError: The classes do not form K contexts. A run then trains without contexts.
        """


class NormalizedCut(Partition):
    """Spectral clustering, the paper's method (Eq. 9, 10).

    Args:
        assign: How eigenvectors become groups; ``cluster_qr`` needs no random start.

    Raises:
        ConfigError: An unknown assignment.
    """

    def __init__(self, assign: Assignment = "cluster_qr") -> None:
        check_choice("assign", assign, get_args(Assignment))
        self.assign: Assignment = assign

    def __call__(self, S: Tensor, num_contexts: int) -> Tensor:
        """See :func:`~cbsa_lightning.method.contexts.partition`."""
        return partition(S, num_contexts, self.assign)


class ContextTask:
    """Settings of context identification: how contexts are made from labels, and the weight of their loss.

    Args:
        weight: Factor of the context loss in Eq. 12.
        confidence: tau of Eq. 11; an unlabeled image gets a context target only if the context probability of its weak
            view exceeds tau.
        soft_targets: Use the distribution over the contexts of an image's labels as target, instead of the majority
            context.
        partition: Groups the classes; None: ``NormalizedCut()``.
        power: Exponent of the co-occurrence before it is made symmetric; CPSD uses 0.5.
        pseudo_weight: Weight of a pseudo-labeled image in the co-occurrence, relative to 1 for a labeled image. With 0,
            as in the paper, the partition is that of the labeled images. With a positive weight, it is recomputed in
            each epoch from labels and pseudo-labels.

    Raises:
        ConfigError: If an option has the wrong type or is outside its range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        confidence: float = 0.9,
        soft_targets: bool = False,
        partition: Partition | None = None,
        power: float = 1.0,
        pseudo_weight: float = 0.0,
    ) -> None:
        for name, value in (("weight", weight), ("power", power), ("pseudo_weight", pseudo_weight)):
            check_number(f"contexts.{name}", value, 0)
        check_number("contexts.confidence", confidence, 0, 1)
        check_flags(soft_targets=soft_targets)
        check_kind("contexts.partition", partition, Partition, 'an object such as NormalizedCut(assign="kmeans")')
        self.weight = weight
        self.confidence = confidence
        self.soft_targets = soft_targets
        self.partition = partition if partition is not None else NormalizedCut()
        self.power = power
        self.pseudo_weight = pseudo_weight
