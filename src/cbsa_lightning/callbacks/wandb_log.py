"""Metric definitions, tables, charts and artifacts of a run on Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from cbsa_lightning import lightning_private
from cbsa_lightning.arguments import check_flags, check_number
from cbsa_lightning.callbacks.monitors import logged_names
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.images import decode
from cbsa_lightning.errors import CBSAError
from cbsa_lightning.io.runs import LABEL_MASK, LABELS, PREDICTIONS, REPORT_PAGE, SPLIT, THRESHOLDS, folder_of
from cbsa_lightning.reports.page.run_files import Validation, read_thresholds, read_validation
from cbsa_lightning.reports.page.sections import class_rows
from cbsa_lightning.reports.run_tables import (
    SCORES,
    Table,
    chosen_images,
    class_table,
    image_table,
    precision_recall_table,
    pseudo_label_table,
    reliability_table,
)

SIDE = 128
"""Maximum width and height of a thumbnail."""
_PER_EPOCH = ("val/", "test/", "pseudo/", "context/", "time/")
_PER_CLASS = ("val/AP/", "test/AP/")


class LogToWandb(L.Callback):
    """Prepares the charts of a run on W&B, and logs tables, charts and artifacts when training ends.

    Does nothing without a ``WandbLogger``. This callback logs the files of
    :class:`~cbsa_lightning.callbacks.report.RunReport`, :class:`~cbsa_lightning.callbacks.labels.WriteLabels` and
    :class:`~cbsa_lightning.callbacks.report_page.WriteReportPage`, so it must come after them in the list of callbacks.
    ``docs/how_to/wandb.md`` lists what is logged. A ``fast_dev_run`` logs no tables and no artifacts.

    Args:
        num_images: Maximum number of images in the table ``report/images``.
        artifacts: Whether to log the split, the last checkpoint, predictions and the report page as artifacts.

    Raises:
        ConfigError: For fewer than 3 images, since there are three kinds of images.
    """

    def __init__(self, num_images: int = 48, artifacts: bool = True) -> None:
        check_number("wandb.num_images", num_images, 3, whole=True)
        check_flags(**{"wandb.artifacts": artifacts})
        self.num_images = num_images
        self.artifacts = artifacts

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Defines the metrics before the first is logged."""
        _define_metrics(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Defines the metrics of ``cbsa validate``."""
        if trainer.state.fn == "validate":
            _define_metrics(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Defines the metrics of ``cbsa test``."""
        _define_metrics(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs tables, charts and artifacts on the first process."""
        folder = folder_of(trainer)
        if folder is None:
            return
        for logger in _loggers(trainer):
            if entries := self._entries(folder, trainer, pl_module):
                logger.experiment.log(entries)
            if self.artifacts:
                _log_artifacts(logger, trainer, folder)

    def log_report_page(self, trainer: Any) -> None:
        """Logs the report page again, after it has changed."""
        folder = folder_of(trainer)
        if folder is None or not self.artifacts:
            return
        for logger in _loggers(trainer):
            _log_files(logger.experiment, "report", "report", [folder / REPORT_PAGE])

    def _entries(self, folder: Path, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Returns tables and charts by key."""
        names, found = list(pl_module.class_names), dict[str, Any]()
        for report in (callback for callback in trainer.callbacks if isinstance(callback, RunReport)):
            if history := report.classes.epochs:
                found["report/pseudo_labels"] = _table(pseudo_label_table(history, names))
        if not (folder / THRESHOLDS).is_file():
            return found
        thresholds, positives = read_thresholds(folder)
        validation = None
        if trainer.limit_val_batches and (folder / PREDICTIONS).is_file():
            validation = read_validation(folder, trainer.datamodule.eval_table(), thresholds)
            found |= self._validation_entries(validation)
        found["report/classes"] = _table(class_table(class_rows(names, positives, thresholds, validation)))
        return found

    def _validation_entries(self, validation: Validation) -> dict[str, Any]:
        import wandb

        images = chosen_images(validation, self.num_images)
        content = image_table(validation, images)
        if (classes := len(validation.table.class_names)) > SCORES:
            rank_zero_info(
                f"W&B: report/images has scores of {sum(c.startswith('score/') for c in content.columns)} of {classes} "
                "classes, which are those that the images show or that are predicted for them."
            )
        table = validation.table
        for row, image in zip(content.rows, images, strict=True):
            row.insert(1, _thumbnail(table, image.row))
        content.columns.insert(1, "thumbnail")
        found = {"report/images": _table(content)}
        if (curves := precision_recall_table(validation)).rows:
            found["report/precision_recall"] = wandb.plot_table(
                "wandb/area-under-curve/v0",
                _table(curves),
                {"x": "recall", "y": "precision", "class": "class"},
                {
                    "title": "Precision-recall curves of classes with the lowest, medium and highest AP",
                    "x-axis-title": "recall",
                    "y-axis-title": "precision",
                },
                split_table=True,
            )
        if (points := reliability_table(validation)).rows:
            scores, rates = (list(column) for column in zip(*points.rows, strict=True))
            found["report/reliability"] = wandb.plot.line_series(
                [[0.0, 1.0], scores],
                [[0.0, 1.0], rates],
                keys=["calibrated", "measured"],
                title="Fraction of positives by score",
                xname="score",
                split_table=True,
            )
        return found


def _loggers(trainer: Any) -> list[WandbLogger]:
    """Returns the W&B loggers of the first process; other processes have none."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]


def _define_metrics(trainer: Any, pl_module: Any) -> None:
    names = logged_names(pl_module)
    names += [f"test/{name.removeprefix('val/')}" for name in names if name.startswith("val/")]
    for logger in _loggers(trainer):
        define_metrics(logger.experiment, names)


def define_metrics(run: Any, names: Iterable[str]) -> None:
    """Plots the metrics of an epoch against the epoch, and hides the metrics of single classes.

    Without this, the default page would have one panel for each class. Each metric is defined by its name: Lightning
    defines the pattern ``*``, and W&B uses an arbitrary one of several patterns that match.

    Args:
        run: The W&B run.
        names: Names of all metrics that the run may log.
    """
    run.define_metric("epoch", hidden=True)
    for name in names:
        if name.startswith(_PER_EPOCH) and "*" not in name:  # W&B would read a class name with "*" as a pattern
            options: dict[str, Any] = {"hidden": True} if name.startswith(_PER_CLASS) else {}
            options |= {"summary": "last,max"} if name == "val/mAP" else {}
            run.define_metric(name, step_metric="epoch", **options)


def _log_artifacts(logger: WandbLogger, trainer: Any, folder: Path) -> None:
    run = logger.experiment
    _log_files(run, "split", "dataset", [folder / SPLIT, folder / LABEL_MASK], shared=True)
    if not lightning_private.logs_model(logger):  # otherwise, the logger does it
        _log_files(run, "model", "model", _last_checkpoint(trainer))
    _log_files(run, "predictions", "predictions", [folder / PREDICTIONS, folder / LABELS])
    _log_files(run, "report", "report", [folder / REPORT_PAGE])


def _log_files(run: Any, name: str, kind: str, files: Iterable[Path], shared: bool = False) -> None:
    """Logs an artifact with those of ``files`` that exist, if any.

    Args:
        run: The W&B run.
        name: Name of the artifact. The name also contains the ID of the run, unless the artifact is ``shared``.
        kind: Type of the artifact.
        files: Its files.
        shared: Whether runs with the same files share the artifact, as an input.
    """
    import wandb

    existing = [file for file in files if file.is_file()]
    if not existing:
        return
    artifact = wandb.Artifact(name if shared else f"{name}-{run.id}", type=kind)
    for file in existing:
        artifact.add_file(str(file))
    if shared and not run.offline:
        run.use_artifact(artifact)  # raises in an offline run
    else:
        run.log_artifact(artifact)


def _last_checkpoint(trainer: Any) -> list[Path]:
    """Returns the last checkpoint, or the best one if the last is not saved separately; empty if there is none."""
    callback = trainer.checkpoint_callback
    paths = [getattr(callback, name, "") for name in ("last_model_path", "best_model_path")]
    return [Path(path) for path in paths if path][:1]


def _table(content: Table) -> Any:
    import wandb

    return wandb.Table(columns=content.columns, data=content.rows)


def _thumbnail(table: AnnotationTable, row: int) -> Any:
    """Returns a thumbnail of an image, or None if the image cannot be read."""
    import wandb

    try:
        image = Image.fromarray(decode(table.file(row), at_least=SIDE))
    except (CBSAError, OSError):
        return None
    image.thumbnail((SIDE, SIDE))
    return wandb.Image(image, file_type="jpg")
