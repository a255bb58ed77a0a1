"""Writes the folder of an exported model and tests it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.checkpoints.lean import FINGERPRINT
from cbsa_lightning.checkpoints.portable import WEIGHTS, write_config, write_weights
from cbsa_lightning.data.class_names import default_prompts
from cbsa_lightning.errors import CheckpointError, ConfigError, listed
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.export.check_images import check_images, write_check
from cbsa_lightning.inference.export.labels_file import (
    class_entries,
    threshold_values,
    write_labels_file,
    write_preprocess_file,
)
from cbsa_lightning.inference.export.model_card import write_card
from cbsa_lightning.inference.export.onnx_model import OPSET, check_packages, write_onnx
from cbsa_lightning.inference.export.program_file import PROGRAM, read_program, write_program
from cbsa_lightning.inference.export.scoring import EXTRA_OUTPUTS, ScoringGraph, exported
from cbsa_lightning.inference.export.variants import WRITERS, Variant, write_variants
from cbsa_lightning.io.checksums import write_checksums
from cbsa_lightning.io.files import writing

ONNX, PT2, SAFETENSORS = FORMATS = ("onnx", "pt2", "safetensors")
MODEL_FILE = "model.onnx"
SCRIPT = "predict.py"
TOLERANCE = 1e-4  # maximum accepted difference between probabilities, as in predict.py


def export(
    checkpoint: Path,
    folder: Path,
    formats: Sequence[str] = FORMATS,
    extra: Sequence[str] = (),
    run: Path | None = None,
    variants: Sequence[str] = (),
    **options: Any,
) -> list[str]:
    """Exports the model of a checkpoint and tests the result.

    The folder is written under a temporary name and is renamed after all tests have passed.

    Args:
        checkpoint: The checkpoint.
        folder: Output folder, which must be empty or not exist.
        formats: Formats to export, from :data:`FORMATS`.
        extra: Additional outputs of the graph: ``attention``, ``context``, or both.
        run: Folder of the run, from which precision and recall in `labels.json` are read.
        variants: Smaller variants of `model.onnx`, from
            :data:`~cbsa_lightning.inference.export.variants.WRITERS`. They require the run.
        **options: Options for loading the checkpoint; see
            :meth:`~cbsa_lightning.inference.classifier.Classifier.load`.

    Returns:
        The results of the test, one sentence for each format and variant.

    Raises:
        ConfigError: If the folder is not empty, if a format, an output or a variant is unknown, if a package is
            missing, or if the images that variants require do not exist.
        CheckpointError: If the checkpoint cannot be loaded, or the scores of the exported model differ from those of
            the checkpoint.
        OutputError: If a file cannot be written.
    """
    _check_names("format", formats, FORMATS)
    _check_names("extra output", extra, EXTRA_OUTPUTS)
    _check_names("variant", variants, tuple(WRITERS))
    if variants and ONNX not in formats:
        raise ConfigError("Variants are computed from model.onnx. Add onnx to the formats, or remove the variants.")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already. Choose another folder, or remove it first.")
    if ONNX in formats:
        check_packages()
    classifier = Classifier.load(checkpoint, **options)
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    with writing(folder):
        draft.mkdir(parents=True)
    try:
        smaller = _write(
            draft, folder.name, read_checkpoint(checkpoint), classifier, formats, tuple(extra), run, variants
        )
        found = [*_tested(draft, classifier, formats, options), *map(str, smaller)]
        with writing(folder):
            draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return found


def _check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"Unknown {what}: {listed(unknown)}. Choose from {listed(known)}.")
    if what == "format" and not names:
        raise ConfigError(f"No export format is given. Choose from {listed(known)}.")


def _write(
    folder: Path,
    name: str,
    checkpoint: dict[str, Any],
    classifier: Classifier,
    formats: Sequence[str],
    extra: tuple[str, ...],
    run: Path | None,
    variants: Sequence[str],
) -> list[Variant]:
    names = list(classifier.class_names)
    prompts = list(checkpoint["hyper_parameters"].get("prompt_names") or default_prompts(names))
    entries = class_entries(names, prompts, classifier.thresholds, run)
    write_labels_file(folder, entries, classifier.calibrated)
    write_preprocess_file(folder, classifier.image_size)
    write_config(checkpoint, folder, image_size=classifier.image_size)
    write_check(folder, classifier)
    if SAFETENSORS in formats:
        write_weights(checkpoint, folder)
    if {ONNX, PT2} & set(formats):
        graph = ScoringGraph(classifier, extra)
        program = exported(graph, classifier.image_size)
        metadata = _metadata(checkpoint, classifier, graph)
        if PT2 in formats:
            write_program(program, folder / PROGRAM, metadata)
        if ONNX in formats:
            write_onnx(program, folder / MODEL_FILE, extra, metadata)
            shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)
    smaller = write_variants(folder, variants, run) if variants else []
    write_card(folder, name, checkpoint, classifier, entries, run, smaller)
    write_checksums(folder)
    return smaller


def _metadata(checkpoint: dict[str, Any], classifier: Classifier, graph: ScoringGraph) -> dict[str, str]:
    """Returns the metadata of `model.onnx` and `model.pt2`."""
    return {
        "class_names": json.dumps(classifier.class_names, ensure_ascii=False),
        "thresholds": json.dumps(threshold_values(classifier.thresholds)),
        "calibrated": json.dumps(classifier.calibrated),
        "image_size": str(classifier.image_size),
        "resize": "squash to a square, bilinear, antialiased (preprocess.json)",
        "outputs": json.dumps(graph.outputs),
        "frozen_fingerprint": str(checkpoint.get(FINGERPRINT, "")),
        "cbsa_lightning": version("cbsa-lightning"),
        "torch": torch.__version__,
        "opset": str(OPSET),
    }


def _tested(folder: Path, classifier: Classifier, formats: Sequence[str], options: dict[str, Any]) -> list[str]:
    """Compares the scores of each format with those of the classifier.

    Raises:
        CheckpointError: If the scores differ.
    """
    images = check_images(classifier.image_size)
    expected = classifier.scores(images)
    found = []
    if ONNX in formats:
        command = [sys.executable, str(folder / SCRIPT), "--check"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own script
        if result.returncode:
            raise CheckpointError(f"{MODEL_FILE} failed its test: {result.stderr.strip()[-1000:]}")
        found.append(f"{MODEL_FILE}: {result.stdout.strip()}")
    if PT2 in formats:
        run, _ = read_program(folder / PROGRAM)
        with torch.no_grad():
            scores = run(torch.stack([classifier.view(image) for image in images]))[1]
        found.append(f"{PROGRAM}: {_compared(PROGRAM, scores, expected)}")
    if SAFETENSORS in formats:
        scores = Classifier.load(folder, **options).scores(images)
        found.append(f"{WEIGHTS}: {_compared(WEIGHTS, scores, expected)}")
    return found


def _compared(name: str, scores: Tensor, expected: Tensor) -> str:
    difference = float((scores - expected).abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(f"{name} failed its test: the probabilities differ by {difference:.1e}.")
    return f"The check passed: the probabilities differ by at most {difference:.1e}."
