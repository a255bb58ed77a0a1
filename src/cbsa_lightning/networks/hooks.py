"""Training hooks: extend the training of a network that needs more than logits and labels."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.processes import WholeBatch


class Moment(NamedTuple):
    """When a hook is called.

    Attributes:
        epoch: The current epoch, from 0.
        step: The step within the epoch, from 0.
        steps: Steps per epoch.
        seed: Seed of the run.
    """

    epoch: int
    step: int = 0
    steps: int = 1
    seed: int = 0

    @property
    def passed(self) -> float:
        """Returns the epochs since training began, including the fraction of the current one."""
        return self.epoch + self.step / max(self.steps, 1)

    def generator(self) -> torch.Generator:
        """Returns a CPU generator seeded by (seed, epoch, step), the same on all processes."""
        stream = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, self.step, _STREAM))
        return torch.Generator().manual_seed(int(stream.generate_state(1)[0]))


_STREAM = 7  # apart from that of the steps' dropout, whose third number is the rank


class Seen(NamedTuple):
    """Label features of selected entries of the training labels, the same on all processes.

    Attributes:
        rows: ``(n,)`` int64, rows of the labeled images, ascending.
        classes: ``(n,)`` int64.
        features: ``(n, d)``, the feature of the label in the image.
        notes: ``(n,)``, the corresponding ``notes`` of the output, or None.
    """

    rows: Tensor
    classes: Tensor
    features: Tensor
    notes: Tensor | None


class Batch(NamedTuple):
    """A training step as the hooks see it.

    Attributes:
        output: The network's output for the images of this process.
        targets: ``(B, C)`` int8 in {1, 0, -1}, labels and pseudo-labels of this process's images.
        whole: Joins rows over the processes.
    """

    output: NetworkOutput
    targets: Tensor
    whole: WholeBatch

    @property
    def features(self) -> Tensor:
        """Label features ``(B, C, d)`` of the output."""
        return cast(Tensor, self.output.label_features)


class TrainingHooks(nn.Module):
    """Base class of ``network.hooks``. The training loop calls each method at a fixed point.

    Keep state in buffers and learned values in parameters: as part of the network, they are saved and restored. The
    methods run on all processes and must produce the same state on each.
    """

    def before_training(self, network: Any, labels: Tensor) -> None:
        """Runs once before the first step of a fit, also of a resumed one.

        Args:
            network: The network that has these hooks.
            labels: ``(m, C)`` int8 in {1, 0, -1} of the labeled images, on the CPU.
        """

    def idle(self, moment: Moment) -> bool:
        """Returns whether no term uses the parameters of the hooks in this epoch; the optimizer then skips them.

        Weight decay would otherwise change them.
        """
        return False

    def wanted(self, labels: Tensor, moment: Moment) -> Tensor | None:
        """Selects the labels whose features :meth:`before_epoch` receives.

        Args:
            labels: As in :meth:`before_training`.
            moment: The start of an epoch.

        Returns:
            ``(m, C)`` bool, or None if no pass over the images is needed.
        """
        return None

    def before_epoch(self, seen: Seen, moment: Moment) -> None:
        """Runs before the first step of an epoch for which :meth:`wanted` selected labels.

        Args:
            seen: Their features in the undistorted images by the present weights, without gradient.
            moment: The start of the epoch.
        """

    def terms(self, network: Any, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Returns the terms to add to the loss of a step, including their weights, by the name for logging.

        Args:
            network: The network.
            batch: The step.
            moment: Its place in the run.

        Returns:
            Scalars. Their mean over the processes counts; see
            :func:`~cbsa_lightning.networks.processes.mean_over`.
        """
        return {}
