"""The `cbsa` command: checks data sets, trains and evaluates models, writes labels, and runs the paper's tables."""

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

  check      summarize a data set and report its problems before training: cbsa check photos.csv
  fit        train a model and write predictions and plots; --resume [RUN] continues a run,
             --init_from RUN starts a new run from the weights of RUN, for example after labels have changed
  validate   evaluate a checkpoint on the validation images
  test       evaluate a checkpoint on the test images
  predict    label images with a checkpoint: --data.predict FOLDER --ckpt_path RUN/checkpoints/last.ckpt
  label      write the labels of a run for a labeling tool: cbsa label RUN --to label-studio --output tasks.json
  export     export a trained model for use without this library: cbsa export RUN --to FOLDER
  table      run the experiments of one of the paper's tables: cbsa table 1
  figure     draw one of the paper's figures from a run or annotations: cbsa figure 4 RUN

  cbsa COMMAND --help    show all options of a command
  cbsa --version         show the version of the library
"""


def main(args: Sequence[str] | None = None) -> Any:
    """Runs the command line.

    Args:
        args: Command-line arguments. None uses the arguments of the process.

    Returns:
        The LightningCLI of a run, the report of a check, the file of a table, of a figure or of labels, or the
        folder of an export. None for help and version.
    """
    words = current_words(sys.argv[1:] if args is None else args)
    if words in ([], ["-h"], ["--help"], ["--version"]):  # handled first, because importing torch takes seconds
        print(f"cbsa {version('cbsa-lightning')}" if words == ["--version"] else HELP)
        return None
    if words[0] == "check":  # needs neither torch nor Lightning
        from cbsa_lightning.cli.check import check_command

        return check_command(words[1:])
    if words[:1] == ["label"]:  # needs neither of them unless it labels new images
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

    # LightningCLI accepts only methods of a Trainer as commands, so other commands and --resume are handled first.
    if words[:1] == ["table"]:
        return table(words[1:])
    if words[:1] == ["fit"] and {"-h", "--help"} & set(words):
        print("--resume [RUN]: resume this run, or the newest run below runs/ (docs/reference/faults.md).\n")
    with resumed(find_configs(words)) as run:
        before = os.environ.get("WANDB_RUN_ID")
        if run.wandb_id is not None:
            os.environ["WANDB_RUN_ID"] = run.wandb_id  # wandb uses it if the logger does not specify an id
        try:
            return make_cli(run.words, folder=run.folder)
        finally:
            if run.wandb_id is not None:
                os.environ.pop("WANDB_RUN_ID", None)
                os.environ.update({} if before is None else {"WANDB_RUN_ID": before})


def _names_checkpoint_alone(words: Sequence[str]) -> bool:
    """Returns whether the options of `predict` specify a checkpoint but no configuration."""
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    return bool(options) and set(options) <= {"--ckpt_path", "--data.predict", "--predictions.output"}


_REMEDIES = {
    "MisconfigurationException": "",  # Lightning's messages already include the remedy
    "OutOfMemoryError": " Reduce data.batch_size and data.eval_batch_size, or set trainer.precision to 16-mixed.",
}


def entry_point() -> None:
    """Runs the `cbsa` command. Errors that a user can fix are printed as one sentence, without a traceback."""
    try:
        main()
    except CBSAError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except Exception as error:
        # The class is compared by name, since importing torch and Lightning takes seconds and few commands need them.
        kind = type(error).__name__
        if kind not in _REMEDIES:
            raise
        sys.exit(f"{kind}: {str(error).partition(chr(10))[0]}{_REMEDIES[kind]}")
    except SystemExit as end:
        if type(end).__name__ != "SIGTERMException":  # a class of Lightning, compared by name as above
            raise
        print(
            "Received SIGTERM and stopped between two steps. Continue with `cbsa fit --resume`, or run `cbsa table` "
            "again.",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    entry_point()
