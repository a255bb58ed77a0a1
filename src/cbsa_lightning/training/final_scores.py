"""Final scores of a module, which may be fused with those of the labeler's stack, and the decision thresholds."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_lightning.arguments import check_kind, check_number
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.calibration import Calibration
from cbsa_lightning.method.decisions import Objective, Share, decide
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.method.labelers import Evidence, EvidenceLabeler, Labeler
from cbsa_lightning.method.stacking import StackLabeler, soft_labels, unlabeled_inputs
from cbsa_lightning.method.thresholds import class_thresholds
from cbsa_lightning.networks.prompted import Describer, PromptedCLIP


class FinalScores(nn.Module):
    """Mix-in for a LightningModule whose ``score`` returns the logits of its averaged weights.

    Attributes:
        cut: ``(C,)``, decision thresholds; NaN until they are set.
        fusion: Combines the network with the stack and is fitted when training starts. None without a stack.
        expected: ``(C, 6)``, expected precision and recall at the thresholds; see
            :class:`~cbsa_lightning.method.decisions.Decisions`.
        left_out: ``(m, C)``, out-of-fold probabilities of the labeled images.
    """

    network: Any
    class_names: list[str]
    score: Any
    cut: Tensor
    labeler: Labeler | EvidenceLabeler
    objective: Objective
    stack_share: float
    pseudo_labels: Tensor | None
    fusion: Fusion | None
    expected: Tensor | None
    left_out: Tensor | None
    _describer: tuple[Describer, ...]

    def prepare_scores(self, stack_share: float, objective: Objective | None) -> None:
        """Checks the settings and creates the state; the module calls this method once its network and labeler exist.

        Raises:
            ConfigError: If the network, the labeler or the objective does not fit ``stack_share``.
        """
        check_number("stack_share", stack_share, 0, 1)
        check_kind("objective", objective, Objective, "an object such as Precision(0.9)")
        if not stack_share and objective is not None and not isinstance(objective, Share):
            raise ConfigError(
                f"objective {type(objective).__name__} needs probabilities. Set stack_share to 0.5 and labeler to "
                "StackedProbes(), or use the objective Share(), which does not need probabilities."
            )
        if stack_share and not isinstance(self.labeler, StackLabeler):
            raise ConfigError("stack_share needs a labeler with a stack. Set labeler to StackedProbes().")
        if stack_share and not isinstance(self.network, PromptedCLIP):
            raise ConfigError(
                f"stack_share needs a network with frozen CLIP towers, not {type(self.network).__name__}."
            )
        self.stack_share = stack_share
        self.objective = objective if objective is not None else Share()
        # The tuple keeps the describer out of the state dict, since it is rebuilt from the loaded towers.
        self._describer = (self.network.describer(keep=True),) if stack_share else ()
        self.register_buffer("cut", torch.full((len(self.class_names),), torch.nan).float())
        self.fusion = self.expected = self.left_out = None

    def label_once(self, evidence: Evidence) -> Tensor:
        """Returns the labels of an evidence labeler; keeps its stack if the final scores are fused with it.

        Args:
            evidence: Evidence of the m labeled images, followed by the unlabeled images.

        Returns:
            ``(N, C)`` in the same order. The rows of labeled images are used for their unknown entries. They contain
            the out-of-fold probabilities of the stack, or -1 if the labeler is not a :class:`StackLabeler`.
        """
        if not isinstance(self.labeler, StackLabeler):
            made = cast(EvidenceLabeler, self.labeler)(evidence)
            return torch.cat([torch.full_like(evidence.labels, -1).to(made), made])
        stack = self.labeler.fit(evidence)
        inputs, left_out = unlabeled_inputs(evidence), stack.left_out()
        unlabeled = stack.logits(inputs)
        if self._describer:
            labels = evidence.labels.cpu().numpy()
            self.fusion = Fusion.of(stack, unlabeled if len(unlabeled) else left_out, labels, self.stack_share)
            self.left_out = self.fusion.calibrated(torch.from_numpy(left_out).float()).sigmoid()
        return soft_labels(np.concatenate([left_out, unlabeled]), evidence)

    def set_decisions(self, logits: Tensor, rows: Tensor, rates: Tensor) -> None:
        """Sets the decision thresholds, and the statistics for fusing logits.

        Args:
            logits: ``(n, C)``, the network's logits of the unlabeled images.
            rows: ``(n,)``, rows of the images in the train table.
            rates: ``(C,)``, fraction of positives among the labeled images.
        """
        if self.fusion is None:
            self._give_shares(logits, rates)
            return
        self.fusion = self.fusion.to(logits.device).adapted(logits)
        # Soft pseudo-labels are the stack's probabilities, or -1 for a class without known labels.
        soft = cast(Tensor, self.pseudo_labels)[rows].float()
        stack = torch.where(soft < 0, self.fusion.stack_mean, torch.logit(soft, eps=1e-4))
        averaged = self.fusion.averaged(logits, stack).cpu().numpy()
        calibration = Calibration.unpacked(self.fusion.calibration.cpu().numpy())
        found = decide(averaged, calibration, rates.cpu().numpy(), self.objective)
        self.cut.copy_(torch.from_numpy(found.thresholds))
        self.expected = torch.from_numpy(found.expected).float()

    def final_logits(self, features: Tensor) -> Tensor:
        """Returns the logits ``(B, C)`` for prediction, from the averaged weights and from the stack, if any."""
        return self.fused_logits(features, self.score(features).logits)

    def fused_logits(self, features: Tensor, logits: Tensor) -> Tensor:
        """Returns the final logits ``(B, C)`` from frozen features and the network's logits for these features."""
        if self.fusion is None or not self.fusion.ready:
            return logits
        self.fusion = self.fusion.to(features.device)  # it is on the CPU after a checkpoint is loaded
        describe = self._describer[0].to(features.device)
        return self.fusion.fused(logits, self.fusion.stack_logits(describe(features)))

    def forward(self, images: Tensor) -> Tensor:
        """Returns probabilities ``(B, C)`` of uint8 images ``(B, 3, S, S)``; see :meth:`final_logits`."""
        return self.final_logits(self.network.features(images)).float().sigmoid()

    def decision_thresholds(self) -> Tensor:
        """Returns the decision thresholds ``(C,)``; see :meth:`set_decisions`.

        They are 0.5 if they were never set, for example after training on labeled images only without validation.
        """
        return torch.where(self.cut.isnan(), torch.full_like(self.cut, 0.5), self.cut)

    def _give_shares(self, logits: Tensor, rates: Tensor) -> None:
        """Sets thresholds at which each class gets the fraction ``rates`` of the images in ``logits (n, C)``."""
        self.cut.copy_(class_thresholds(logits.sigmoid(), rates, 1.0, 0.0)[0])
