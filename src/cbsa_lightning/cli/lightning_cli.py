"""LightningCLI with the extensions of this library: runs from YAML overlays and flags."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # prevents a network request on import

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import cbsa_lightning
import cbsa_lightning.cli.class_paths  # makes class names without a module available
from cbsa_lightning.callbacks.baselines import MeasureBaselines
from cbsa_lightning.callbacks.changes import ReportChanges
from cbsa_lightning.callbacks.labels import WriteLabels
from cbsa_lightning.callbacks.predictions import WritePredictions
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.callbacks.report_page import WriteReportPage
from cbsa_lightning.callbacks.wandb_log import LogToWandb
from cbsa_lightning.callbacks.warm_start import StartFrom
from cbsa_lightning.checkpoints.earlier_run import read_earlier
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.cli.checkpoint_flags import mentioned, settle
from cbsa_lightning.cli.config_files import check_configs, expand_paths, naming_files
from cbsa_lightning.cli.parser import PlainParser, plain_cause
from cbsa_lightning.cli.run_record import RunRecord
from cbsa_lightning.data.class_names import default_prompts
from cbsa_lightning.data.datamodule import SSMLLDataModule
from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.io.runs import set_folder
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.training.comparison import compare
from cbsa_lightning.training.gain import Gain, GainCheck, report_gain
from cbsa_lightning.training.loggers import going_on
from cbsa_lightning.training.module import SSMLLModule

_CLASSES = "cbsa_lightning.data.readers.classes"

SKIPPED = 3
"""Exit status of `cbsa predict` if it skipped unreadable images."""

_NO_CHECKPOINT = (
    "cbsa {0} needs a checkpoint file, got {1}. Use --ckpt_path RUN/checkpoints/last.ckpt, or "
    "--untrained true to use the untrained network.",
    "cbsa {0} needs a checkpoint file, got {1}. To resume a run, use --resume RUN.",
)


def _seed(everything: bool | int) -> int:
    """Returns the seed for split, order and views.

    With `--seed_everything true`, Lightning draws a seed but does not report it, so 1 is used.
    """
    return 1 if isinstance(everything, bool) else everything


def _words_of(args: ArgsType) -> list[str]:
    """Returns the arguments of the command line, those of the process by default."""
    return sys.argv[1:] if args is None else [word for word in args if isinstance(word, str)]


class CBSACLI(LightningCLI):
    """LightningCLI that reads the classes from the data and optionally compares systems after the fit.

    Args:
        folder: Folder of the run; None uses the folder of the logger.
    """

    def __init__(self, *args: Any, folder: Path | None = None, **kwargs: Any) -> None:
        self._folder = folder
        self._words = _words_of(kwargs.get("args"))  # shows the settings that the user chose
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on instances only
        """Returns only the given subcommand, because setting up each parser takes a tenth of a second.

        Returns all subcommands if none is given.
        """
        known = LightningCLI.subcommands()
        chosen = set(self._words[:1]) & set(known)
        return {name: skipped for name, skipped in known.items() if not chosen or name in chosen}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Creates the Trainer, which writes to the folder of a resumed run and has no logger with ``barebones``."""
        if self._get(self.config_init, "trainer").get("barebones"):
            kwargs = {"logger": False, "num_sanity_val_steps": None, **kwargs}
        trainer = super().instantiate_trainer(**kwargs)
        if self._folder is not None:
            set_folder(trainer, self._folder)
            trainer.loggers = [going_on(logger, self._folder) for logger in trainer.loggers]
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Removes the callback of ``--checkpoint`` if checkpoints are disabled.

        Lightning rejects the combination of such a callback with disabled checkpoints.
        """
        if config.get("barebones") or config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links the settings that data and model share, and adds the callbacks that write the output of a run."""
        for names in ("class_names", "prompt_names"):
            parser.link_arguments(f"data.{names}", f"model.init_args.{names}", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{epoch}"})
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(WriteLabels, "labels")
        # This callback reads the files written by the callbacks above.
        parser.add_lightning_class_args(WriteReportPage, "report_page")
        parser.add_lightning_class_args(LogToWandb, "wandb")  # logs all of these files
        parser.add_lightning_class_args(WritePredictions, "predictions")
        parser.add_argument(
            "--compare",
            type=bool,
            default=False,
            help="After the fit, train the same network on the labeled images only, for the same number of steps, and "
            "print its mAP next to that of this run, zero-shot CLIP, and probes on frozen features.",
        )

        parser.add_argument(
            "--untrained",
            type=bool,
            default=False,
            help="Run validate, test or predict with the untrained network instead of a checkpoint.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="cbsa fit: start from the averaged weights of a finished run (its folder or a checkpoint file), even "
            "if classes or labels have changed, and report the differences (docs/how_to/photos.md).",
        )
        parser.add_argument(
            "--gain",
            type=GainCheck | None,
            default=None,
            help="Before the fit, estimate from the labeled images only whether the unlabeled images help. To "
            "enable this, set its options, for example --gain.folds 2. With --gain.keep_labeled_only true, train "
            "without the unlabeled images if they do not help.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the arguments and expands paths; errors name the configuration file."""
        with naming_files(self._words):
            super().parse_arguments(parser, args)
        self.config = expand_paths(self.config)

    def _parse_ckpt_path(self) -> None:
        """Merges the model's settings with those of the checkpoint; see :mod:`cbsa_lightning.cli.checkpoint_flags`.

        Raises:
            ConfigError: If the command would use untrained weights, or if a setting contradicts the checkpoint.
        """
        subcommand = self.config.get("subcommand")
        if subcommand is None:
            return
        config = self.config[subcommand]
        path = config.get("ckpt_path")
        if subcommand == "fit" and path in (None, "hpc"):
            return
        if path is None and config.untrained:
            return
        if path in (None, "last", "best", "hpc"):
            message = _NO_CHECKPOINT[subcommand == "fit"]
            raise ConfigError(message.format(subcommand, "none" if path is None else f"--ckpt_path {path}"))
        checkpoint = read_checkpoint(path)
        if subcommand == "predict" or (subcommand == "test" and self._lacks_training(config.data.source)):
            self._take_classes(checkpoint, subcommand, str(path))
        model = yaml.safe_load(self._parser(subcommand).dump(config, skip_none=False))["model"]
        settled = settle(model, mentioned(self._words), checkpoint, str(path), training=subcommand == "fit")
        if settled is not None:
            self.config = self.parser.parse_object({subcommand: {"model": settled}}, self.config)

    def instantiate_classes(self) -> None:
        """Builds data and model, and raises their errors without the message that jsonargparse wraps around them.

        With ``--init_from``, images that the earlier run has trained on are not held out.
        """
        place = self._get(self.config, "init_from")
        self._earlier = None if place is None else read_earlier(place)
        try:
            super().instantiate_classes()
        except Exception as error:
            if (cause := plain_cause(error)) is None:
                raise
            raise cause from None
        data: Any = self.datamodule
        if self._earlier is not None and self._earlier.labeled is not None:
            data.trained_before = self._earlier.labeled.trained()

    @staticmethod
    def _lacks_training(source: Any) -> bool:
        """Returns whether the training annotations of a source are missing, and warns if they are."""
        named = {name: value for name, value in source.init_args.items() if name in ("train", "train_annotations")}
        missing = [f"{file} ({name})" for name, file in named.items() if file is not None and not os.path.isfile(file)]
        if missing:
            rank_zero_warn(
                f"{listed(missing)} does not exist: the classes are taken from the checkpoint, and the test images are "
                "not checked for overlap with the training images."
            )
        return bool(missing)

    def _take_classes(self, checkpoint: Mapping[str, Any], subcommand: str, path: str) -> None:
        """Uses the classes of the checkpoint, so that the training annotations are not needed."""
        names = checkpoint.get("class_names")
        if names is None:
            return
        prompts = checkpoint.get("hyper_parameters", {}).get("prompt_names") or default_prompts(names)
        classes = {"class_names": list(names), "prompt_names": list(prompts)}
        source: dict[str, Any] = {"class_path": f"{_CLASSES}.Classes", "init_args": classes}
        if subcommand == "test":
            images = yaml.safe_load(self._parser(subcommand).dump(self.config[subcommand], skip_none=False))
            images = images["data"]["source"]
            source = {
                "class_path": f"{_CLASSES}.TestImages",
                "init_args": {"source": images, "checkpoint": path, **classes},
            }
        self.config = self.parser.parse_object({subcommand: {"data": {"source": source}}}, self.config)

    def before_fit(self) -> None:
        """Prepares ``--init_from``, ``--gain`` and ``--compare``, which needs a copy of the untrained model."""
        self._gain: Gain | None = None
        self._left_out = False
        trainer: Any = self.trainer
        self._start_from_earlier(trainer)
        self._check_gain()
        if (comparing := self._get(self.config, "compare")) and trainer.barebones:
            raise ConfigError("--compare needs metrics, which --trainer.barebones disables; use only one of them.")
        if comparing and not trainer.fast_dev_run:
            self._check_validates(trainer)
        self._untrained = copy.deepcopy(self.model) if comparing and not trainer.fast_dev_run else None
        self._baselines = MeasureBaselines()
        if self._untrained is not None:
            trainer.callbacks.append(self._baselines)

    def _start_from_earlier(self, trainer: Any) -> None:
        """Adds the callbacks for ``--init_from``.

        Raises:
            ConfigError: If it is combined with ``--compare`` or a checkpoint to resume from.
        """
        if self._earlier is None:
            return
        options = {word.partition("=")[0] for word in self._words}
        if {"--init_from", "--ckpt_path"} <= options:
            raise ConfigError(
                "--init_from starts a new run, whereas --ckpt_path resumes one; use only one of these options."
            )
        if self._get(self.config, "compare"):
            raise ConfigError(
                "--compare trains a second network from new weights, which is not comparable with a run that uses "
                "--init_from; add --compare false, or remove --init_from."
            )
        # These callbacks must run before the callback that shows the files they write.
        trainer.callbacks[:0] = [StartFrom(self._earlier.weights), ReportChanges(self._earlier)]

    @staticmethod
    def _check_validates(trainer: Any) -> None:
        """Raises an error before training if a run with ``--compare`` would never validate."""
        if not trainer.limit_val_batches:
            raise ConfigError(
                "--compare requires validation, but trainer.limit_val_batches is 0; change this setting, or remove "
                "--compare."
            )

    def _check_gain(self) -> None:
        """Estimates the gain of a new run; a resumed run keeps the decision from its start."""
        check: GainCheck | None = self._get(self.config_init, "gain")
        if check is None or self._get(self.config_init, "ckpt_path") is not None:
            return
        self._gain = check(self.model, self.datamodule, dict(self._get(self.config_init, "trainer")))
        rank_zero_info(self._gain.sentence())
        self._left_out = check.keep_labeled_only and self._gain.hurts
        if self._left_out:
            self.model.labeler = LabeledOnly()
            # The saved configuration must describe the actual training, so that the run can be resumed.
            config = self.config[str(self.subcommand)]
            config.model.init_args.labeler = {"class_path": "LabeledOnly"}
            config.model.init_args.stack_share = 0.0
            config.model.init_args.objective = None
            config.gain = None

    def after_predict(self) -> None:
        """Exits with status :data:`SKIPPED` if images were skipped."""
        # Lightning sets `callbacks` only after construction, so the attribute has no declared type.
        trainer: Any = self.trainer
        writers = [callback for callback in trainer.callbacks if isinstance(callback, WritePredictions)]
        if any(writer.unread for writer in writers):
            sys.exit(SKIPPED)

    def after_fit(self) -> None:
        """Reports the result of the gain check and runs the comparison, if requested."""
        if self._gain is not None:
            report_gain(self._gain, self.trainer, self._left_out)
        if self._untrained is not None and self._left_out:
            rank_zero_info("The comparison is skipped because this run already trains on the labeled images only.")
        elif self._untrained is not None:
            settings = dict(self._get(self.config_init, "trainer"))
            found = compare(self.trainer, self.datamodule, self._untrained, settings, self._baselines.results)
            others = {"the same network trained on the labeled images only": found["labeled only"]}
            trainer: Any = self.trainer
            for page in (callback for callback in trainer.callbacks if isinstance(callback, WriteReportPage)):
                page.write(trainer, self.model, others)
            for tracker in (callback for callback in trainer.callbacks if isinstance(callback, LogToWandb)):
                tracker.log_report_page(trainer)


def _useful(record: logging.LogRecord) -> bool:
    """Returns whether a log message is useful, unlike advertisements and a harmless warning of open_clip."""
    text = record.getMessage()
    return "litlogger" not in text and not text.startswith("Multiple checkpoints found")


def make_cli(args: ArgsType = None, run: bool = True, folder: Path | None = None) -> CBSACLI:
    """Runs the subcommand given as the first element of ``args``: fit, validate, test or predict.

    Args:
        args: Command-line arguments; by default those of the process.
        run: If False, only builds Trainer, module and data; ``args`` must then contain no subcommand.
        folder: Folder of the run; None uses the folder of the logger.

    Raises:
        ConfigError: If a configuration file is not a YAML mapping, or if settings are invalid.
    """
    check_configs(_words_of(args))
    with warnings.catch_warnings():
        # Lightning 2.6 uses functions that jsonargparse 4.53 renamed.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(jsonargparse|lightning)\.")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.15
        warnings.filterwarnings("ignore", message="Found .* in eval mode")  # intended for the frozen CLIP
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # expected: `cbsa table`
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # allowed: moved runs
        warnings.filterwarnings("ignore", message="You are using a custom batch sampler")  # intended
        for name in ("root", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).addFilter(_useful)
        warnings.filterwarnings("ignore", message="The number of training batches")  # metrics are logged per epoch
        return CBSACLI(
            SSMLLModule,
            SSMLLDataModule,
            subclass_mode_model=True,
            parser_class=PlainParser,
            save_config_callback=RunRecord,
            save_config_kwargs={"save_to_log_dir": False, "resumed": folder is not None},
            seed_everything_default=1,
            trainer_defaults={
                "use_distributed_sampler": False,  # the samplers distribute the images themselves
                "num_sanity_val_steps": 0,
                "logger": {
                    "class_path": "RunLogger",
                    "init_args": {"save_dir": "runs", "name": "cbsa"},
                },
            },
            auto_configure_optimizers=False,
            parser_kwargs={"version": cbsa_lightning.__version__},
            args=args,
            run=run,
            folder=folder,
        )
