"""The training loop, which works with any network and labeler (Eqs. 6-8, 11, 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from cbsa_lightning import lightning_private
from cbsa_lightning.arguments import check_kind, check_names, check_number
from cbsa_lightning.callbacks.baselines import MeasureBaselines
from cbsa_lightning.callbacks.contexts import UpdateContexts
from cbsa_lightning.callbacks.data_summary import DataSummary
from cbsa_lightning.callbacks.epoch_timer import EpochTimer
from cbsa_lightning.callbacks.features import CacheFeatures
from cbsa_lightning.callbacks.hooks import RunHooks
from cbsa_lightning.callbacks.last_validation import ValidateLastEpoch
from cbsa_lightning.callbacks.limits import ResultLimits
from cbsa_lightning.callbacks.monitors import CheckMonitors
from cbsa_lightning.callbacks.resume import ExactResume
from cbsa_lightning.callbacks.stage_length import stage_steps
from cbsa_lightning.callbacks.stages import Stages
from cbsa_lightning.callbacks.thresholds import UpdateThresholds
from cbsa_lightning.callbacks.training_checks import TrainingChecks
from cbsa_lightning.checkpoints.lean import LeanCheckpoint
from cbsa_lightning.data.batches import TrainBatch
from cbsa_lightning.data.class_names import default_prompts
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.context_task import ContextTask
from cbsa_lightning.method.decisions import Objective
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.labelers import ClassDistributionAware, Evidence, EvidenceLabeler, LabeledOnly, Labeler
from cbsa_lightning.method.losses import AsymmetricLoss, ElementwiseLoss
from cbsa_lightning.networks.base import Network
from cbsa_lightning.training.evaluation import Evaluation, Stage
from cbsa_lightning.training.loggers import begin_wandb_runs
from cbsa_lightning.training.nonfinite_steps import NonFiniteSteps
from cbsa_lightning.training.schedules import OneCycle, SchedulerCallable, scheduled
from cbsa_lightning.training.step_loss import step_loss

NetworkCallable = Callable[[Sequence[str]], Network]
"""Builds a network for given prompt names."""
AverageCallable = Callable[[nn.Module, float], ParameterEMA]
"""Builds the average of a network's weights with a given decay."""
LossCallable = Callable[[Tensor, Tensor], Tensor]
"""Element-wise loss of logits ``(B, C)`` and targets in {1, 0, -1}; it is 0 for entries whose target is -1."""


class SSMLLModule(LeanCheckpoint, Evaluation):
    """Semi-supervised multi-label training of a network.

    The first ``warmup_epochs`` epochs use labeled images only. At the start of each later epoch, the averaged weights
    score the weak view of every unlabeled image, and ``labeler`` converts the scores to pseudo-labels. Each step then
    trains on strong views of labeled and unlabeled images. State that is updated once per epoch is stored in buffers,
    so a checkpoint is sufficient for prediction. The initial value of a buffer is NaN or -1.

    Args:
        class_names: The C class names.
        prompt_names: Class names in prompts. The default is ``class_names`` with "_" replaced by a space.
        network: Builds the network from the prompt names.
        labeler: Computes pseudo-labels in each epoch (:class:`Labeler`) or once (:class:`EvidenceLabeler`). The default
            is the paper's CAT. ``LabeledOnly()`` trains on labeled images only.
        loss: Element-wise loss of logits and targets in {1, 0, -1}.
        contexts: Options of context identification, which are used if the network has a context head.
        warmup_epochs: Number of epochs in the first stage. It is 0 for a network without trainable parameters.
        unsup_weight: Weight of the loss on pseudo-labels.
        max_skipped_steps: Number of consecutive steps that may be skipped because their loss is not finite. If there
            are more, the run stops. With 0, it stops at the first such step.
        ema_decay: Weight of the old average in each optimizer step. The average starts from the raw weights at the end
            of the warm-up; until then, the raw weights are used. By default, the decay is chosen so that the average
            covers a seventh of the second stage's steps, as a decay of about 0.9997 does in the paper's VOC runs.
        average: Builds the average from the network and the decay.
        stack_share: Weight of the labeler's stack in the final scores, in [0, 1]. With 0, only the network is used, and
            with 1, only the stack. If the weight is above 0, the scores are calibrated probabilities, computed from the
            averaged logits of stack and network (see :mod:`~cbsa_lightning.method.fusion`). This needs a
            :class:`~cbsa_lightning.method.stacking.StackLabeler` such as ``StackedProbes``, and the network's own mAP
            is logged as ``val/mAP_network``.
        objective: Chooses the decision thresholds; see :mod:`~cbsa_lightning.method.decisions`. The default is
            ``Share()``, which assigns each class to the same fraction of images as in the labeled set. Other objectives
            need a ``stack_share``.
        optimizer: Builds the optimizer from parameter groups. The default is fused AdamW with the paper's learning rate
            of 1e-3. The paper does not state a weight decay, so that of CAP is used.
        scheduler: Builds the schedule of a stage from the optimizer and the stage's number of steps, or a scheduler of
            torch; see :func:`~cbsa_lightning.training.schedules.scheduled`. The default is one-cycle.
        second_scheduler: Builds the schedule of the second stage. The default is ``scheduler``.
    """

    network: Network
    tau_pos: Tensor
    tau_neg: Tensor
    positive_rate: Tensor
    context_partition: Tensor
    tells_limits = True  # False for fits that are only measurements

    def __init__(
        self,
        class_names: Sequence[str],
        network: NetworkCallable,
        prompt_names: Sequence[str] | None = None,
        labeler: Labeler | EvidenceLabeler | None = None,
        loss: ElementwiseLoss | LossCallable | None = None,
        contexts: ContextTask | None = None,
        warmup_epochs: int = 8,
        unsup_weight: float = 1.0,
        ema_decay: float | None = 0.9997,
        average: AverageCallable = ParameterEMA,
        # A lambda in the signature lets jsonargparse read its settings, for example --model.optimizer.lr 0.01.
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-3, weight_decay=1e-4, fused=True),
        scheduler: SchedulerCallable | LRSchedulerCallable | None = None,
        second_scheduler: SchedulerCallable | LRSchedulerCallable | None = None,
        max_skipped_steps: int = 0,
        stack_share: float = 0.0,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        class_names = check_names("class_names", class_names)
        if prompt_names is not None:
            prompt_names = check_names("prompt_names", prompt_names, len(class_names))
        check_kind("labeler", labeler, (Labeler, EvidenceLabeler), "an object such as TopK(k=2)")
        check_kind("contexts", contexts, ContextTask, "a ContextTask()")
        made = {
            **{"network": network, "loss": loss, "average": average, "optimizer": optimizer},
            **{"scheduler": scheduler, "second_scheduler": second_scheduler},
        }
        for name, value in made.items():
            if value is not None and not callable(value):
                raise ConfigError(
                    f"{name} cannot be a {type(value).__name__} ({value!r:.60}); pass a function or class."
                )
        check_number("warmup_epochs", warmup_epochs, 0, whole=True)
        check_number("unsup_weight", unsup_weight, 0)
        if ema_decay is not None:
            check_number("ema_decay", ema_decay, 0, 1)
        check_number("max_skipped_steps", max_skipped_steps, 0, whole=True)
        # Objects are excluded, because a checkpoint contains only plain types and can be loaded without running code.
        self.save_hyperparameters("class_names", "prompt_names", "warmup_epochs", "unsup_weight", "ema_decay")
        self.class_names = class_names
        self.prompt_names = list(prompt_names if prompt_names is not None else default_prompts(class_names))
        self.make_network = network
        self.network = network(self.prompt_names)
        self.labeler = labeler if labeler is not None else ClassDistributionAware()
        self.loss = loss if loss is not None else AsymmetricLoss()
        self.contexts = contexts if contexts is not None else ContextTask()
        self.trains = any(p.requires_grad for p in self.network.parameters())
        self.warmup_epochs = warmup_epochs if self.trains else 0
        self.unsup_weight = unsup_weight
        self.evidence: Evidence | None = None  # set from the start of a fit to its first epoch
        self.make_optimizer = optimizer
        self.make_schedule = scheduler if scheduler is not None else OneCycle()
        self.make_second_schedule = second_scheduler if second_scheduler is not None else self.make_schedule
        self.ema_decay = ema_decay
        self.ema = average(self.network, 0.0 if ema_decay is None else ema_decay)
        # All processes compute the same averages, so DDP does not have to broadcast them in each step. This does not
        # apply to running statistics that are not synchronized, since they differ between processes.
        self._ddp_params_and_buffers_to_ignore = [
            f"ema.{name}" for name, _ in self.ema.named_buffers() if "__running_" not in name
        ]

        num_classes = len(self.class_names)
        unset = torch.full((num_classes,), torch.nan).float()
        self.register_buffer("tau_pos", unset.clone())
        self.register_buffer("tau_neg", unset.clone())
        self.register_buffer("positive_rate", unset.clone())
        self.register_buffer("context_partition", torch.full((num_classes,), -1))
        # Tables over the rows of the train table, filled once per epoch by the callbacks.
        self.pseudo_labels: Tensor | None = None
        self.context_targets: Tensor | None = None
        self.prepare_scores(stack_share, objective)
        self.prepare_evaluation()
        self.lr: float | None = None  # set by learning-rate finders; overrides the learning rate of the optimizer
        self.optimizer_settings: dict[str, Any] = {}  # at construction, before a schedule changes them
        self.scheduled_steps = 0  # length of the current schedule
        self.stage_began_at = 0  # number of optimizer steps before the current stage
        self.asked_to_end = False  # set by the signal handler of this process; see ExactResume
        self.nonfinite = NonFiniteSteps(self, max_skipped_steps)

    @property
    def stage(self) -> Stage:
        """The images that the current epoch trains on."""
        return "warm-up" if self.current_epoch < self.warmup_epochs else self.second_stage

    @property
    def second_stage(self) -> Stage:
        """The images that training uses after the warm-up."""
        return "labeled-only" if isinstance(self.labeler, LabeledOnly) else "semi-supervised"

    @property
    def num_contexts(self) -> int:
        """The number K of contexts, which is 0 without context identification."""
        return self.network.num_contexts

    def configure_callbacks(self) -> list[L.Callback]:
        """Returns the callbacks of the method; their order matters.

        Lightning calls this method right before it starts the loggers.
        """
        begin_wandb_runs(self.trainer.loggers)
        thresholds = UpdateThresholds()
        callbacks: list[L.Callback] = [
            TrainingChecks(),
            CheckMonitors(),
            ValidateLastEpoch(),
            ExactResume(),
            CacheFeatures(),
            Stages(),
            thresholds,
            RunHooks(),
        ]
        callbacks += [UpdateContexts(thresholds)] if self.num_contexts else []
        callbacks.append(EpochTimer())
        if not self.tells_limits:
            return callbacks
        own = [c for c in cast(Any, self.trainer).callbacks if isinstance(c, MeasureBaselines)]
        baselines = own[0] if own else MeasureBaselines(always_probes=False)
        return [*callbacks, DataSummary(), baselines, ResultLimits(baselines)]

    def configure_optimizers(self) -> Any:
        """Builds the optimizer and schedule of the current stage; :class:`Stages` calls this when the stage changes."""
        if not self.trains:
            self.scheduled_steps = self.stage_steps()
            return None
        groups = self.network.parameter_groups()
        scales = [group.pop("lr_scale") for group in groups]
        optimizer = self.make_optimizer(groups)
        for group in optimizer.param_groups if self.lr is not None else ():
            group["lr"] = self.lr
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] *= scale
        if self._clips_under_mixed_precision():
            lightning_private.unfuse(optimizer)
        self.optimizer_settings = {
            "class": type(optimizer).__name__,
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        }
        self.scheduled_steps = self.stage_steps()
        make = self.make_schedule if self.stage == "warm-up" else self.make_second_schedule
        schedule = scheduled(make, optimizer, self.scheduled_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def stage_steps(self) -> int:
        """Returns the number of optimizer steps of the current stage.

        See :func:`~cbsa_lightning.callbacks.stage_length.stage_steps`.
        """
        return stage_steps(self.trainer, self.warmup_epochs, self.stage_began_at)

    def set_average_decay(self) -> None:
        """Sets the decay of the average from the length of the current stage, unless the user has set it."""
        if self.ema_decay is None:
            self.ema.decay = max(0.0, 1 - 7 / max(self.stage_steps(), 1))

    def _clips_under_mixed_precision(self) -> bool:
        return bool(self.trainer.gradient_clip_val) and str(self.trainer.precision).endswith("-mixed")

    # Training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor | None:
        """Computes the loss of a step on strong views; see :func:`~cbsa_lightning.training.step_loss.step_loss`."""
        if not self.trains:
            self.trainer.should_stop = True
            return None
        features = self.features_of(batch)
        self.nonfinite.remember()
        output = self.network(features, self.network.encode_text())
        loss, terms = step_loss(self, output, batch, batch_idx)
        if not self.nonfinite.is_finite(loss, output):
            return self.nonfinite.left_out({**terms, "features": features}, output, batch)
        logged = {f"train/{name}": value.detach() for name, value in {"loss": loss, **terms}.items()}
        # All steps have the same weight in the mean over the epoch, since batch sizes may differ between processes.
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Performs an optimizer step, and then updates the average if it has started."""
        super().optimizer_step(*args, **kwargs)
        if self.current_epoch >= self.warmup_epochs and not self.nonfinite.leaves_out:
            self.ema.update(self.network)
        self.nonfinite.leaves_out = False
