"""Writes `README.md`, the model card of an exported model, with the YAML metadata of the Hugging Face Hub."""

from __future__ import annotations

import csv
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import open_clip
import timm
import yaml

from cbsa_lightning.checkpoints.portable import network_section
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.export.variants import Variant
from cbsa_lightning.inference.hub import CARD
from cbsa_lightning.io.checksums import SUMS
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import METRICS

PURPOSES = {
    "model.onnx": "for ONNX Runtime: uint8 RGB images `(B, 3, S, S)` to `logits`, `probabilities` and `labels`",
    "model_fp16.onnx": "the same model with weights in float16; `python predict.py --model model_fp16.onnx`",
    "model_int8.onnx": "the same model with 8-bit integers; `python predict.py --model model_int8.onnx`",
    "variants.json": "comparison of the variants with `model.onnx`",
    "model.pt2": 'the same model for PyTorch: `torch.export.load("model.pt2").module()`',
    "model.safetensors": "the trained weights, for `cbsa_lightning.Classifier.load(FOLDER)`",
    "config.json": "the settings from which the network is built",
    "predict.py": "a script that labels images; it needs only Pillow, NumPy and ONNX Runtime",
    "labels.json": "classes, prompts and thresholds; precision and recall if they are known",
    "preprocess.json": "a description of the preprocessing of images",
    "check.npz": "generated images with their scores, for `python predict.py --check`",
    SUMS: "checksums, for `sha256sum -c SHA256SUMS`",
}
UNKNOWN = "The license is not stored with the model; look it up at the source of the weights."
OPENAI = (
    "The code of OpenAI's CLIP has the MIT license. According to the model card of the weights, any deployed use is "
    "out of scope; see https://github.com/openai/CLIP/blob/main/model-card.md."
)
LAION = "LAION publishes its weights with the MIT license; see their model cards at https://huggingface.co/laion."
IMAGENET = " They were trained on ImageNet; see its terms of access at https://www.image-net.org/download."


def write_card(
    folder: Path,
    name: str,
    checkpoint: Mapping[str, Any],
    classifier: Classifier,
    entries: Sequence[Mapping[str, Any]],
    run: Path | None,
    variants: Sequence[Variant] = (),
) -> None:
    """Writes the model card.

    Args:
        folder: Folder of the exported model, with all other files except the checksums.
        name: Name of the model.
        checkpoint: The exported checkpoint.
        classifier: Classifier of the checkpoint.
        entries: See :func:`~cbsa_lightning.inference.export.labels_file.class_entries`.
        run: Folder of the run, from which the last validation mAP is read. None if the run is unknown.
        variants: Comparisons of the variants of `model.onnx`.

    Raises:
        OutputError: If the file cannot be written.
    """
    mean_ap = None if run is None else _last_map(run / METRICS)
    towers, towers_license = _towers(checkpoint)
    files = [(file, text) for file, text in PURPOSES.items() if file == SUMS or (folder / file).is_file()]
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)  # noqa: S701  # no HTML
    environment.filters["quality"] = _quality
    text = environment.from_string(Path(__file__).with_suffix(".md").read_text(encoding="utf-8")).render(
        head=_head(name, mean_ap),
        network=type(classifier.network).__name__,
        version=version("cbsa-lightning"),
        files=files,
        runtime=_runtime() if (folder / "predict.py").is_file() else None,
        size=classifier.image_size,
        entries=entries,
        mean_ap=mean_ap,
        variants=variants,
        calibrated=classifier.calibrated,
        towers=towers,
        towers_license=towers_license,
    )
    with replacing(folder / CARD) as draft:
        draft.write_text(text, encoding="utf-8")


def _head(name: str, mean_ap: float | None) -> str:
    """Returns the YAML metadata; the validation result is omitted if huggingface_hub is not installed."""
    fields: dict[str, Any] = {
        "license": "other",
        "library_name": "cbsa_lightning",
        "pipeline_tag": "image-classification",
        "tags": ["multi-label-classification", "clip", "onnx"],
    }
    if mean_ap is None or importlib.util.find_spec("huggingface_hub") is None:
        return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"
    from huggingface_hub import EvalResult, ModelCardData

    images = "validation images of the run"
    result = EvalResult("image-classification", "custom", images, "mean_average_precision", round(mean_ap, 4))
    return f"---\n{ModelCardData(model_name=name, eval_results=[result], **fields).to_yaml()}\n---\n"


def _towers(checkpoint: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the name of the pretrained weights and sentences about their license."""
    settings = checkpoint["hyper_parameters"]
    if "clip" not in settings:
        settings = (network_section(checkpoint) or {}).get("init_args") or {}
    clip, backbone, pretrained = (settings.get(name) for name in ("clip", "backbone", "pretrained"))
    if clip == "embedded":
        return "the small CLIP of cbsa_lightning", "MIT license, like the library."
    if clip is not None:
        return _clip_weights(str(clip), str(pretrained))
    if backbone is not None and pretrained == "timm":
        license_name = timm.get_pretrained_cfg(backbone).license
        stated = f"timm states the license {license_name} for them." if license_name else UNKNOWN
        imagenet = re.search(r"in\d+k", str(backbone).partition(".")[2])
        return str(backbone), stated + (IMAGENET if imagenet else "")
    return str(backbone or "as in the configuration of the run"), UNKNOWN


def _clip_weights(clip: str, pretrained: str) -> tuple[str, str]:
    if clip.replace("/", "-") not in open_clip.list_models():  # a folder, a file, or a repository of the Hub
        hub = clip.removeprefix("hf-hub:")
        return (hub, f"See https://huggingface.co/{hub}.") if hub != clip else (Path(clip).name, UNKNOWN)
    if pretrained == "openai":
        return f"{clip} of OpenAI", OPENAI
    if pretrained.startswith("laion"):
        return f"{clip} with the weights {pretrained}", LAION
    return f"{clip} with the weights {Path(pretrained).name}", UNKNOWN


def _runtime() -> str:
    try:
        return version("onnxruntime")
    except PackageNotFoundError:  # importable, but not installed as a package
        import onnxruntime

        return str(onnxruntime.__version__)


def _quality(entry: Mapping[str, Any], name: str) -> str:
    """Returns the measured precision or recall of a class, the expected one with a mark, or an empty string."""
    measured, expected = entry.get(f"validation_{name}"), entry.get(f"expected_{name}")
    return f"{measured:.2f}" if measured is not None else f"{expected:.2f} \\*" if expected is not None else ""


def _last_map(file: Path) -> float | None:
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", newline="") as lines:
        values = [float(row["val/mAP"]) for row in csv.DictReader(lines) if row.get("val/mAP")]
    return values[-1] if values and math.isfinite(values[-1]) else None
