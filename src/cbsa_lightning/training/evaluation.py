"""Validation, test and prediction: scores of the averaged weights, and the figures that are logged of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn

from cbsa_lightning.data.batches import EvalBatch, TrainBatch
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.finite import refuse_scores
from cbsa_lightning.method.metrics import REPORTED, MultilabelReport
from cbsa_lightning.method.specificity import Specificity
from cbsa_lightning.networks.base import Network, NetworkOutput
from cbsa_lightning.training.final_scores import FinalScores
from cbsa_lightning.training.nonfinite_steps import name_of_image

Stage = Literal["warm-up", "semi-supervised", "labeled-only"]


class Evaluation(FinalScores, L.LightningModule):
    """Passes without gradient of a module that holds ``network`` and its average ``ema``.

    Prompts are encoded once a pass. Each pass measures the averaged weights, validation the raw ones as well.
    """

    network: Network
    ema: ParameterEMA
    class_names: list[str]
    tells_limits: bool
    warmup_epochs: int
    positive_rate: Tensor

    @property
    def stage(self) -> Stage:
        """What the present epoch trains on."""
        raise NotImplementedError

    def prepare_evaluation(self) -> None:
        """Makes the metrics; the module calls it when its network is there."""
        reports = {k: MultilabelReport(len(self.class_names)) for k in ("ema", "raw", "fused", "test")}
        self.metrics = nn.ModuleDict(reports)
        self.specificity = Specificity(len(self.class_names)) if self.network.has_label_features else None
        self._text: dict[str, Any] = {}

    def features_of(self, batch: TrainBatch | EvalBatch) -> Tensor:
        """Frozen features ``(B, ...)`` of a batch: computed from its images, unless it brings them from a cache."""
        features: Tensor | None = getattr(batch, "features", None)  # a data module of one's own may know of none
        if features is not None:
            return features
        return self.network.features(cast(Tensor, batch.images))

    def cache_text(self) -> None:
        """Encodes the prompts once, for the passes without gradient that follow; see :meth:`score`."""
        with torch.no_grad():
            self._text = {"raw": self.network.encode_text()}
            with self.ema.applied_to(self.network):
                self._text["ema"] = self.network.encode_text()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A pass without gradient during training: evaluation mode, and prompts encoded once."""
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

    def _decide_by_validated(self, logits: Tensor) -> None:
        """Where no unlabeled image is scored, the scores of the validated ones set the thresholds, without labels."""
        if len(logits) and not bool(self.positive_rate.isnan().any()):
            self._give_shares(logits, self.positive_rate)

    def _report(self, name: str) -> MultilabelReport:
        return cast(MultilabelReport, self.metrics[name])

    def _computed(self, name: str) -> dict[str, Any]:
        """A report at the decision thresholds."""
        self._report(name).thresholds = self.decision_thresholds()
        return self._report(name).compute()

    def _log_report(self, prefix: str, report: dict[str, Any]) -> None:
        self.log(f"{prefix}/mAP", report["mAP"], prog_bar=True)
        self.log_dict({f"{prefix}/{key}": report[key] for key in REPORTED})
        per_class = zip(self.class_names, report["AP"].reshape(-1).tolist(), strict=True)  # of one class: a number
        self.log_dict({f"{prefix}/AP/{name}": value for name, value in per_class})

    def _end_pass(self, *reports: str) -> None:
        for name in reports:
            self._report(name).reset()
        self._text = {}

    def _refuse(self, scores: Tensor, batch: EvalBatch, what: str, table: str = "") -> None:
        """Refuses scores that are not finite, naming images of a table that the data module can give."""

        def name_of(row: int) -> str:
            find = getattr(getattr(self.trainer, "datamodule", None), table, lambda: None)
            return name_of_image(find(), batch.index[row])

        refuse_scores(scores, name_of, what)
