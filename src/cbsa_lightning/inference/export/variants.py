"""Writes smaller variants of `model.onnx`, and compares them with it on labeled images of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cbsa_lightning.data.labeled_images import LabeledImages
from cbsa_lightning.errors import CheckpointError, ConfigError
from cbsa_lightning.inference.export.check_images import CHECK
from cbsa_lightning.inference.export.scoring import INPUT
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import LABELED
from cbsa_lightning.method.metrics import MultilabelReport

VARIANTS_FILE = "variants.json"
CALIBRATION, COMPARED = 64, 400  # maximum numbers of images
MAX_CHANGED = 0.02  # maximum fraction of labels that may differ from those of model.onnx
MAX_LOSS = 0.01  # maximum accepted decrease in mAP
TOLERANCE = {"fp16": 1e-4, "int8": 0.02}  # for `predict.py --check`; processors round int8 activations differently

Views = NDArray[np.uint8]


@dataclass(frozen=True)
class Variant:
    """A variant of `model.onnx` and its comparison with it.

    Attributes:
        file: Name of the file.
        megabytes: Size of the file.
        images: Number of images of the run on which the files are compared.
        kind: Kind of these images: "held-out", or "training" if the run has no held-out images.
        difference: Largest absolute difference between probabilities.
        changed: Fraction of labels that differ, over all images and classes.
        mean_ap: mAP of the variant, over the classes with positive images.
        mean_ap_float32: mAP of `model.onnx`.
        kept: Whether the file was kept. It is removed if too many labels change or mAP decreases too much.
    """

    file: str
    megabytes: float
    images: int
    kind: str
    difference: float
    changed: float
    mean_ap: float
    mean_ap_float32: float
    kept: bool

    def __str__(self) -> str:
        """Returns the comparison as one sentence."""
        limits = f"more than {MAX_CHANGED:.0%} of the labels differ or mAP decreases by more than {MAX_LOSS}"
        removed = "" if self.kept else f" The file was removed, because {limits}."
        return (
            f"{self.file}: On {self.images} {self.kind} images of the run, the probabilities differ from those of "
            f"model.onnx by at most {self.difference:.1e}, {self.changed:.2%} of the labels differ, and mAP is "
            f"{self.mean_ap:.4f} instead of {self.mean_ap_float32:.4f}.{removed}"
        )


def write_variants(folder: Path, names: Sequence[str], run: Path | None) -> list[Variant]:
    """Writes the variants and their comparison, `variants.json`, and adds their scores to `check.npz`.

    The ranges of the int8 activations are calibrated on labeled training images of the run. The files are compared on
    its held-out images. If the run has none, one half of the labeled training images is used for the calibration and
    the other half for the comparison.

    Args:
        folder: Folder of the exported model, with all files except the model card and the checksums.
        names: Names of the variants, from :data:`WRITERS`.
        run: Folder of the run.

    Raises:
        ConfigError: If the labeled images of the run are not available.
        CheckpointError: If ONNX Runtime cannot run a variant.
        OutputError: If a file cannot be written.
    """
    from cbsa_lightning.inference.export import predict  # imports ONNX Runtime, which is optional

    try:
        found = _written(folder, names, run, partial(predict.Model, folder, checksums=False))
    except predict.ImageError as error:
        raise ConfigError(f"The variants are compared on the labeled images of the run, but {error}") from error
    except predict.BundleError as error:
        raise CheckpointError(f"A variant failed its test: {error}") from error
    with replacing(folder / VARIANTS_FILE) as draft:
        draft.write_text(json.dumps([asdict(variant) for variant in found], indent=2) + "\n", encoding="utf-8")
    return found


def _written(folder: Path, names: Sequence[str], run: Path | None, load: Callable[..., Any]) -> list[Variant]:
    model = load()
    calibration, compared, targets, kind = _images(run, model.view)
    expected = _scores(model, compared)
    found = []
    for name in names:
        file = folder / f"model_{name}.onnx"
        with replacing(file) as draft, _quiet():
            WRITERS[name](folder / model.file, draft, calibration)
            _set_metadata(draft, model.metadata | {"variant": name, "tolerance": str(TOLERANCE[name])})
        smaller = load(file=file.name)
        found.append(_compared(file, expected, _scores(smaller, compared), targets, kind))
        if found[-1].kept:
            _add_check(folder / CHECK, name, smaller)
        else:
            file.unlink()
    return found


def _images(run: Path | None, view: Callable[[str], Views]) -> tuple[Views, Views, torch.Tensor, str]:
    """Returns the calibration images, and the images for the comparison with their labels and kind."""
    if run is None:
        raise ConfigError("The variants are compared on the labeled images of the run. Export the folder of a run.")
    images = LabeledImages.read(run / LABELED)
    exists = np.array([Path(file).is_file() for file in images.files], bool)
    training, held_out = np.flatnonzero(exists & ~images.held_out), np.flatnonzero(exists & images.held_out)
    kind = "held-out" if len(held_out) else "training"
    if not len(held_out):
        training, held_out = training[::2], training[1::2]
    if not len(training) or not len(held_out):
        raise ConfigError(
            f"The variants are compared on the labeled images of the run, but the images listed in {run / LABELED} do "
            "not exist. Restore them, or export without --variants."
        )

    def views(rows: NDArray[np.intp]) -> Views:
        return np.stack([view(images.files[row]) for row in rows])

    compared = held_out[:COMPARED]
    return views(training[:CALIBRATION]), views(compared), torch.from_numpy(images.labels[compared]), kind


def _scores(model: Any, views: Views) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    parts = [model.run(views[i : i + 32]) for i in range(0, len(views), 32)]
    probabilities, labels = zip(*parts, strict=True)
    return np.concatenate(probabilities), np.concatenate(labels)


def _compared(file: Path, expected: Any, found: Any, targets: torch.Tensor, kind: str) -> Variant:
    before, after = (_mean_ap(probabilities, targets) for probabilities, _ in (expected, found))
    changed = float((expected[1] != found[1]).mean())
    return Variant(
        file=file.name,
        megabytes=round(file.stat().st_size / 1e6, 2),
        images=len(targets),
        kind=kind,
        difference=float(np.abs(expected[0] - found[0]).max()),
        changed=changed,
        mean_ap=after,
        mean_ap_float32=before,
        kept=changed <= MAX_CHANGED and not before - after > MAX_LOSS,  # mAP is NaN if no label is positive
    )


def _mean_ap(probabilities: NDArray[np.float32], targets: torch.Tensor) -> float:
    report = MultilabelReport(targets.shape[1])
    report.update(torch.from_numpy(probabilities), targets)
    return float(report.compute()["mAP"])


def _add_check(file: Path, name: str, model: Any) -> None:
    with np.load(file, allow_pickle=False) as data:
        arrays = dict(data)
    images = [arrays[f"image_{i}"] for i in range(len(arrays["probabilities"]))]
    arrays[f"probabilities_{name}"], _ = model(images)
    with replacing(file) as draft:
        np.savez_compressed(draft, **arrays)


def _write_fp16(source: Path, file: Path, calibration: Views) -> None:
    """Stores large tensors as float16. ONNX Runtime converts them to float32 once, when it loads the file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        name = tensor.name
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < 1024 or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], f"{name}_cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, file)


def _write_int8(source: Path, file: Path, calibration: Views) -> None:
    """Quantizes convolutions with calibrated ranges, and matrix products with the range of each batch."""
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(np.array_split(calibration.transpose(0, 3, 1, 2), -(-len(calibration) // 8)))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: np.ascontiguousarray(batch)}

    weights = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
    activations = quantization.QuantType.QUInt8
    quantized = source
    if any(node.op_type == "Conv" for node in onnx.load(source).graph.node):
        # Clip and Relu follow a convolution. If they are omitted, the range before the activation function is used.
        operators = ["Conv", "Clip", "Relu"]
        quantization.quantize_static(
            source, file, Reader(), op_types_to_quantize=operators, activation_type=activations, **weights
        )
        quantized = file
    quantization.quantize_dynamic(quantized, file, op_types_to_quantize=["MatMul", "Gemm"], **weights)


WRITERS = {"fp16": _write_fp16, "int8": _write_int8}


def _set_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    import onnx

    model = onnx.load(file)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the messages of the quantizer, which uses the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
