"""Training hooks, which extend the training of networks that need more than logits and labels."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.processes import WholeBatch


class Moment(NamedTuple):
    """The position in a run at which a hook is called.

    Attributes:
        epoch: The current epoch, counted from 0.
        step: The step within the epoch, counted from 0.
        steps: Number of steps per epoch.
        seed: Seed of the run.
    """

    epoch: int
    step: int = 0
    steps: int = 1
    seed: int = 0

    @property
    def passed(self) -> float:
        """Returns the number of epochs since training began, including the fraction of the current epoch."""
        return self.epoch + self.step / max(self.steps, 1)

    def generator(self) -> torch.Generator:
        """Returns a CPU generator that is seeded with (seed, epoch, step) and therefore identical in all processes."""
        stream = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, self.step, _STREAM))
        return torch.Generator().manual_seed(int(stream.generate_state(1)[0]))


_STREAM = 7  # differs from the streams of dropout, which contain the rank instead


class Seen(NamedTuple):
    """Features of selected training labels. They are identical in all processes.

    Attributes:
        rows: ``(n,)`` int64, the rows of the labeled images in ascending order.
        classes: ``(n,)`` int64, the classes of the labels.
        features: ``(n, d)``, the features of the labels in their images.
        notes: ``(n,)``, the corresponding ``notes`` of the network's output, or None.
    """

    rows: Tensor
    classes: Tensor
    features: Tensor
    notes: Tensor | None


class Batch(NamedTuple):
    """The batch of a training step, as passed to the hooks.

    Attributes:
        output: The network's output for the images of this process.
        targets: ``(B, C)`` int8 in {1, 0, -1}, labels and pseudo-labels of the same images.
        whole: Joins the rows of all processes.
    """

    output: NetworkOutput
    targets: Tensor
    whole: WholeBatch

    @property
    def features(self) -> Tensor:
        """Label features ``(B, C, d)`` of the output."""
        return cast(Tensor, self.output.label_features)


class TrainingHooks(nn.Module):
    """Base class of ``network.hooks``. The training loop calls each method at a defined time.

    Store state in buffers and learned values in parameters. They are saved and restored as part of the network. The
    methods run in all processes and must produce the same state in each of them.
    """

    def before_training(self, network: Any, labels: Tensor) -> None:
        """Runs once before the first step of a run, and again when a run is resumed.

        Args:
            network: The network that has these hooks.
            labels: Labels of the labeled images, ``(m, C)`` int8 in {1, 0, -1}, on the CPU.
        """

    def idle(self, moment: Moment) -> bool:
        """Returns whether no loss term uses the parameters of the hooks in this epoch.

        The optimizer then skips these parameters, since weight decay would change them otherwise.
        """
        return False

    def wanted(self, labels: Tensor, moment: Moment) -> Tensor | None:
        """Selects the labels whose features :meth:`before_epoch` receives.

        Args:
            labels: See :meth:`before_training`.
            moment: The start of an epoch.

        Returns:
            ``(m, C)`` bool, or None if no features are needed.
        """
        return None

    def before_epoch(self, seen: Seen, moment: Moment) -> None:
        """Runs before the first step of an epoch for which :meth:`wanted` selected labels.

        Args:
            seen: Features of these labels in the plain views, computed with the current weights and without gradients.
            moment: The start of the epoch.
        """

    def terms(self, network: Any, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Returns the terms to add to the loss of a step.

        Args:
            network: The network.
            batch: The batch of the step.
            moment: The position of the step in the run.

        Returns:
            A scalar for each name under which a term is logged, already multiplied by its weight. The loss uses the
            mean of the scalars over the processes; see :func:`~cbsa_lightning.networks.processes.mean_over`.
        """
        return {}
