"""The training loop: any network, any labeler, one way through (Eqs. 6-8, 11, 12)."""

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
from cbsa_lightning.method.losses import AsymmetricLoss, ElementwiseLoss, context_loss, soft_target_loss
from cbsa_lightning.networks.base import Network
from cbsa_lightning.training.evaluation import Evaluation, Stage
from cbsa_lightning.training.loggers import begin_wandb_runs
from cbsa_lightning.training.nonfinite_steps import NonFiniteSteps
from cbsa_lightning.training.schedules import OneCycle, SchedulerCallable, scheduled

NetworkCallable = Callable[[Sequence[str]], Network]
"""Makes a network for given prompt names."""
AverageCallable = Callable[[nn.Module, float], ParameterEMA]
"""Makes the average of a network's weights with a given decay."""
LossCallable = Callable[[Tensor, Tensor], Tensor]
"""Element-wise loss of logits ``(B, C)`` and targets in {1, 0, -1}, 0 where the target is -1."""


class SSMLLModule(LeanCheckpoint, Evaluation):
    """Semi-supervised multi-label training of a network.

    The first ``warmup_epochs`` see labeled images only. Then, at each epoch's start, the averaged weights score the
    weak view of every unlabeled image, ``labeler`` turns the scores into pseudo-labels, and each step trains on the
    strong views of labeled and unlabeled images together. What is learned once an epoch lives in buffers, NaN or -1
    until first set, so a checkpoint alone is enough to predict.

    Args:
        class_names: The C class names.
        prompt_names: How prompts spell them; None: as ``class_names``, "_" read as a space.
        network: Makes the network from the prompt names.
        labeler: Computes pseudo-labels in each epoch (:class:`Labeler`) or once (:class:`EvidenceLabeler`); None: the
            paper's CAT. ``LabeledOnly()`` trains on the labels alone.
        loss: Element-wise loss of logits and targets in {1, 0, -1}.
        contexts: Options of context identification; used when the network has a context head.
        warmup_epochs: Epochs of the first stage; a network without trainable parameters has none.
        unsup_weight: Factor of the loss on pseudo-labels.
        max_skipped_steps: Steps in a row that may be left out because their loss is not finite; the next one stops the
            run. 0 stops it at the first.
        ema_decay: Share of the old average that an optimizer step keeps. The average starts from the raw weights
            when the warm-up ends; before that both are one. None: it looks back over a seventh of the second stage's
            steps, about as 0.9997 does in the paper's VOC runs.
        average: Makes the average from the network and the decay.
        stack_share: Share of the labeler's stack in the final scores, in [0, 1]. They average its logits and the
            network's, and are calibrated probabilities; see :mod:`~cbsa_lightning.method.fusion`. 0: the network
            alone, 1: the stack alone. Above 0 it needs a :class:`~cbsa_lightning.method.stacking.StackLabeler` such as
            ``StackedProbes``, and the network's own mAP is ``val/mAP_network``.
        objective: Chooses the score from which a class is given, see :mod:`~cbsa_lightning.method.decisions`; None: the
            share of images that has the class among the labeled ones. Others than ``Share()`` need a ``stack_share``.
        optimizer: Makes the optimizer from parameter groups. The default is the paper's AdamW at 1e-3, fused, with
            CAP's weight decay, since the paper states none.
        scheduler: Makes the schedule of a stage from the optimizer and the stage's number of steps, or a scheduler of
            torch; see :func:`~cbsa_lightning.training.schedules.scheduled`. None: one cycle.
    """

    network: Network
    tau_pos: Tensor
    tau_neg: Tensor
    positive_rate: Tensor
    context_partition: Tensor
    tells_limits = True  # off in fits that are made to measure something only

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
        # A lambda in the signature, since jsonargparse reads its settings: --model.optimizer.lr 0.01 changes one.
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-3, weight_decay=1e-4, fused=True),
        scheduler: SchedulerCallable | LRSchedulerCallable | None = None,
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
        made = {"network": network, "loss": loss, "average": average, "optimizer": optimizer, "scheduler": scheduler}
        for name, value in made.items():
            if value is not None and not callable(value):
                raise ConfigError(
                    f"{name} cannot be a {type(value).__name__} ({value!r:.60}); give a function or class."
                )
        check_number("warmup_epochs", warmup_epochs, 0, whole=True)
        check_number("unsup_weight", unsup_weight, 0)
        if ema_decay is not None:
            check_number("ema_decay", ema_decay, 0, 1)
        check_number("max_skipped_steps", max_skipped_steps, 0, whole=True)
        # Objects stay out: a checkpoint holds plain types only, so that it loads without running code.
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
        self.evidence: Evidence | None = None  # from the start of a fit to its first epoch
        self.make_optimizer = optimizer
        self.make_schedule = scheduler if scheduler is not None else OneCycle()
        self.ema_decay = ema_decay
        self.ema = average(self.network, 0.0 if ema_decay is None else ema_decay)
        # Every process makes the same averages, so DDP need not send them at each step; running statistics that are
        # not synchronized are each process's own.
        self._ddp_params_and_buffers_to_ignore = [
            f"ema.{name}" for name, _ in self.ema.named_buffers() if "__running_" not in name
        ]

        num_classes = len(self.class_names)
        unset = torch.full((num_classes,), torch.nan).float()
        self.register_buffer("tau_pos", unset.clone())
        self.register_buffer("tau_neg", unset.clone())
        self.register_buffer("positive_rate", unset.clone())
        self.register_buffer("context_partition", torch.full((num_classes,), -1))
        # Tables over the rows of the train table, filled once an epoch by the callbacks.
        self.pseudo_labels: Tensor | None = None
        self.context_targets: Tensor | None = None
        self.prepare_scores(stack_share, objective)
        self.prepare_evaluation()
        self.lr: float | None = None  # set by learning-rate finders: replaces that of the optimizer
        self.optimizer_settings: dict[str, Any] = {}  # as it was made, before any schedule
        self.scheduled_steps = 0  # length of the present schedule
        self.stage_began_at = 0  # optimizer steps that were done when the present stage began
        self.asked_to_end = False  # this process was, by a signal; see ExactResume
        self.nonfinite = NonFiniteSteps(self, max_skipped_steps)

    @property
    def stage(self) -> Stage:
        """What the present epoch trains on."""
        return "warm-up" if self.current_epoch < self.warmup_epochs else self.second_stage

    @property
    def second_stage(self) -> Stage:
        """What training uses after the warm-up."""
        return "labeled-only" if isinstance(self.labeler, LabeledOnly) else "semi-supervised"

    @property
    def num_contexts(self) -> int:
        """K, 0 without context identification."""
        return self.network.num_contexts

    def configure_callbacks(self) -> list[L.Callback]:
        """The epoch-wise parts of the method come along with it; their order matters.

        Lightning asks for them right before it starts the loggers.
        """
        begin_wandb_runs(self.trainer.loggers)
        thresholds = UpdateThresholds()
        callbacks: list[L.Callback] = [
            TrainingChecks(),
            CheckMonitors(),
            ExactResume(),
            CacheFeatures(),
            Stages(),
            thresholds,
        ]
        callbacks += [UpdateContexts(thresholds)] if self.num_contexts else []
        callbacks.append(EpochTimer())
        if not self.tells_limits:
            return callbacks
        own = [c for c in cast(Any, self.trainer).callbacks if isinstance(c, MeasureBaselines)]
        baselines = own[0] if own else MeasureBaselines(always_probes=False)
        return [*callbacks, DataSummary(), baselines, ResultLimits(baselines)]

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of the current stage; :class:`Stages` calls it again when the stage changes."""
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
        schedule = scheduled(self.make_schedule, optimizer, self.scheduled_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def stage_steps(self) -> int:
        """Optimizer steps of the present stage; see :func:`~cbsa_lightning.callbacks.stage_length.stage_steps`."""
        return stage_steps(self.trainer, self.warmup_epochs, self.stage_began_at)

    def set_average_decay(self) -> None:
        """Sets the decay of the average from the present stage's length, unless it was given."""
        if self.ema_decay is None:
            self.ema.decay = max(0.0, 1 - 7 / max(self.stage_steps(), 1))

    def _clips_under_mixed_precision(self) -> bool:
        return bool(self.trainer.gradient_clip_val) and str(self.trainer.precision).endswith("-mixed")

    # Training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor | None:
        """One step on strong views (Eq. 12).

        Every term is a sum over its images, and classes, divided by the batch size B: that keeps the relative
        weights that the paper's sums have.
        """
        if not self.trains:
            self.trainer.should_stop = True
            return None
        size = self._mean_batch_size(batch)
        features = self.features_of(batch)
        self.nonfinite.remember()
        output = self.network(features, self.network.encode_text())
        known = (batch.targets >= 0).to(torch.float32)
        per_entry = self._label_loss(output.logits, batch)
        sup = (per_entry * known).sum(1).sum() / size
        unsup = (per_entry * (1 - known)).sum(1).sum() / size
        loss = sup + self.unsup_weight * unsup
        terms = {"loss_sup": sup, "loss_unsup": unsup}
        if output.context_logits is not None and self.context_targets is not None:
            aux = context_loss(output.context_logits, self.context_targets[batch.index]).sum() / size
            loss = loss + self.contexts.weight * aux
            terms["loss_aux"] = aux
        if not self.nonfinite.is_finite(loss, output):
            return self.nonfinite.left_out({**terms, "features": features}, output, batch)
        logged = {f"train/{name}": value.detach() for name, value in {"loss": loss, **terms}.items()}
        # Each step counts alike in the epoch's mean: weights by share of the batch would differ among processes.
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return loss

    def _label_loss(self, logits: Tensor, batch: TrainBatch) -> Tensor:
        """Loss ``(B, C)`` on labels and pseudo-labels; the latter may be soft."""
        if self.pseudo_labels is None:
            return self.loss(logits, batch.targets)
        targets = torch.where(batch.targets >= 0, batch.targets, self.pseudo_labels[batch.index])
        if targets.is_floating_point():
            return soft_target_loss(self.loss, logits, targets)
        return self.loss(logits, targets)

    def _mean_batch_size(self, batch: TrainBatch) -> float | Tensor:
        """Images of this step a process: shares differ by two at most; divided by their mean, gradients average right.

        A number where there is one process: no tensor of it has to reach the device.
        """
        size = float(len(batch.index))
        if self.trainer.world_size == 1:
            return size
        return self.trainer.strategy.reduce(torch.tensor(size, device=self.device), reduce_op="mean")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """An optimizer step, then one of the average once it has started."""
        super().optimizer_step(*args, **kwargs)
        if self.current_epoch >= self.warmup_epochs and not self.nonfinite.leaves_out:
            self.ema.update(self.network)
        self.nonfinite.leaves_out = False
