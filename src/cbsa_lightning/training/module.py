"""The training loop: any network, any labeler, one way through (Eqs. 6-8, 11, 12)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW

from cbsa_lightning.arguments import check_kind, check_names, check_number
from cbsa_lightning.callbacks.baselines import MeasureBaselines
from cbsa_lightning.callbacks.contexts import UpdateContexts
from cbsa_lightning.callbacks.data_summary import DataSummary
from cbsa_lightning.callbacks.features import CacheFeatures
from cbsa_lightning.callbacks.limits import ResultLimits
from cbsa_lightning.callbacks.monitors import CheckMonitors
from cbsa_lightning.callbacks.resume import ExactResume
from cbsa_lightning.callbacks.stage_length import stage_steps
from cbsa_lightning.callbacks.stages import Stages
from cbsa_lightning.callbacks.thresholds import UpdateThresholds
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.checkpoints.lean import LeanCheckpoint
from cbsa_lightning.data.batches import EvalBatch, TrainBatch
from cbsa_lightning.data.class_names import default_prompts
from cbsa_lightning.errors import ConfigError, NotFiniteError
from cbsa_lightning.method.calibration import Calibration
from cbsa_lightning.method.context_task import ContextTask
from cbsa_lightning.method.decisions import Objective, Share, decide
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.finite import REMEDY, all_finite, not_finite, problem_of_step, refuse_scores
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.method.labelers import ClassDistributionAware, Evidence, EvidenceLabeler, LabeledOnly, Labeler
from cbsa_lightning.method.losses import AsymmetricLoss, ElementwiseLoss, context_loss, soft_target_loss
from cbsa_lightning.method.metrics import REPORTED, MultilabelReport
from cbsa_lightning.method.specificity import Specificity
from cbsa_lightning.method.stacking import StackLabeler, soft_labels, unlabeled_inputs
from cbsa_lightning.method.thresholds import class_thresholds
from cbsa_lightning.networks.base import Network, NetworkOutput
from cbsa_lightning.networks.prompted import Describer, PromptedCLIP
from cbsa_lightning.training.loggers import begin_wandb_runs
from cbsa_lightning.training.optimizers import unfuse
from cbsa_lightning.training.schedules import OneCycle, SchedulerCallable, scheduled

Stage = Literal["warm-up", "semi-supervised", "labeled-only"]
NetworkCallable = Callable[[Sequence[str]], Network]
"""Makes a network for given prompt names."""
LossCallable = Callable[[Tensor, Tensor], Tensor]
"""Element-wise loss of logits ``(B, C)`` and targets in {1, 0, -1}, 0 where the target is -1."""


class SSMLLModule(LeanCheckpoint, L.LightningModule):
    """Semi-supervised multi-label training of a network.

    The first ``warmup_epochs`` see labeled images only. Then, at each epoch's start, the averaged weights score the
    weak view of every unlabeled image, ``labeler`` turns the scores into pseudo-labels, and each step trains on the
    strong views of labeled and unlabeled images together. What is learned once an epoch lives in buffers, NaN or -1
    until first set, so a checkpoint alone is enough to predict.

    Args:
        class_names: The C class names.
        prompt_names: How prompts spell them; None: as ``class_names``, "_" read as a space.
        network: Makes the network from the prompt names.
        labeler: Makes pseudo-labels, anew each epoch (:class:`Labeler`) or once (:class:`EvidenceLabeler`); None: the
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
        stack_share: Share of the labeler's stack in the final scores, in [0, 1]. They average its logits and the
            network's, and are calibrated probabilities; see :mod:`~cbsa_lightning.method.fusion`. 0: the network
            alone, 1: the stack alone. Above 0 it needs a :class:`~cbsa_lightning.method.stacking.StackLabeler` such as
            ``StackedProbes``, and the network's own mAP is ``val/mAP_network``.
        objective: Chooses the score from which a class is given, see :mod:`~cbsa_lightning.method.decisions`; None:
        the share
            of images that has the class among the labeled ones. Others than ``Share()`` need a ``stack_share``.
        optimizer: Makes the optimizer from parameter groups. The default is the paper's AdamW at 1e-3, fused, with
            CAP's weight decay, since the paper states none.
        scheduler: Makes the schedule of a stage from the optimizer and the stage's number of steps, or a scheduler of
            torch; see :func:`~cbsa_lightning.training.schedules.scheduled`. None: one cycle.
    """

    network: Network
    tau_pos: Tensor
    tau_neg: Tensor
    cut: Tensor
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
        for name, value in (("network", network), ("loss", loss), ("optimizer", optimizer), ("scheduler", scheduler)):
            if value is not None and not callable(value):
                raise ConfigError(
                    f"{name} cannot be a {type(value).__name__} ({value!r:.60}); give a function or class."
                )
        check_number("warmup_epochs", warmup_epochs, 0, whole=True)
        check_number("unsup_weight", unsup_weight, 0)
        if ema_decay is not None:
            check_number("ema_decay", ema_decay, 0, 1)
        check_number("max_skipped_steps", max_skipped_steps, 0, whole=True)
        check_number("stack_share", stack_share, 0, 1)
        check_kind("objective", objective, Objective, "an object such as Precision(0.9)")
        if not stack_share and objective is not None and not isinstance(objective, Share):
            raise ConfigError(
                f"objective {type(objective).__name__} needs probabilities: set stack_share to 0.5, and labeler to "
                "StackedProbes(). Share() does without."
            )
        if stack_share and not isinstance(labeler, StackLabeler):
            raise ConfigError("stack_share is that of the labeler's stack: set labeler to StackedProbes().")
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
        self.stack_share = stack_share
        self.objective = objective if objective is not None else Share()
        self.fusion = None  # fitted when training starts
        self.evidence: Evidence | None = None  # from the start of a fit to its first epoch
        if stack_share and not isinstance(self.network, PromptedCLIP):
            raise ConfigError(
                f"stack_share needs a network with frozen CLIP towers, not {type(self.network).__name__}."
            )
        # In a tuple, since it is no part of the state: the towers as they were loaded give it again.
        own = cast(PromptedCLIP, self.network)
        self._describer: tuple[Describer, ...] = (own.describer(keep=True),) if stack_share else ()
        self.make_optimizer = optimizer
        self.make_schedule = scheduler if scheduler is not None else OneCycle()
        self.ema_decay = ema_decay
        self.ema = ParameterEMA(self.network, 0.0 if ema_decay is None else ema_decay)
        # Every process makes the same averages, so DDP need not send them at each step; running statistics that are
        # not synchronized are each process's own.
        self._ddp_params_and_buffers_to_ignore = [
            f"ema.{name}" for name, _ in self.ema.named_buffers() if "__running_" not in name
        ]

        num_classes = len(self.class_names)
        unset = torch.full((num_classes,), torch.nan).float()
        self.register_buffer("tau_pos", unset.clone())
        self.register_buffer("tau_neg", unset.clone())
        self.register_buffer("cut", unset.clone())
        self.register_buffer("positive_rate", unset.clone())
        self.register_buffer("context_partition", torch.full((num_classes,), -1))
        # Tables over the rows of the train table, filled once an epoch by the callbacks.
        self.pseudo_labels: Tensor | None = None
        self.context_targets: Tensor | None = None
        # What to expect of the decision thresholds; see cbsa_lightning.method.decisions.Decisions.
        self.expected: Tensor | None = None
        # Probabilities (m, C) of the labeled images, each by probes that were not fitted to it.
        self.left_out: Tensor | None = None

        self.metrics = nn.ModuleDict({k: MultilabelReport(num_classes) for k in ("ema", "raw", "fused", "test")})
        self.specificity = Specificity(num_classes) if self.network.has_label_features else None
        self._text: dict[str, Any] = {}
        self.lr: float | None = None  # set by learning-rate finders: replaces that of the optimizer
        self.optimizer_settings: dict[str, Any] = {}  # as it was made, before any schedule
        self.scheduled_steps = 0  # length of the present schedule
        self.stage_began_at = 0  # optimizer steps that were done when the present stage began
        self.asked_to_end = False  # this process was, by a signal; see ExactResume
        self.max_skipped_steps = max_skipped_steps
        self._skipped = 0  # batches in a row that had no finite loss, up to the present one
        self.leaves_out = False  # the optimizer step to come: one of its batches had none
        self._clock = self._paused = 0.0
        self._images = 0

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, but never runs code from the file; a URL is refused.

        Raises:
            CheckpointError: For a file that is damaged or foreign, or a URL.
        """
        if isinstance(checkpoint_path, (str, os.PathLike)):
            read_checkpoint(checkpoint_path, ("state_dict", "hyper_parameters"))
        return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})

    @property
    def stage(self) -> Stage:
        """What the present epoch trains on."""
        return "warm-up" if self.current_epoch < self.warmup_epochs else self.second_stage

    @property
    def second_stage(self) -> Stage:
        """What training goes on with after the warm-up."""
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
        callbacks: list[L.Callback] = [CheckMonitors(), ExactResume(), CacheFeatures(), Stages(), thresholds]
        callbacks += [UpdateContexts(thresholds)] if self.num_contexts else []
        if not self.tells_limits:
            return callbacks
        own = [c for c in cast(Any, self.trainer).callbacks if isinstance(c, MeasureBaselines)]
        baselines = own[0] if own else MeasureBaselines(always_probes=False)
        return [*callbacks, DataSummary(), baselines, ResultLimits(baselines)]

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of the present stage; :class:`Stages` asks anew when the stage changes."""
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
            unfuse(optimizer)
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

    def features_of(self, batch: TrainBatch | EvalBatch) -> Tensor:
        """Frozen features ``(B, ...)`` of a batch: computed from its images, unless it brings them from a cache."""
        features: Tensor | None = getattr(batch, "features", None)  # a data module of one's own may know of none
        if features is not None:
            return features
        return self.network.features(cast(Tensor, batch.images))

    # Training --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Tells which weights CLIP has, and refuses a precision with which training would silently fail.

        Raises:
            ConfigError: For weights in half precision.
        """
        weights = getattr(getattr(self.network, "clip", None), "weights", None)
        if weights is not None:
            rank_zero_info(f"Weights of CLIP: {weights}.")
        if stage == "fit" and not self.trains and self.trainer.world_size > 1:
            raise ConfigError(
                f"{type(self.network).__name__} has nothing to train; fit it in one process (--trainer.devices 1)."
            )
        if stage == "fit" and self.trainer.precision in ("16-true", "bf16-true"):
            mixed = str(self.trainer.precision).replace("true", "mixed")
            raise ConfigError(
                f"trainer.precision {self.trainer.precision!r} keeps the averaged weights in half precision, which is "
                f"too coarse for their small steps. Use {mixed!r}."
            )
        half = {p.dtype for p in self.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
        if stage == "fit" and half:
            raise ConfigError(
                f"Trained weights are {half.pop()}, which is too coarse for the small steps of their average. Build "
                "the module with torch's default dtype float32, and train with trainer.precision '16-mixed'."
            )

    def on_fit_start(self) -> None:
        """Warns where the number of processes would change the outcome."""
        layers = [layer for layer in self.network.modules() if isinstance(layer, _BatchNorm)]
        own = [
            b for b in layers if b.weight is not None and b.weight.requires_grad and not isinstance(b, SyncBatchNorm)
        ]
        if self.trainer.world_size > 1 and own:
            rank_zero_warn(
                f"{len(own)} batch norms are trained on each process's own images, so the outcome depends on how many "
                "processes there are; with plain ResNets, sync_batchnorm=True has them share (docs/several_gpus.md)."
            )

    def on_train_start(self) -> None:
        """Starts the clock of a resumed epoch."""
        self._clock, self._images = time.perf_counter(), 0

    def on_train_epoch_start(self) -> None:
        """Starts the clock of the epoch's steps."""
        self._clock, self._images = time.perf_counter(), 0

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor | None:
        """One step on strong views (Eq. 12).

        Every term is a sum over its images, and classes, divided by the batch size B: that keeps the relative
        weights that the paper's sums have (D2-18).
        """
        if not self.trains:
            self.trainer.should_stop = True
            return None
        size = self._mean_batch_size(batch)
        features = self.features_of(batch)
        self._statistics = [value.clone() for value in self.ema.statistics(self.network)]
        output = self.network(features, self.network.encode_text())
        known = batch.labeled.to(torch.float32)
        per_image = self._label_loss(output.logits, batch).sum(1)
        sup = (per_image * known).sum() / size
        unsup = (per_image * (1 - known)).sum() / size
        loss = sup + self.unsup_weight * unsup
        terms = {"loss_sup": sup, "loss_unsup": unsup}
        if output.context_logits is not None and self.context_targets is not None:
            aux = context_loss(output.context_logits, self.context_targets[batch.index]).sum() / size
            loss = loss + self.contexts.weight * aux
            terms["loss_aux"] = aux
        if not self._is_finite(loss, output):
            return self._left_out({**terms, "features": features}, output, batch)
        self._skipped = 0
        logged = {f"train/{name}": value.detach() for name, value in {"loss": loss, **terms}.items()}
        # Each step counts alike in the epoch's mean: weights by share of the batch would differ among processes.
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self._images += len(batch.index) * self.trainer.world_size
        return loss

    def _is_finite(self, loss: Tensor, output: NetworkOutput) -> bool:
        """Whether the step may be taken, alike on all processes; the one thing that a step waits for on a device.

        Logits too: those of labels that are ignored have no loss, but a gradient that is not finite.
        """
        finite = all_finite([loss, output.logits, output.context_logits])
        if self.trainer.world_size == 1:
            return bool(finite)
        going_on = finite.new_tensor(not self.asked_to_end)
        both = self.trainer.strategy.reduce(torch.stack([finite, going_on]).float(), reduce_op="min").tolist()
        if not both[1]:  # Lightning ends after this step, on all processes now
            self.trainer._signal_connector.received_sigterm = True
        return bool(both[0])

    def _left_out(self, terms: dict[str, Tensor], output: NetworkOutput, batch: TrainBatch) -> Tensor:
        """A loss whose step changes nothing.

        Raises:
            NotFiniteError: More steps in a row than may be left out; names terms, images and weights.
        """
        self._skipped += 1
        self.leaves_out = True
        for kept, statistic in zip(self._statistics, self.ema.statistics(self.network), strict=True):
            statistic.copy_(kept)  # the forward pass has moved it
        values = {**terms, "logits": output.logits}
        if output.context_logits is not None:
            values["context logits"] = output.context_logits
        table = getattr(getattr(self.trainer, "datamodule", None), "train_table", None)
        weights = not_finite(dict(self.network.named_parameters()))
        problem = problem_of_step(values, lambda i: _image(table, batch.index[i]), weights)
        problem = f"Epoch {self.current_epoch}, step {self.trainer.fit_loop.epoch_loop.batch_idx}: {problem}"
        if self._skipped > self.max_skipped_steps or weights:
            raise NotFiniteError(
                f"{problem}. {REMEDY}; look at the images; max_skipped_steps lets such steps be left out."
            )
        rank_zero_warn(f"{problem}. The step is left out ({self._skipped} of {self.max_skipped_steps} in a row).")
        # Gradients of all weights, since processes wait for each other's. NaN has a gradient scaler pass the step over;
        # without one the callback Stages takes them away.
        every = torch.stack([p.sum() for p in self.network.parameters() if p.requires_grad]).sum()
        return every * (math.nan if self._scaled else 0.0)

    @property
    def _scaled(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _label_loss(self, logits: Tensor, batch: TrainBatch) -> Tensor:
        """Loss ``(B, C)`` on labels and pseudo-labels; the latter may be soft."""
        if self.pseudo_labels is None:
            return self.loss(logits, batch.targets)
        targets = torch.where(batch.labeled[:, None], batch.targets, self.pseudo_labels[batch.index])
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
        if self.current_epoch >= self.warmup_epochs and not self.leaves_out:
            self.ema.update(self.network)
        self.leaves_out = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs after an epoch's last step what an image cost, loading included, validation and threshold pass not.

        Here, since callbacks that keep an epoch's figures look before the module's own hook of the epoch's end.
        """
        if self.trainer.is_last_batch and self._images:
            cost = 1000 * (time.perf_counter() - self._clock) / self._images
            self.log("time/ms_per_image", cost, on_step=False, on_epoch=True, batch_size=1)

    def on_validation_start(self) -> None:
        """Stops the clock of the steps."""
        self._paused = time.perf_counter()

    def on_validation_end(self) -> None:
        """Lets it run on; checkpoints are written by then."""
        self._clock += time.perf_counter() - self._paused

    # Evaluation ------------------------------------------------------------------------------------------------

    def cache_text(self) -> None:
        """Encodes the prompts once, for the passes without gradient that follow; see :meth:`score`."""
        with torch.no_grad():
            self._text = {"raw": self.network.encode_text()}
            with self.ema.applied_to(self.network):
                self._text["ema"] = self.network.encode_text()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A pass without gradient in the midst of training: evaluation mode, and prompts encoded once."""
        training = self.training
        self.eval()
        self.cache_text()
        try:
            yield
        finally:
            self._text = {}
            self.train(training)

    def score(self, features: Tensor, weights: Literal["ema", "raw"] = "ema", **options: Any) -> NetworkOutput:
        """Output of the averaged or the raw weights on frozen features, text taken from the cache if there is one."""
        with torch.no_grad():
            if weights == "raw":
                return cast(NetworkOutput, self.network(features, self._text.get("raw"), **options))
            with self.ema.applied_to(self.network):
                return cast(NetworkOutput, self.network(features, self._text.get("ema"), **options))

    def label_once(self, evidence: Evidence) -> Tensor:
        """Labels of an evidence labeler; keeps the stack behind them where final scores are fused with it."""
        if not self._describer or len(evidence.labeled) == len(evidence.descriptors[0]):
            return cast(EvidenceLabeler, self.labeler)(evidence)
        stack = cast(StackLabeler, self.labeler).fit(evidence)
        labels = evidence.labels.cpu().numpy()
        self.fusion = Fusion.of(stack, unlabeled_inputs(evidence), labels, self.stack_share)
        self.left_out = self.fusion.calibrated(torch.from_numpy(stack.left_out()).float()).sigmoid()
        return soft_labels(stack, evidence)

    def set_decisions(self, logits: Tensor, rows: Tensor, rates: Tensor) -> None:
        """Sets the decision thresholds, and the scale on which logits are fused.

        Args:
            logits: ``(n, C)``, the network's, of the unlabeled images.
            rows: ``(n,)``, their rows in the train table.
            rates: ``(C,)``, share of positives among the labeled images.
        """
        if self.fusion is None:
            self._give_shares(logits, rates)
            return
        self.fusion = self.fusion.to(logits.device).adapted(logits)
        # The soft pseudo-labels are the stack's probabilities; -1 where it knows nothing of a class.
        soft = cast(Tensor, self.pseudo_labels)[rows].float()
        stack = torch.where(soft < 0, self.fusion.stack_mean, torch.logit(soft, eps=1e-4))
        averaged = self.fusion.averaged(logits, stack).cpu().numpy()
        calibration = Calibration.unpacked(self.fusion.calibration.cpu().numpy())
        found = decide(averaged, calibration, rates.cpu().numpy(), self.objective)
        self.cut.copy_(torch.from_numpy(found.thresholds))
        self.expected = torch.from_numpy(found.expected).float()

    def final_logits(self, features: Tensor) -> Tensor:
        """Logits ``(B, C)`` behind predictions: those of the averaged weights, fused with the stack's if asked for."""
        return self.fused_logits(features, self.score(features).logits)

    def fused_logits(self, features: Tensor, logits: Tensor) -> Tensor:
        """Final logits ``(B, C)`` from frozen features and the network's logits of them."""
        if self.fusion is None or not self.fusion.ready:
            return logits
        self.fusion = self.fusion.to(features.device)  # from a checkpoint it comes on the CPU
        describe = self._describer[0].to(features.device)
        return self.fusion.fused(logits, self.fusion.stack_logits(describe(features)))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities ``(B, C)`` of uint8 images ``(B, 3, S, S)``; see :meth:`final_logits`."""
        return self.final_logits(self.network.features(images)).float().sigmoid()

    def on_validation_epoch_start(self) -> None:
        """Prompts do not change within a pass."""
        self.cache_text()

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """One pass of the frozen tower serves both the averaged and the raw weights."""
        features = self.features_of(batch)
        for weights in ("ema", "raw"):
            output = self.score(features, weights)
            logits = output.logits
            self._refuse(logits, batch, f"Validation scores ({weights})", "eval_table")
            self._report(weights).update(logits, batch.targets)
            if weights == "ema" and self.fusion is not None:
                self._report("fused").update(self.fused_logits(features, logits), batch.targets)
            if weights == "ema" and self.specificity is not None:
                z = cast(Tensor, output.label_features)
                self.specificity.update(z, self._mean_feature_logits(z), batch.targets)

    def _mean_feature_logits(self, label_features: Tensor) -> Tensor:
        with torch.no_grad(), self.ema.applied_to(self.network):
            return self.network.mean_feature_logits(label_features, self._text.get("ema"))

    def on_validation_epoch_end(self) -> None:
        """Logs mAP, CF1 and OF1 of the averaged weights, and mAP of the raw ones beside it."""
        if self.trainer.state.fn == "fit" and self.stage != "semi-supervised" and self.tells_limits:
            self._decide_by_validated(self._report("ema").gathered()[0])
        report = self._computed("ema")
        if self.fusion is None:
            self._log_report("val", report)
        else:
            self._log_report("val", self._computed("fused"))
            self.log("val/mAP_network", report["mAP"])
        self.log("val/mAP_raw", self._report("raw").compute()["mAP"])
        if self.specificity is not None:
            figures = self.specificity.compute(report["mAP"])
            self.specificity.reset()
            self.log_dict({f"val/{name}": value for name, value in figures.items()})
            if self.current_epoch >= self.warmup_epochs:
                self.specificity.warn_if_collapsed(figures)
        self._end_pass("ema", "raw", "fused")

    def on_test_epoch_start(self) -> None:
        """Prompts do not change within a pass."""
        self.cache_text()

    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """As validation, with the averaged weights only."""
        logits = self.final_logits(self.features_of(batch))
        self._refuse(logits, batch, "Test scores")
        self._report("test").update(logits, batch.targets)

    def on_test_epoch_end(self) -> None:
        """Logs as validation does, under ``test/``."""
        self._log_report("test", self._computed("test"))
        self._end_pass("test")

    def _report(self, name: str) -> MultilabelReport:
        return cast(MultilabelReport, self.metrics[name])

    def _computed(self, name: str) -> dict[str, Any]:
        """A report at the decision thresholds."""
        self._report(name).thresholds = self.decision_thresholds()
        return self._report(name).compute()

    def _decide_by_validated(self, logits: Tensor) -> None:
        """Where no unlabeled image is scored, the scores of the validated ones set the thresholds, without labels."""
        if len(logits) and not bool(self.positive_rate.isnan().any()):
            self._give_shares(logits, self.positive_rate)

    def _give_shares(self, logits: Tensor, rates: Tensor) -> None:
        """Sets the thresholds that give each class its labeled share of the images behind ``logits (n, C)``."""
        self.cut.copy_(class_thresholds(logits.sigmoid(), rates, 1.0, 0.0)[0])

    def _log_report(self, prefix: str, report: dict[str, Any]) -> None:
        self.log(f"{prefix}/mAP", report["mAP"], prog_bar=True)
        self.log_dict({f"{prefix}/{key}": report[key] for key in REPORTED})
        per_class = zip(self.class_names, report["AP"].reshape(-1).tolist(), strict=True)  # of one class: a number
        self.log_dict({f"{prefix}/AP/{name}": value for name, value in per_class})

    def _end_pass(self, *reports: str) -> None:
        for name in reports:
            self._report(name).reset()
        self._text = {}

    def on_predict_epoch_start(self) -> None:
        """Prompts do not change within a pass."""
        self.cache_text()

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Any]:
        """Gives ``index (B,)``, ``scores (B, C)`` in [0, 1], ``labels (B, C)`` bool, and ``unread`` of the batch."""
        scores = self(batch.images)
        self._refuse(scores, batch, "Scores", "predict_table")
        labels = scores >= self.decision_thresholds()
        # A data module of one's own may know of no images that cannot be read.
        return {"index": batch.index, "scores": scores, "labels": labels, "unread": getattr(batch, "unread", ())}

    def on_predict_epoch_end(self) -> None:
        """Prompts may change again."""
        self._end_pass()

    def _refuse(self, scores: Tensor, batch: EvalBatch, what: str, table: str = "") -> None:
        """Refuses scores that are not finite, naming images of a table that the data module can give."""

        def name_of(row: int) -> str:
            find = getattr(getattr(self.trainer, "datamodule", None), table, lambda: None)
            return _image(find(), batch.index[row])

        refuse_scores(scores, name_of, what)

    def decision_thresholds(self) -> Tensor:
        """Score from which a label is given, ``(C,)``; see :meth:`set_decisions`.

        0.5 where no thresholds were ever set, as after training without validation on labeled images alone.
        """
        return torch.where(self.cut.isnan(), torch.full_like(self.cut, 0.5), self.cut)


def _image(table: Any, row: Tensor) -> str:
    return f"row {int(row)}" if table is None else f"{table.paths[int(row)]} (row {int(row)})"
