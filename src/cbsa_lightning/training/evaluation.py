"""Runs validation, test and prediction with the averaged weights, and logs the metrics."""

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
    """Evaluation passes of a module that has a ``network`` and the average ``ema`` of its weights.

    Prompts are encoded once per pass. Each pass evaluates the averaged weights; validation also evaluates the raw
    weights.
    """

    network: Network
    ema: ParameterEMA
    class_names: list[str]
    tells_limits: bool
    warmup_epochs: int
    positive_rate: Tensor

    @property
    def stage(self) -> Stage:
        """The images that the current epoch trains on."""
        raise NotImplementedError

    def prepare_evaluation(self) -> None:
        """Creates the metrics; the module calls this method once its network exists."""
        reports = {k: MultilabelReport(len(self.class_names)) for k in ("ema", "raw", "fused", "test")}
        self.metrics = nn.ModuleDict(reports)
        self.specificity = Specificity(len(self.class_names)) if self.network.has_label_features else None
        self._text: dict[str, Any] = {}

    def features_of(self, batch: TrainBatch | EvalBatch) -> Tensor:
        """Returns the frozen features ``(B, ...)`` of a batch, from its cache or computed from its images."""
        features: Tensor | None = getattr(batch, "features", None)  # a custom data module may have none
        if features is not None:
            return features
        return self.network.features(cast(Tensor, batch.images))

    def cache_text(self) -> None:
        """Encodes the prompts once for the following passes, which do not compute gradients; see :meth:`score`."""
        with torch.no_grad():
            self._text = {"raw": self.network.encode_text()}
            with self.ema.applied_to(self.network):
                self._text["ema"] = self.network.encode_text()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Runs a pass during training in evaluation mode, without gradients and with prompts that are encoded once."""
        training = self.training
        self.eval()
        self.cache_text()
        try:
            yield
        finally:
            self._text = {}
            self.train(training)

    def score(self, features: Tensor, weights: Literal["ema", "raw"] = "ema", **options: Any) -> NetworkOutput:
        """Computes the output of the averaged or raw weights on frozen features; uses encoded prompts if available."""
        with torch.no_grad():
            if weights == "raw":
                return cast(NetworkOutput, self.network(features, self._text.get("raw"), **options))
            with self.ema.applied_to(self.network):
                return cast(NetworkOutput, self.network(features, self._text.get("ema"), **options))

    def on_validation_epoch_start(self) -> None:
        """Encodes the prompts once per pass."""
        self.cache_text()

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Scores a batch with the averaged and the raw weights in one pass of the frozen tower."""
        features = self.features_of(batch)
        for weights in self._evaluated_weights():
            output = self.score(features, weights)
            logits = output.logits
            self._refuse(logits, batch, f"Validation scores ({weights})", "eval_table")
            self._report(weights).update(logits, batch.targets)
            if weights == "ema" and self.fusion is not None:
                self._report("fused").update(self.fused_logits(features, logits), batch.targets)
            if weights == "ema" and self.specificity is not None:
                z = cast(Tensor, output.label_features)
                self.specificity.update(z, self._mean_feature_logits(z), batch.targets)

    def _evaluated_weights(self) -> tuple[Literal["ema", "raw"], ...]:
        """Returns the weights that validation evaluates. Before the average starts, it equals the raw weights."""
        return ("ema", "raw") if bool(self.ema.started) else ("ema",)

    def _mean_feature_logits(self, label_features: Tensor) -> Tensor:
        with torch.no_grad(), self.ema.applied_to(self.network):
            return self.network.mean_feature_logits(label_features, self._text.get("ema"))

    def on_validation_epoch_end(self) -> None:
        """Logs mAP, CF1 and OF1 of the averaged weights and mAP of the raw weights."""
        if self.trainer.state.fn == "fit" and self.stage != "semi-supervised" and self.tells_limits:
            self._decide_by_validated(self._report("ema").gathered()[0])
        report = self._computed("ema")
        if self.fusion is None:
            self._log_report("val", report)
        else:
            self._log_report("val", self._computed("fused"))
            self.log("val/mAP_network", report["mAP"])
        raw = self._report("raw").compute() if "raw" in self._evaluated_weights() else report
        self.log("val/mAP_raw", raw["mAP"])
        if self.specificity is not None:
            figures = self.specificity.compute(report["mAP"])
            self.specificity.reset()
            self.log_dict({f"val/{name}": value for name, value in figures.items()})
            if self.current_epoch >= self.warmup_epochs:
                self.specificity.warn_if_collapsed(figures)
        self._end_pass("ema", "raw", "fused")

    def on_test_epoch_start(self) -> None:
        """Encodes the prompts once per pass."""
        self.cache_text()

    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Scores a batch with the averaged weights."""
        logits = self.final_logits(self.features_of(batch))
        self._refuse(logits, batch, "Test scores")
        self._report("test").update(logits, batch.targets)

    def on_test_epoch_end(self) -> None:
        """Logs the same metrics as validation, under ``test/``."""
        self._log_report("test", self._computed("test"))
        self._end_pass("test")

    def on_predict_epoch_start(self) -> None:
        """Encodes the prompts once per pass."""
        self.cache_text()

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Any]:
        """Returns ``index (B,)``, ``scores (B, C)`` in [0, 1], ``labels (B, C)`` bool and ``unread`` of the batch."""
        scores = self(batch.images)
        self._refuse(scores, batch, "Scores", "predict_table")
        labels = scores >= self.decision_thresholds()
        # A custom data module may not report unreadable images.
        return {"index": batch.index, "scores": scores, "labels": labels, "unread": getattr(batch, "unread", ())}

    def on_predict_epoch_end(self) -> None:
        """Clears the encoded prompts."""
        self._end_pass()

    def _decide_by_validated(self, logits: Tensor) -> None:
        """Sets the thresholds from scores (not labels) of the validation images if no unlabeled images are scored."""
        if len(logits) and not bool(self.positive_rate.isnan().any()):
            self._give_shares(logits, self.positive_rate)

    def _report(self, name: str) -> MultilabelReport:
        return cast(MultilabelReport, self.metrics[name])

    def _computed(self, name: str) -> dict[str, Any]:
        """Computes a report at the decision thresholds."""
        self._report(name).thresholds = self.decision_thresholds()
        return self._report(name).compute()

    def _log_report(self, prefix: str, report: dict[str, Any]) -> None:
        self.log(f"{prefix}/mAP", report["mAP"], prog_bar=True)
        self.log_dict({f"{prefix}/{key}": report[key] for key in REPORTED})
        per_class = zip(self.class_names, report["AP"].reshape(-1).tolist(), strict=True)  # a scalar for one class
        self.log_dict({f"{prefix}/AP/{name}": value for name, value in per_class})

    def _end_pass(self, *reports: str) -> None:
        for name in reports:
            self._report(name).reset()
        self._text = {}

    def _refuse(self, scores: Tensor, batch: EvalBatch, what: str, table: str = "") -> None:
        """Raises an error if scores are not finite; it names the images if the data module has a table of them."""

        def name_of(row: int) -> str:
            find = getattr(getattr(self.trainer, "datamodule", None), table, lambda: None)
            return name_of_image(find(), batch.index[row])

        refuse_scores(scores, name_of, what)
