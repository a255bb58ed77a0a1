"""Training hooks: what a network brings along when its training needs more than logits and labels."""

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
        epoch: The present epoch, from 0.
        step: Step of the epoch, from 0.
        steps: Steps of an epoch.
        seed: Seed of the run.
    """

    epoch: int
    step: int = 0
    steps: int = 1
    seed: int = 0

    @property
    def passed(self) -> float:
        """Epochs since training began, with the share of the present one."""
        return self.epoch + self.step / max(self.steps, 1)

    def generator(self) -> torch.Generator:
        """Random numbers that are a function of (seed, epoch, step), the same on all processes; on the CPU."""
        stream = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, self.step, _STREAM))
        return torch.Generator().manual_seed(int(stream.generate_state(1)[0]))


_STREAM = 7  # apart from that of the steps' dropout, whose third number is the rank


class Seen(NamedTuple):
    """What a network makes of chosen labels of the training images, the same on all processes.

    Attributes:
        rows: ``(n,)`` int64, rows of the labeled images, ascending.
        classes: ``(n,)`` int64.
        features: ``(n, d)``, the label's feature in the image.
        notes: ``(n,)`` what the output's ``notes`` say, or None.
    """

    rows: Tensor
    classes: Tensor
    features: Tensor
    notes: Tensor | None


class Batch(NamedTuple):
    """A training step as the hooks see it.

    Attributes:
        output: What the network made of this process's images.
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
    """Base of the objects that a network may have as ``network.hooks``; each method is called at its moment.

    State belongs in buffers, and what is learned in parameters: as a part of the network they are saved, resumed, and
    kept the same on all processes. The methods run on all processes and must leave the same state on each.
    """

    def before_training(self, network: Any, labels: Tensor) -> None:
        """Runs once before the first step of a fit, resumed ones too.

        Args:
            network: The network that has these hooks.
            labels: ``(m, C)`` int8 in {1, 0, -1} of the labeled images, on the CPU.
        """

    def idle(self, moment: Moment) -> bool:
        """Whether no term uses the parameters of the hooks in this step; they then keep their values.

        An optimizer would otherwise move them by its weight decay.
        """
        return False

    def wanted(self, labels: Tensor, moment: Moment) -> Tensor | None:
        """Chooses the labels whose features :meth:`before_epoch` gets; None where it needs no pass over images.

        Args:
            labels: As in :meth:`before_training`.
            moment: The start of an epoch.

        Returns:
            ``(m, C)`` bool, or None.
        """
        return None

    def before_epoch(self, seen: Seen, moment: Moment) -> None:
        """Runs before the first step of an epoch for which :meth:`wanted` chose labels.

        Args:
            seen: Their features in the undistorted images by the present weights, without gradient.
            moment: The start of the epoch.
        """

    def terms(self, network: Any, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Gives the terms that are added to the loss of a step, weights included, by the name they are logged under.

        Args:
            network: The network.
            batch: The step.
            moment: Its place in the run.

        Returns:
            Scalars. What counts is their mean over the processes; see
            :func:`~cbsa_lightning.networks.processes.mean_over`.
        """
        return {}
