"""Writes `report.html` when training ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from cbsa_lightning.arguments import check_flags
from cbsa_lightning.callbacks.baselines import LINEAR_PROBE, STACKED_PROBES, ZERO_SHOT, MeasureBaselines
from cbsa_lightning.callbacks.changes import ReportChanges
from cbsa_lightning.callbacks.limits import FEW_IMAGES
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import PREDICTIONS, REPORT_PAGE, THRESHOLDS, folder_of
from cbsa_lightning.reports.page.page import Run, build_page

_IN_WORDS = {
    ZERO_SHOT: "CLIP without training (zero-shot)",
    LINEAR_PROBE: "a linear probe on frozen features",
    STACKED_PROBES: "a stack of probes",
}


class WriteReportPage(L.Callback):
    """Writes ``report.html``, a summary of the run on one page, into the run's folder when training ends.

    The page shows the files of :class:`~cbsa_lightning.callbacks.report.RunReport` and
    :class:`~cbsa_lightning.callbacks.labels.WriteLabels`, so this callback must come after them in the list of
    callbacks. Without ``RunReport``, no page is written; without ``WriteLabels``, the page has no unlabeled images. No
    page is written in a ``fast_dev_run``.

    Args:
        enabled: Whether to write the page.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_flags(**{"report_page.enabled": enabled})
        self.enabled = enabled

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the page on the first process."""
        self.write(trainer, pl_module)

    def write(self, trainer: Any, pl_module: Any, others: Mapping[str, float] | None = None) -> None:
        """Writes the page of a finished run.

        Args:
            trainer: The Trainer of the run.
            pl_module: The module of the run.
            others: mAP (0 to 1) of other models, which the page compares with the run and the baselines.
        """
        folder = folder_of(trainer) if self.enabled else None
        if folder is None or not trainer.is_global_zero:
            return
        if not (folder / THRESHOLDS).is_file():
            rank_zero_info(f"{REPORT_PAGE} is not written, since there is no {THRESHOLDS}. Set --report.enabled true.")
            return
        page = build_page(_described(folder, trainer, pl_module, others or {}))
        with replacing(folder / REPORT_PAGE) as draft:
            draft.write_text(page, encoding="utf-8")
        print(f"Report of this run: {folder / REPORT_PAGE}")


def _described(folder: Path, trainer: Any, pl_module: Any, others: Mapping[str, float]) -> Run:
    data = trainer.datamodule
    scored = bool(trainer.limit_val_batches) and (folder / PREDICTIONS).is_file()
    table = data.eval_table() if scored else None
    counts = {"labeled images": len(data.split.labeled), "unlabeled images": len(data.split.unlabeled)}
    if table is not None:
        counts["validation images"] = len(table)
    baselines = {
        _IN_WORDS[name]: value
        for callback in trainer.callbacks
        if isinstance(callback, MeasureBaselines)
        for name, value in callback.results.items()
    }
    names, models = tuple(pl_module.class_names), baselines | dict(others)
    changes = [text for callback in trainer.callbacks if isinstance(callback, ReportChanges) for text in callback.told]
    contexts, root = _contexts(pl_module), data.train_table.root
    return Run(folder, names, root, counts, table, models, contexts, FEW_IMAGES, changes)


def _contexts(pl_module: Any) -> NDArray[np.int64] | None:
    partition: NDArray[np.int64] = pl_module.context_partition.cpu().numpy()
    return partition if pl_module.num_contexts and (partition >= 0).all() else None
