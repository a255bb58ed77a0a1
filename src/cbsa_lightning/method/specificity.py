"""Measures whether a network gives each label its own image feature."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from cbsa_lightning.method.metrics import MultilabelReport, mean_pairwise_cosine

COLLAPSED_COSINE = 0.99
"""Mean cosine between the features of two labels in one image above which the features are considered identical."""
COLLAPSED_GAIN = 0.01
"""Gain in mAP (in [0, 1]) over the mean feature below which label-specific features are considered useless."""


class Specificity(nn.Module):
    """Compares label-specific features with their mean over the images of one evaluation pass.

    A decoder can collapse: it then returns the same feature for every label, and only the text features distinguish the
    labels. Neither the loss nor mAP reveals this. Two metrics do: the *feature cosine*, the mean cosine between the
    features of two labels in one image, and the *specific gain*, the drop in mAP if the features of all labels are
    replaced by their mean.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.shared = MultilabelReport(num_classes)
        self.cosine = MeanMetric()
        self._warned = False

    def update(self, label_features: Tensor, mean_logits: Tensor, targets: Tensor) -> None:
        """Adds a batch.

        Args:
            label_features: ``(B, C, d)``.
            mean_logits: ``(B, C)``, logits after each image's features are replaced by their mean.
            targets: ``(B, C)`` in {1, 0, -1 unknown}.
        """
        self.shared.update(mean_logits, targets)
        self.cosine.update(mean_pairwise_cosine(label_features))

    def compute(self, mean_ap: Tensor) -> dict[str, Tensor]:
        """Returns ``specific_gain`` and ``feature_cosine`` over all processes.

        Args:
            mean_ap: mAP of the network with label-specific features.
        """
        gain = mean_ap - self.shared.compute()["mAP"]
        return {"specific_gain": gain, "feature_cosine": self.cosine.compute()}

    def reset(self) -> None:
        """Resets the metrics."""
        self.shared.reset()
        self.cosine.reset()

    def warn_if_collapsed(self, figures: dict[str, Tensor]) -> None:
        """Warns if the decoder has collapsed, at most once per instance."""
        gain, cosine = float(figures["specific_gain"]), float(figures["feature_cosine"])
        if self._warned or not (cosine > COLLAPSED_COSINE and gain < COLLAPSED_GAIN):
            return
        self._warned = True
        rank_zero_warn(
            f"The label decoder has collapsed: the features of two labels in one image have a mean cosine of "
            f"{cosine:.4f}, and replacing them with their mean changes mAP by {-100 * gain:+.2f} points. All labels "
            "share one image feature. See docs/explanation/choices.md, 'Label-specific features'."
        )
