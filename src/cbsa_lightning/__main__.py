"""The `cbsa` command: check a data set; fit, test, label and export a run; the paper's tables and figures."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cbsa_lightning.cli.renamed import current_words
from cbsa_lightning.errors import CBSAError

HELP = """usage: cbsa COMMAND [options]

  check      tell what a data set holds and what is wrong with it, before training: cbsa check photos.csv
  fit        train a model, write predictions and pictures; --resume [RUN] continues a run,
             --init_from RUN starts a new one from its weights, after labels have changed
  validate   measure a checkpoint on the images that are held out for validation
  test       measure a checkpoint on the test images
  predict    label images: --data.predict FOLDER --ckpt_path RUN/checkpoints/last.ckpt
  label      write labels of a run for a labeling tool: cbsa label RUN --to label-studio --output tasks.json
  export     write a trained model for use without this library: cbsa export RUN --to FOLDER
  table      run the systems of one of the paper's tables: cbsa table 1
  figure     draw one of the paper's figures: cbsa figure 4 RUN

  cbsa COMMAND --help    all options of a command
  cbsa --version         the version of the library
"""


def main(args: Sequence[str] | None = None) -> Any:
    """Runs the command line.

    Args:
        args: Arguments instead of those of the process, for calls from Python and tests.

    Returns:
        The LightningCLI of a run, the report of a check, the file of a table, a figure or of labels, the
        folder of an export; None for help and version.
    """
    words = current_words(sys.argv[1:] if args is None else args)
    if words in ([], ["-h"], ["--help"], ["--version"]):  # answered at once: torch and Lightning take seconds to import
        print(f"cbsa {version('cbsa-lightning')}" if words == ["--version"] else HELP)
        return None
    if words[0] == "check":  # needs neither torch nor Lightning
        from cbsa_lightning.cli.check import check_command

        return check_command(words[1:])
    if words[:1] == ["label"]:  # as long as it labels no new images
        from cbsa_lightning.cli.label import label

        return label(words[1:])
    if words[:1] == ["export"]:
        from cbsa_lightning.cli.export import export_command

        return export_command(words[1:])
    if words[:1] == ["figure"]:
        from cbsa_lightning.reproduce.figures import figure_command

        return figure_command(words[1:])
    if words[:1] == ["predict"] and _names_checkpoint_alone(words):
        from cbsa_lightning.inference.labels.new_images import predict

        return predict(words[1:])
    from cbsa_lightning.cli.config_files import find_configs
    from cbsa_lightning.cli.lightning_cli import make_cli
    from cbsa_lightning.cli.resuming import resumed
    from cbsa_lightning.reproduce.tables import table

    # LightningCLI knows the methods of a Trainer alone, so what is ours is taken out before it looks.
    if words[:1] == ["table"]:
        return table(words[1:])
    if words[:1] == ["fit"] and {"-h", "--help"} & set(words):
        print("--resume [RUN]: resume this run, or the newest below runs/ (docs/faults.md).\n")
    with resumed(find_configs(words)) as run:
        before = os.environ.get("WANDB_RUN_ID")
        if run.wandb_id is not None:
            os.environ["WANDB_RUN_ID"] = run.wandb_id  # which wandb takes where a logger names no id
        try:
            return make_cli(run.words, folder=run.folder)
        finally:
            if run.wandb_id is not None:
                os.environ.pop("WANDB_RUN_ID", None)
                os.environ.update({} if before is None else {"WANDB_RUN_ID": before})


def _names_checkpoint_alone(words: Sequence[str]) -> bool:
    """Whether a prediction is to be made by a checkpoint without any configuration."""
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    return bool(options) and set(options) <= {"--ckpt_path", "--data.predict", "--predictions.output"}


_REMEDIES = {
    "MisconfigurationException": "",  # Lightning's messages say what to change
    "OutOfMemoryError": " Reduce data.batch_size and data.eval_batch_size, or set trainer.precision to 16-mixed.",
}


def entry_point() -> None:
    """The `cbsa` command: errors that a user can act on end in a sentence, without a trace."""
    try:
        main()
    except CBSAError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except Exception as error:
        # By name, since torch and Lightning take seconds to import and most commands need neither.
        kind = type(error).__name__
        if kind not in _REMEDIES:
            raise
        sys.exit(f"{kind}: {str(error).partition(chr(10))[0]}{_REMEDIES[kind]}")
    except SystemExit as end:
        if type(end).__name__ != "SIGTERMException":  # Lightning's, which is not imported for this
            raise
        print(
            "Received SIGTERM: stopped between two steps. To continue: `cbsa fit --resume`, or `cbsa table` again.",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    entry_point()
