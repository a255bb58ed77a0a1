"""The `cbsa` command: fit, validate, test and predict one run, and table for the paper's tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from cbsa_lightning.errors import CBSAError
from cbsa_lightning.lightning_cli import make_cli
from cbsa_lightning.tables import table


def main(args: Sequence[str] | None = None) -> Any:
    """Runs the command line.

    Args:
        args: Arguments instead of those of the process, for calls from Python and tests.

    Returns:
        The LightningCLI of a run, or the file of a table.
    """
    words = list(sys.argv[1:] if args is None else args)
    # LightningCLI knows the methods of a Trainer alone, so our own verb is taken out before it looks.
    return table(words[1:]) if words[:1] == ["table"] else make_cli(None if args is None else words)


def entry_point() -> None:
    """The `cbsa` command: our own errors are told in a sentence, without a trace."""
    try:
        main()
    except CBSAError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    entry_point()
