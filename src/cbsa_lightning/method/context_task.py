"""Options of context identification (section 3.2), the paper's auxiliary task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import get_args

from torch import Tensor

from cbsa_lightning.arguments import check_choice, check_flags, check_kind, check_number
from cbsa_lightning.method.contexts import Assignment, partition


class Partition(ABC):
    """Base class of the methods that group classes into contexts. Subclass it to use your own method."""

    @abstractmethod
    def __call__(self, S: Tensor, num_contexts: int) -> Tensor:
        """Groups the classes.

        Args:
            S: Co-occurrence matrix ``(C, C)``, float64; see :func:`~cbsa_lightning.method.contexts.cooccurrence`.
            num_contexts: K.

        Returns:
            ``(C,)`` int64 context ids in [0, K).

        Raises:
            ConfigError: If the classes do not form K contexts. The run then trains without contexts.
        """


class NormalizedCut(Partition):
    """Spectral clustering, the paper's method (Eq. 9, 10).

    Args:
        assign: Method that turns the eigenvectors into groups; ``cluster_qr`` does not need a random start.

    Raises:
        ConfigError: If ``assign`` is unknown.
    """

    def __init__(self, assign: Assignment = "cluster_qr") -> None:
        check_choice("assign", assign, get_args(Assignment))
        self.assign: Assignment = assign

    def __call__(self, S: Tensor, num_contexts: int) -> Tensor:
        """See :func:`~cbsa_lightning.method.contexts.partition`."""
        return partition(S, num_contexts, self.assign)


class ContextTask:
    """Settings of context identification: how contexts are computed from labels, and the weight of the context loss.

    Args:
        weight: Weight of the context loss in Eq. 12.
        confidence: Threshold tau of Eq. 11. An unlabeled image gets a context target only if the context probability
            of its weak view exceeds tau.
        soft_targets: Whether the target of an image is the distribution of its labels over the contexts, instead of
            the context that most of its labels belong to.
        partition: Method that groups the classes. The default is ``NormalizedCut()``.
        power: Exponent that is applied to the co-occurrences before they are made symmetric; CPSD uses 0.5.
        pseudo_weight: Weight of a pseudo-labeled image in the co-occurrences, relative to 1 for a labeled image. If it
            is 0, as in the paper, the partition depends only on the labeled images. If it is positive, the partition is
            recomputed in each epoch from labels and pseudo-labels.

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
