"""Names of earlier versions on the command line, in checkpoints and in imports."""

from __future__ import annotations

from cbsa_lightning import __main__ as command
from cbsa_lightning import cli
from cbsa_lightning.cli.renamed import current, current_words


def test_class_paths_of_the_first_version_are_renamed():
    stored = {"labeler": {"class_path": "cbsa_lightning.labelers.LabelledOnly"}, "other": ["torch.optim.AdamW", 3]}
    today = {"labeler": {"class_path": "cbsa_lightning.method.labelers.LabeledOnly"}, "other": ["torch.optim.AdamW", 3]}
    assert current(stored) == current(today) == today


def test_flags_with_british_names_work_with_a_hint(capsys):
    words = [
        "fit",
        "--data.labelled_fraction=.5",
        "--model.labeler=cbsa_lightning.stacking.StackedProbes",
        "a=labelled",
    ]
    expected = ["fit", "--data.labeled_fraction=.5", "--model.labeler=cbsa_lightning.method.stacking.StackedProbes"]
    assert current_words(words) == [*expected, "a=labelled"]
    assert "--data.labelled_fraction is now --data.labeled_fraction." in capsys.readouterr().err


def test_the_command_can_be_imported_from_its_old_module():
    assert cli.main is command.main
    assert cli.entry_point is command.entry_point
