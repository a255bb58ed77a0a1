"""Writes the predictions and plots of a finished run to files and to W&B."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from cbsa_lightning.arguments import check_flags, check_number
from cbsa_lightning.callbacks.class_history import ClassHistory
from cbsa_lightning.callbacks.logged_pictures import log_pictures
from cbsa_lightning.callbacks.predictions import gather, packed
from cbsa_lightning.callbacks.scoring import score_batches
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.batches import EvalBatch
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.views import PlainView
from cbsa_lightning.inference.predictions import check_output, in_table_order, write_predictions, write_thresholds
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import PICTURES, PREDICTIONS, THRESHOLDS, WRITTEN, folder_of, refuse_taken
from cbsa_lightning.method.contexts import cooccurrence
from cbsa_lightning.method.metrics import MultilabelReport
from cbsa_lightning.reports.class_heat_maps import class_heat_maps
from cbsa_lightning.reports.pictures import (
    attention_gallery,
    context_map,
    per_class_bars,
    prediction_gallery,
    training_curves,
)
from cbsa_lightning.reports.precision_recall import precision_recall_curves
from cbsa_lightning.reports.reliability import reliability_diagram
from cbsa_lightning.reports.telling_images import evenly_spaced

log = logging.getLogger(__name__)

PER_CLASS = ("AP", "precision", "recall", "support")


class RunReport(L.Callback):
    """Writes ``predictions.csv``, ``thresholds.csv`` and ``pictures/*.png`` into the run's folder when training ends.

    If images are skipped, ``left_out.txt`` lists them when training starts.

    The averaged weights score the validation images batch by batch; only the images for the plots are kept in memory.
    The plots show predictions, attention (if the network has it), contexts (if there are any), the average precision of
    each class, precision-recall curves, a reliability diagram, the pseudo-labels of each class over the epochs, and
    training curves. They are also logged to W&B and TensorBoard if the Trainer has such a logger. With
    ``limit_val_batches=0``, only plots that do not show the validation images are written. Nothing is written in a
    ``fast_dev_run``.

    Args:
        num_images: Number of images in the plots, evenly spaced over the validation images.
        enabled: Whether to write the files.

    Raises:
        ConfigError: If ``num_images`` is below 1.
    """

    def __init__(self, num_images: int = 16, enabled: bool = True) -> None:
        check_number("report.num_images", num_images, 1, whole=True)
        check_flags(**{"report.enabled": enabled})
        self.num_images = num_images
        self.enabled = enabled
        self.history: dict[str, dict[int, float]] = {}
        self.classes = ClassHistory()

    def state_dict(self) -> dict[str, Any]:
        """Returns the values of all epochs so far, so that the curves of a resumed run are complete."""
        return {"history": self.history, "classes": self.classes.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the metrics of :meth:`state_dict`."""
        self.history = state_dict["history"]
        self.classes.epochs = state_dict.get("classes", {})  # an earlier version did not record them

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Rejects class names that the table of predictions cannot contain, and lists skipped images.

        Raises:
            ConfigError: If :func:`~cbsa_lightning.inference.predictions.check_output` rejects a class name, or the
                folder contains the report of another run.
        """
        folder = self._folder(trainer)
        if folder is None:
            return
        check_output(PREDICTIONS, pl_module.class_names)
        if trainer.ckpt_path is None:  # a resumed run may have written the files itself
            refuse_taken(folder, WRITTEN)
        left_out = getattr(trainer.datamodule, "left_out", None)
        if left_out and trainer.is_global_zero:
            with replacing(folder / "left_out.txt") as draft:
                draft.write_text("\n".join([*left_out, ""]), encoding="utf-8")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Stores the validation metrics of the epoch; the module logs the last ones just before this hook."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._keep(trainer, lambda name: name.startswith("val/"))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stores the other metrics of the epoch, and the values of each class."""
        if self.enabled:
            self.classes.record(trainer, pl_module)
        self._keep(trainer, lambda name: not name.startswith("val/"))

    def _keep(self, trainer: Any, wanted: Any) -> None:
        # This runs on every process, since reading a metric may reduce it over all processes.
        for name, value in trainer.callback_metrics.items():
            if wanted(name):
                self.history.setdefault(name, {})[trainer.current_epoch] = float(value)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Scores the validation images on all processes; the first process writes the files.

        This cannot be done in ``on_train_end``, which is not called if a run was stopped just before its end and then
        resumed.
        """
        folder = self._folder(trainer)
        if folder is None:
            return
        found = self._evaluate(trainer, pl_module) if trainer.limit_val_batches else None
        if not trainer.is_global_zero:
            return
        names = pl_module.class_names
        if found is not None:
            write_predictions(folder / PREDICTIONS, found.table, names, found.scores, found.labels)
        _write_thresholds(folder / THRESHOLDS, trainer, pl_module, found)
        files = {}
        for name, figure in self._pictures(trainer, pl_module, found):
            files[name] = folder / PICTURES / f"{name}.png"
            with replacing(files[name]) as draft:
                figure.savefig(draft, dpi=110)
        log_pictures(trainer, files)
        print(f"Predictions and plots of this run: {folder}")

    def _folder(self, trainer: Any) -> Path | None:
        """Returns the output folder, or None if nothing is written. All processes must call this method."""
        reasons = {
            "report.enabled is false": not self.enabled,
            "there is no data module with eval_table() and image_size": not (
                hasattr(trainer.datamodule, "eval_table") and hasattr(trainer.datamodule, "image_size")
            ),
        }
        folder = folder_of(trainer)
        reasons["this is a fast_dev_run"] = folder is None
        for reason, holds in reasons.items():
            if holds:
                log.debug("No report: %s.", reason)
                return None
        return folder

    def _evaluate(self, trainer: Any, pl_module: Any) -> _Evaluation:
        data = trainer.datamodule
        table = data.eval_table()
        chosen = evenly_spaced(len(table), self.num_images)
        wanted = torch.as_tensor(chosen, device=pl_module.device)
        thresholds = pl_module.decision_thresholds()
        metric = MultilabelReport(len(pl_module.class_names)).to(pl_module.device)
        metric.thresholds = thresholds
        parts: list[Any] = []
        shown: list[tuple[int, Tensor | None]] = []

        def keep(batch: EvalBatch, features: Tensor, logits: Tensor) -> None:
            metric.update(logits.float(), batch.targets)
            scores = logits.float().sigmoid()
            parts.append(packed({"index": batch.index, "scores": scores, "labels": scores >= thresholds}))
            here = torch.isin(batch.index, wanted)
            if bool(here.any()):
                with trainer.precision_plugin.forward_context():
                    attention = pl_module.score(features[here], attention=True).attention
                maps = [None] * int(here.sum()) if attention is None else list(attention.float().cpu())
                shown.extend(zip(batch.index[here].tolist(), maps, strict=True))

        score_batches(trainer, pl_module, data.val_dataloader(), pl_module.final_logits, keep, "Report")
        # torchmetrics squeezes the results of a single class to scalars.
        figures = {k: v.reshape(-1).cpu().numpy() for k, v in metric.compute().items() if k in PER_CLASS}
        everything = in_table_order(len(table), len(pl_module.class_names), gather(parts))
        map_of = dict(gather(shown))
        kept = [attention for row in chosen.tolist() if (attention := map_of[row]) is not None]
        view = PlainView(data.image_size)
        return _Evaluation(
            table,
            *everything,
            thresholds.cpu().numpy(),
            figures,
            chosen,
            torch.stack([view(decode(table.file(row))) for row in chosen.tolist()]),
            torch.stack(kept) if kept else None,
        )

    def _pictures(self, trainer: Any, pl_module: Any, found: _Evaluation | None) -> Iterator[tuple[str, Figure]]:
        names = pl_module.class_names
        if found is not None:
            truths, scores = found.table.labels[found.rows], found.scores[found.rows]
            yield "predictions", prediction_gallery(found.images, truths, scores, found.thresholds, names)
            if found.maps is not None:
                few = slice(8)  # with one row per image, more images would make the plot too tall
                yield (
                    "attention",
                    attention_gallery(
                        found.images[few], found.maps[few], truths[few], scores[few], found.thresholds, names
                    ),
                )
            yield "classes", per_class_bars(found.figures["AP"], names)
            yield "precision_recall", precision_recall_curves(found.scores, found.table.labels, names)
            yield "reliability", reliability_diagram(found.scores, found.table.labels)
        partition = pl_module.context_partition.cpu()
        if pl_module.num_contexts and bool((partition >= 0).all()):
            yield "contexts", context_map(cooccurrence(trainer.datamodule.labeled_targets()), partition, names)
        if self.classes.epochs:
            yield "pseudo_labels", class_heat_maps(self.classes.epochs, names)
        if self.history:
            yield "training", training_curves(self.history, pl_module.warmup_epochs)


class _Evaluation(NamedTuple):
    """Validation images with scores of the averaged weights.

    Attributes:
        table: The n images.
        scores: ``(n, C)``, scores of the images.
        labels: ``(n, C)`` bool, predicted labels.
        thresholds: ``(C,)``, decision thresholds.
        figures: Metrics of :data:`PER_CLASS`, each ``(C,)``.
        rows: ``(m,)``, rows of the images in the plots.
        images: ``(m, 3, S, S)`` uint8, the images in the plots.
        maps: ``(m, C, h, w)``, attention maps of these images; None if the network has no attention.
    """

    table: AnnotationTable
    scores: NDArray[np.float32]
    labels: NDArray[np.bool_]
    thresholds: NDArray[np.float32]
    figures: dict[str, NDArray[np.float32]]
    rows: NDArray[np.int64]
    images: Tensor
    maps: Tensor | None


def _write_thresholds(file: Path, trainer: Any, pl_module: Any, found: _Evaluation | None) -> None:
    labels = trainer.datamodule.labeled_targets() if hasattr(trainer.datamodule, "labeled_targets") else None
    if labels is None:  # a custom data module
        return
    thresholds = pl_module.decision_thresholds().cpu().numpy()
    expected = None if pl_module.expected is None else pl_module.expected.cpu().numpy()
    measured = (
        {}
        if found is None
        else {
            "precision": found.figures["precision"],
            "recall": found.figures["recall"],
            "positives": found.figures["support"],
        }
    )
    positives = (labels == 1).sum(0).numpy()
    write_thresholds(file, pl_module.class_names, pl_module.prompt_names, thresholds, positives, expected, measured)
