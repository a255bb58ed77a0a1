"""``cbsa check``, which reports the content of a data set and the problems with it before training."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from cbsa_lightning.cli.config_files import expand_paths, find_config, shipped_configs
from cbsa_lightning.cli.overlays import Settings, merged, read
from cbsa_lightning.data.checks.checking import Report, check, refused
from cbsa_lightning.data.checks.report import text_of, write_json
from cbsa_lightning.data.checks.run_time import run_time
from cbsa_lightning.data.plan import RunSettings
from cbsa_lightning.data.readers import COCO, Source
from cbsa_lightning.errors import CBSAError, ConfigError, DataError, causes, listed
from cbsa_lightning.io.reading import open_regular

if TYPE_CHECKING:
    from cbsa_lightning.data.checks.near_duplicates import Similar  # imports torch

_READERS = "cbsa_lightning.data.readers"


def check_command(args: Sequence[str] | None = None) -> Report:
    """Checks a data set and prints the report.

    Args:
        args: Command-line arguments, which ``--help`` lists. By default, the arguments of the process are used.

    Returns:
        The report if no problem prevents training.

    Raises:
        ConfigError: If the command line or a configuration is invalid.
        SystemExit: With status 1, after the report, if ``cbsa fit`` would reject the data set.
    """
    options = _parser().parse_args(args)
    recipe = _recipe(options)
    with redirect_stdout(sys.stderr):  # only the report is written to standard output
        report = _checked(recipe, _comparison(options))
        if options.time and report.plan is not None and not report.errors:
            print("Measuring the time of a few images and training steps ...")
            report = replace(report, time=run_time(recipe, report.plan))
    if options.json:
        write_json(report, sys.stdout)
    else:
        print(text_of(report))
    if report.errors:
        sys.exit(1)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cbsa check",
        description="Reports the content of a data set, its problems, and how a run would use it. Reads every image "
        "file once and does not write files. Exits with status 1 if `cbsa fit` would reject the data set or a "
        "test image is also a training image.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a table (.csv, .parquet, ...), a COCO file or Label Studio export (.json), a CVAT export (.xml), or "
        "configurations of `cbsa fit` (.yaml), which are merged from left to right (default settings: photos.yaml)",
    )
    parser.add_argument("--test", metavar="FILE", help="annotations of the test images")
    parser.add_argument("--root", metavar="DIR", help="folder that image paths are relative to")
    parser.add_argument("--class-file", metavar="FILE", help="class file with prompt names")
    parser.add_argument("--held-out", type=float, metavar="SHARE", help="fraction of the labeled images for validation")
    parser.add_argument("--batch-size", type=int, metavar="B", help="number of images per step")
    parser.add_argument(
        "--near-duplicates",
        metavar="CLIP",
        help="CLIP model that finds similar images: an open_clip name, a folder, or embedded",
    )
    parser.add_argument("--pretrained", metavar="TAG", help="weights of this model: an open_clip tag or a file")
    parser.add_argument(
        "--time", action="store_true", help="time a few images and training steps, and estimate the duration of a run"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object with all paths")
    return parser


def _recipe(options: argparse.Namespace) -> Settings:
    """Returns the configuration of the run, in which options override the configuration files."""
    configs = [name for name in options.files if Path(name).suffix.lower() in (".yaml", ".yml")]
    annotations = [name for name in options.files if name not in configs]
    if len(annotations) > 1:
        raise ConfigError(
            f"{listed(annotations)}: pass one file for the training images. Pass the test images with --test FILE."
        )
    recipe = merged(map(read, map(find_config, configs) if configs else [shipped_configs() / "photos.yaml"]))
    data = recipe.get("data") or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{listed(configs)}: the section data must be a mapping such as 'data: {{batch_size: 64}}'.")
    given = {"test": options.test, "root": options.root, "class_file": options.class_file}
    given = {name: value for name, value in given.items() if value is not None}
    if annotations:
        data["source"] = _source_of(annotations[0], given)
    elif given:
        source = data.get("source")
        source = source if isinstance(source, dict) else {"class_path": source}
        data["source"] = {**source, "init_args": {**_section(source, "init_args"), **given}}
    if not data.get("source"):
        raise ConfigError(f"{listed(configs)}: data.source is missing. Add a configuration that sets it, or a table.")
    for name, value in (("held_out_fraction", options.held_out), ("batch_size", options.batch_size)):
        if value is not None:
            data[name] = value
    return {**recipe, "data": data}


def _source_of(file: str, given: dict[str, str]) -> Settings:
    """Returns the source that reads a file of annotations, in the form of a configuration."""
    suffix = Path(file).suffix.lower()
    if suffix == ".xml":
        return _tool(file, "cvat", "CVAT", given)
    if suffix != ".json":
        return {"class_path": f"{_READERS}.table.Table", "init_args": {"train": file, **given}}
    if _first_character(file) == b"[":
        return _tool(file, "label_studio", "LabelStudio", given)
    arguments = {
        "root": given.get("root", str(Path(file).parent)),
        "train_annotations": str(Path(file).absolute()),
        "val_annotations": str(Path(given.get("test", file)).absolute()),
        "train_images": ".",
        "val_images": ".",
        **{name: value for name, value in given.items() if name == "class_file"},
    }
    name = f"{_READERS}.coco.COCO" if "test" in given else f"{__name__}.{TrainingCOCO.__name__}"
    return {"class_path": name, "init_args": arguments}


class TrainingCOCO(COCO):
    """A COCO file of training images, without test images."""

    def test(self) -> None:  # type: ignore[override]  # a source may return None
        """Returns None, since there are no test images."""


def _tool(file: str, module: str, name: str, given: dict[str, str]) -> Settings:
    """Returns the source that reads an export of a labeling tool."""
    return {"class_path": f"{_READERS}.{module}.{name}", "init_args": {"train": file, **given}}


def _first_character(file: str) -> bytes:
    try:
        with open_regular(file) as stream:
            return stream.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); correct the path") from error


def _comparison(options: argparse.Namespace) -> Callable[[Sequence[Path]], Similar] | None:
    """Returns the function that compares images; None without ``--near-duplicates``."""
    if options.near_duplicates is None:
        if options.pretrained is not None:
            raise ConfigError("--pretrained sets the weights of the --near-duplicates model. Pass both options.")
        return None
    from cbsa_lightning.clip import FrozenCLIP
    from cbsa_lightning.data.checks.near_duplicates import near_duplicates

    weights = {} if options.pretrained is None else {"pretrained": options.pretrained}
    clip = FrozenCLIP.load(options.near_duplicates, **weights)
    clip.speed_up()
    return partial(near_duplicates, clip=clip)


def _checked(recipe: Settings, near_duplicates: Callable[[Sequence[Path]], Similar] | None) -> Report:
    source, settings = _built(recipe)
    try:
        source.prepare()
        train, test = source.train(), source.test()
        notes = list(dict.fromkeys(source.describe()))
    except CBSAError as error:
        return refused(error)
    return replace(check(train, test, settings, near_duplicates), notes=notes)


def _built(recipe: Settings) -> tuple[Any, RunSettings]:
    """Builds the source and the settings in the same way as `cbsa fit`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=Source)
    parser.add_argument("--run", type=RunSettings)
    plain = expand_paths({"source": recipe["data"]["source"], "run": _run_settings(recipe)})
    try:
        with warnings.catch_warnings():
            # jsonargparse 4.49 renamed this function, but the oldest supported release has only the old name.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse|cbsa_lightning")
            built = parser.instantiate_classes(parser.parse_object(plain))
    except Exception as error:
        if own := [cause for cause in causes(error) if isinstance(cause, CBSAError)]:
            raise own[0] from None
        if isinstance(error, (TypeError, ValueError)) or type(error).__name__ == "ArgumentError":
            raise ConfigError(f"Invalid configuration: {' '.join(str(error).split())}") from error
        raise
    return built.source, built.run


def _run_settings(recipe: Settings) -> Settings:
    data, model = recipe["data"], _section(recipe.get("model"), "init_args")
    taken = {field.name: data[field.name] for field in fields(RunSettings) if field.name in data}
    labeler, seed = model.get("labeler"), recipe.get("seed_everything", 1)
    labeler = labeler.get("class_path") if isinstance(labeler, dict) else labeler
    return {
        **taken,
        "seed": 1 if isinstance(seed, bool) else seed,
        "labeled_only": str(labeler).split(".")[-1] == "LabeledOnly",
        "warmup_epochs": model.get("warmup_epochs"),
        "max_epochs": _section(recipe, "trainer").get("max_epochs"),
    }


def _section(place: Any, name: str) -> Settings:
    found = place.get(name) if isinstance(place, dict) else None
    return found if isinstance(found, dict) else {}


def source_of(files: Sequence[str]) -> tuple[Source, Settings]:
    """Builds the source of a data set without checking it.

    Args:
        files: A file of annotations, or configurations, as for `cbsa check`.

    Returns:
        The source, and the merged settings.

    Raises:
        ConfigError: If a configuration is invalid.
    """
    recipe = _recipe(_parser().parse_args(["--", *files]))
    return _built(recipe)[0], recipe
