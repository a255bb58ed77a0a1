"""CBSAModule, the paper's method with the paper's settings as defaults."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import AdamW

from cbsa_lightning.method.context_task import ContextTask
from cbsa_lightning.method.decisions import Objective
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.labelers import EvidenceLabeler, Labeler
from cbsa_lightning.method.losses import ElementwiseLoss
from cbsa_lightning.networks.cbsa import SETTINGS, CBSANetwork
from cbsa_lightning.training.module import AverageCallable, SSMLLModule
from cbsa_lightning.training.schedules import SchedulerCallable


class CBSAModule(SSMLLModule):
    """Context-based semantic-aware alignment, with the paper's settings as defaults.

    If the paper does not specify a setting or contradicts itself, ``docs/explanation/choices.md`` gives the default and
    the reason.

    Args:
        class_names: The C class names.
        prompt_names: Class names in prompts. The default is ``class_names`` with "_" replaced by a space.
        contexts: Options of context identification.
        labeler: Computes pseudo-labels. The default is CAT. ``StackedProbes()`` is more robust if there are few labels;
            ``LabeledOnly()`` trains on labeled images only.
        loss: Element-wise loss. The default is ASL(0, 4, 0.05).
        warmup_epochs: Number of epochs on labeled images only.
        unsup_weight: Weight of the loss on pseudo-labels.
        ema_decay: Decay of the average of the weights, with which pseudo-labels and reported metrics are computed. By
            default, the decay is chosen so that the average covers a seventh of the second stage's steps, as a decay of
            about 0.9997 does in the paper's VOC runs.
        average: Builds this average from the network and the decay.
        optimizer: Builds the optimizer from parameter groups.
        scheduler: Builds the schedule of a stage. The default is one-cycle.
        second_scheduler: Builds the schedule of the second stage. The default is ``scheduler``.
        max_skipped_steps: Number of consecutive steps that may be skipped because their loss is not finite. With 0, the
            run stops at the first such step.
        stack_share: Weight of the labeler's stack in the final scores; a value above 0 needs ``StackedProbes()``.
        objective: Chooses the decision thresholds. The default is ``Share()``.
        **network: Settings of :class:`~cbsa_lightning.networks.cbsa.CBSANetwork`, such as ``clip`` and
            ``num_contexts``.

    Raises:
        ConfigError: If settings are inconsistent with each other or with the towers.
        WeightsError: If the CLIP weights are not available.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        prompt_names: Sequence[str] | None = None,
        contexts: ContextTask | None = None,
        labeler: Labeler | EvidenceLabeler | None = None,
        loss: ElementwiseLoss | None = None,
        warmup_epochs: int = 8,
        unsup_weight: float = 1.0,
        ema_decay: float | None = 0.9997,
        average: AverageCallable = ParameterEMA,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-3, weight_decay=1e-4, fused=True),
        scheduler: SchedulerCallable | LRSchedulerCallable | None = None,
        second_scheduler: SchedulerCallable | LRSchedulerCallable | None = None,
        max_skipped_steps: int = 0,
        stack_share: float = 0.0,
        objective: Objective | None = None,
        **network: Any,
    ) -> None:
        super().__init__(
            class_names,
            lambda names: CBSANetwork(names, **network),
            prompt_names=prompt_names,
            labeler=labeler,
            loss=loss,
            contexts=contexts,
            warmup_epochs=warmup_epochs,
            unsup_weight=unsup_weight,
            ema_decay=ema_decay,
            average=average,
            optimizer=optimizer,
            scheduler=scheduler,
            second_scheduler=second_scheduler,
            max_skipped_steps=max_skipped_steps,
            stack_share=stack_share,
            objective=objective,
        )
        # Objects are excluded, because a checkpoint contains only plain types and can therefore be loaded without
        # running code. A custom decoder is stored only by name. Defaults are included, so that a checkpoint still
        # describes the same network if the defaults change.
        plain = {name: repr(value) if callable(value) else value for name, value in network.items()}
        self.save_hyperparameters(SETTINGS | plain)


def _whole_signature() -> inspect.Signature:
    """Returns the constructor's signature with the network's settings in place of ``**network``."""
    *own, _ = inspect.signature(CBSAModule).parameters.values()
    of_network = inspect.signature(CBSANetwork).parameters
    settings = [of_network[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in SETTINGS]
    return inspect.Signature([*own, *settings])


# `help` and the hints for misspelled settings use this signature.
CBSAModule.__signature__ = _whole_signature()  # type: ignore[attr-defined]
