"""Converts a classifier to one graph that maps uint8 images to labels, for `torch.export` and ONNX."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.networks.prompted import PromptedCLIP

INPUT = "images"
OUTPUTS = ("logits", "probabilities", "labels")
EXTRA_OUTPUTS = ("attention", "context")


class ScoringGraph(nn.Module):
    """Graph that computes the scores of a classifier, with text features as constants and without the text tower.

    Args:
        classifier: The classifier; it is not changed.
        extra: Additional outputs, from :data:`EXTRA_OUTPUTS`: ``attention``, the attention maps ``(B, C, h, w)``, and
            ``context``, the probabilities of the contexts ``(B, K)``.

    Raises:
        ConfigError: If the network does not have one of these outputs.
    """

    thresholds: Tensor

    def __init__(self, classifier: Classifier, extra: Sequence[str] = ()) -> None:
        super().__init__()
        self.outputs = (*OUTPUTS, *extra)
        self.network = copy.deepcopy(classifier.network).cpu().requires_grad_(False).eval()
        if isinstance(self.network, PromptedCLIP):
            self.network.clip.text = nn.Identity()  # type: ignore[assignment]  # replaced by the constants below
        self.register_buffer("thresholds", classifier.thresholds.clone())
        self._text_type = type(classifier.text)
        parts = classifier.text if isinstance(classifier.text, tuple) else (classifier.text,)
        self._text_parts = [self._constant(f"text_{i}", part) for i, part in enumerate(parts)]
        self._fusion: dict[str, str] = {}
        if classifier.fusion is not None:
            fusion, describe = classifier.fusion
            self.describe = copy.deepcopy(describe).cpu().requires_grad_(False).eval()
            self._fusion = {
                name: str(self._constant(f"fusion_{name.replace('.', '_')}", value))
                for name, value in fusion.tensors().items()
            }
        self._refuse_missing(classifier, extra)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes the outputs whose names are in ``self.outputs``.

        Args:
            images: ``(B, 3, S, S)`` uint8, RGB, resized as in :class:`~cbsa_lightning.data.plain_view.PlainView`.

        Returns:
            Logits ``(B, C)``, probabilities ``(B, C)``, labels ``(B, C)`` bool, and the additional outputs.
        """
        features = self.network.features(images)
        output = self.network(features, self._text(), attention="attention" in self.outputs)
        logits = output.logits.float()
        if self._fusion:
            fusion = Fusion.from_tensors({name: getattr(self, buffer) for name, buffer in self._fusion.items()})
            logits = fusion.fused(logits, fusion.stack_logits(self.describe(features)))
        probabilities = logits.sigmoid()
        result: dict[str, Any] = {
            "logits": logits,
            "probabilities": probabilities,
            "labels": probabilities >= self.thresholds,
        }
        if "attention" in self.outputs:
            result["attention"] = output.attention
        if "context" in self.outputs:
            result["context"] = output.context_logits.float().softmax(-1)
        return tuple(result[name] for name in self.outputs)

    def _constant(self, name: str, value: Tensor | None) -> str | None:
        if value is None:
            return None
        self.register_buffer(name, value.detach().cpu().clone())
        return name

    def _text(self) -> Any:
        parts: list[Any] = [None if name is None else getattr(self, name) for name in self._text_parts]
        return self._text_type(*parts) if issubclass(self._text_type, tuple) else parts[0]

    def _refuse_missing(self, classifier: Classifier, extra: Sequence[str]) -> None:
        name = type(classifier.network).__name__
        if "context" in extra and not classifier.network.num_contexts:
            raise ConfigError(f"{name} has no context head; remove context from --extra.")
        if "attention" in extra:
            image = torch.zeros(1, 3, classifier.image_size, classifier.image_size, dtype=torch.uint8)
            with torch.no_grad():
                features = self.network.features(image)
                if self.network(features, self._text(), attention=True).attention is None:
                    raise ConfigError(f"{name} has no attention maps; remove attention from --extra.")


def exported(graph: ScoringGraph, image_size: int) -> torch.export.ExportedProgram:
    """Exports the graph for any number of images of one size."""
    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)  # a batch size of 1 would become a constant
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}})
