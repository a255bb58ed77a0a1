"""Computes class-wise thresholds and pseudo-labels at the start of an epoch (Eq. 6)."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from cbsa_lightning import lightning_private
from cbsa_lightning.callbacks.scoring import score_batches
from cbsa_lightning.data.batches import EvalBatch
from cbsa_lightning.data.descriptions import evidence_of
from cbsa_lightning.data.incomplete import IncompleteImages
from cbsa_lightning.data.protocol import SemiSupervisedData, semi_supervised
from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.method.finite import refuse_scores
from cbsa_lightning.method.labelers import EvidenceLabeler, positive_rates, rounded
from cbsa_lightning.method.metrics import pseudo_label_quality
from cbsa_lightning.networks.base import NetworkOutput


class UpdateThresholds(L.Callback):
    """Uses the averaged weights to score the weak views of images with unknown labels, and computes pseudo-labels.

    Unknown entries of partly labeled images get pseudo-labels like those of unlabeled images. Known entries are passed
    to the labeler as scores of 1 and 0, so that its positives include the known ones.

    The callback sets the module's ``tau_pos``, ``tau_neg``, ``cut`` and ``positive_rate``, and its table of
    pseudo-labels. If the data set contains the hidden labels, the quality of the pseudo-labels is logged. An
    :class:`EvidenceLabeler` computes labels before the first epoch, and these labels do not change.

    The scores of the next epoch are computed at the end of an epoch, before its checkpoint is written, so that ``cut``
    matches the saved weights. The next epoch reuses them; a resumed run computes them again. If pseudo-labels are
    computed once and there is no context head, the scores determine only ``cut``. They are then computed before the
    first epoch of the stage, before validations and checkpoints, and after training.

    Attributes:
        weak_contexts: ``(n, K)`` context probabilities of the n images with unknown labels in this epoch, for
            :class:`~cbsa_lightning.callbacks.contexts.UpdateContexts`; None if they are not computed.
    """

    weak_contexts: Tensor | None = None

    _rates: Tensor  # float64: the module's float32 buffer cannot represent exact counts
    _ahead: _Scores | None = None
    _cut_at: int | None = None  # number of optimizer steps after which ``cut`` was computed

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of optimizer steps after which the decision thresholds were computed."""
        return {"cut_at": self._cut_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self._cut_at = state_dict["cut_at"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Computes positive rates from the labeled images, and pseudo-labels that are computed only once."""
        data = data_of(trainer)
        self._rates = positive_rates(data.labeled_targets())
        pl_module.positive_rate.copy_(self._rates)
        # A resumed run loads these labels, which are floating-point, from the checkpoint. It cannot compute them again,
        # since its attention pool is no longer CLIP's own.
        made = pl_module.pseudo_labels is not None and pl_module.pseudo_labels.is_floating_point()
        if isinstance(pl_module.labeler, EvidenceLabeler) and not made:
            pl_module.evidence = evidence_of(trainer, pl_module)
            rows = np.concatenate([data.split.labeled, data.split.unlabeled])
            incomplete = np.isin(rows, IncompleteImages.of(data).rows)
            labels = pl_module.label_once(pl_module.evidence)
            self._fill(pl_module, data, rows[incomplete], labels[torch.from_numpy(incomplete)])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Scores the unlabeled images and computes the pseudo-labels of the epoch."""
        pl_module.evidence = self.weak_contexts = None
        if pl_module.stage != "semi-supervised":
            return
        data = data_of(trainer)
        images = IncompleteImages.of(data)
        scores: Tensor | None = None
        if _trains_on_scores(pl_module) or self._cut_at is None:
            scores, self.weak_contexts = self._scores_of(trainer, pl_module, trainer.current_epoch)
        self._ahead = None
        if scores is None or isinstance(pl_module.labeler, EvidenceLabeler):
            labels = rounded(pl_module.pseudo_labels[torch.as_tensor(images.rows, device=pl_module.device)])
        else:
            labels, tau_pos, tau_neg = pl_module.labeler(images.completed(scores), self._rates)
            pl_module.tau_pos.copy_(tau_pos)
            pl_module.tau_neg.copy_(tau_neg)
            self._fill(pl_module, data, images.rows, labels)
        self._log_quality(pl_module, images, labels.cpu(), data.hidden_targets())

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Updates thresholds and scales for the weights that are validated and may then be saved."""
        if trainer.state.fn == "fit" and trainer.is_last_batch:
            self._look_ahead(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Updates the decision thresholds before checkpoints are written at the end of the epoch."""
        if _trains_on_scores(pl_module) or _saves_when_epochs_end(trainer):
            self._look_ahead(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Updates the decision thresholds for the last weights, even if training stopped within an epoch."""
        if self._cut_at != trainer.global_step:
            self._look_ahead(trainer, pl_module, trainer.fit_loop.epoch_progress.current.ready)  # started epochs

    def _look_ahead(self, trainer: L.Trainer, pl_module: Any, epoch: int) -> None:
        if pl_module.stage == "semi-supervised" and bool(pl_module.ema.started):
            self._scores_of(trainer, pl_module, epoch)

    def _scores_of(self, trainer: L.Trainer, pl_module: Any, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Returns the scores of images with unknown labels; computes them and ``cut`` once for the current weights."""
        ahead = self._ahead
        if ahead is None or (ahead.epoch, ahead.step) != (epoch, trainer.global_step):
            data = data_of(trainer)
            rows = IncompleteImages.of(data).rows
            logits, contexts = self._score(trainer, pl_module, data, rows, epoch)
            scores = logits.sigmoid()
            images = data.train_table.paths[rows]
            for found in (scores, contexts):  # check before using them
                if found is not None:
                    refuse_scores(found, images.__getitem__, "Scores of the weak views")
            # Training fits the known entries of partly labeled images, so the scores of unlabeled images are more
            # similar to those of new images.
            decided = rows[: len(data.split.unlabeled) or len(rows)]
            on_device = torch.as_tensor(decided, device=pl_module.device)
            pl_module.set_decisions(logits[: len(decided)], on_device, self._rates)
            self._cut_at = trainer.global_step
            ahead = self._ahead = _Scores(epoch, trainer.global_step, scores, contexts)
        return ahead.scores, ahead.contexts

    @staticmethod
    def _fill(pl_module: Any, data: Any, rows: np.ndarray, labels: Tensor) -> None:
        """Fills the table of pseudo-labels, with -1 for images other than ``rows``; soft labels use half precision."""
        dtype = torch.float16 if labels.is_floating_point() else torch.int8
        table = torch.full((len(data.train_table), labels.shape[1]), -1, dtype=dtype, device=pl_module.device)
        table[torch.as_tensor(rows, device=pl_module.device)] = labels.to(table)
        pl_module.pseudo_labels = table

    def _score(
        self, trainer: L.Trainer, pl_module: Any, data: Any, images: np.ndarray, epoch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Returns logits ``(n, C)`` and context probabilities ``(n, K)``, if any, for n rows of the train table."""
        rows = torch.as_tensor(images, device=pl_module.device)
        place = torch.zeros(len(data.train_table), dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        n, k = len(rows), pl_module.num_contexts
        logits = _rows(pl_module, n, len(pl_module.class_names))
        contexts = _rows(pl_module, n, k) if k else None
        seen = _rows(pl_module, n, 1)[:, 0]

        def keep(batch: EvalBatch, _: Tensor, output: NetworkOutput) -> None:
            here = place[batch.index]
            seen[here] = 1
            logits[here] = output.logits.float()
            if contexts is not None:
                contexts[here] = cast(Tensor, output.context_logits).float().softmax(1)

        score_batches(trainer, pl_module, data.weak_dataloader(epoch), pl_module.score, keep, "Pseudo-labels")
        # Each process has filled its own rows, which are zero on the other processes.
        logits = trainer.strategy.reduce(logits, reduce_op="sum")
        contexts = contexts if contexts is None else trainer.strategy.reduce(contexts, reduce_op="sum")
        missing = (trainer.strategy.reduce(seen, reduce_op="sum") == 0).cpu().numpy()
        if missing.any():
            raise ConfigError(
                f"{type(data).__name__}.weak_dataloader gave no view of {missing.sum()} training images with unknown "
                f"labels: {listed(data.train_table.paths[images[missing]])}. It must give one view of each unlabeled "
                "and each partly labeled image."
            )
        return logits, contexts

    @staticmethod
    def _log_quality(pl_module: Any, images: IncompleteImages, labels: Tensor, truth: Tensor) -> None:
        labels, truth = images.without_known(labels), images.without_known(truth)
        quality = pseudo_label_quality(labels, truth)
        unknown = labels.numel() - int((images.known >= 0).sum())
        quality["coverage"] = quality["coverage"] * labels.numel() / max(unknown, 1)
        names = ["coverage"]
        if bool((truth >= 0).any()):
            names += ["precision", "recall", "CF1"]
        pl_module.log_dict({f"pseudo/{name}": float(quality[name]) for name in names})


def _trains_on_scores(pl_module: Any) -> bool:
    """Returns whether the training targets of an epoch depend on scores that are computed at its start."""
    return not isinstance(pl_module.labeler, EvidenceLabeler) or pl_module.num_contexts > 0


def _saves_when_epochs_end(trainer: L.Trainer) -> bool:
    """Returns whether checkpoints may be written after an epoch without validation."""
    return any(
        not isinstance(callback, ModelCheckpoint) or lightning_private.saves_at_epoch_end(callback, trainer)
        for callback in trainer.checkpoint_callbacks
    )


def _rows(pl_module: Any, n: int, width: int) -> Tensor:
    """Returns zeros ``(n, width)`` in float32, independent of training precision and torch's default dtype."""
    return torch.zeros(n, width, device=pl_module.device).float()


class _Scores(NamedTuple):
    """Scores of the unlabeled images for an epoch, and the number of optimizer steps before they were computed."""

    epoch: int
    step: int
    scores: Tensor
    contexts: Tensor | None


def data_of(trainer: L.Trainer) -> SemiSupervisedData:
    """Returns the data module, which must support the passes of each epoch; see :func:`semi_supervised`."""
    return semi_supervised(getattr(trainer, "datamodule", None))
