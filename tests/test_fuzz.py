"""A few hundred bad inputs of every kind; ``python -m fuzz`` runs as many as one likes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the campaign is no part of the package

from fuzz.harness import Case, Silence, Target, generator, judge, set_up
from fuzz.targets import TARGETS

from cbsa_lightning.errors import DataError

INPUTS = {"data settings": 30, "configs": 25, "checkpoints": 60, "VOC ImageSets": 100}  # which take longer
MANY = 200  # of the others


@pytest.fixture(autouse=True)
def _limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back what a target sets


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_is_valid_or_refused_with_its_place(name, tmp_path):
    target = TARGETS[name]()
    set_up(target, tmp_path / "files")
    number = INPUTS.get(name, MANY)
    outcomes = [judge(target, target.draw(generator(7, target, i)), tmp_path / "files") for i in range(number)]
    assert [(i, outcome.defect) for i, outcome in enumerate(outcomes) if outcome.defect] == []
    kinds = {outcome.kind for outcome in outcomes}
    assert "valid" in kinds, "nothing but damage says nothing of silence"
    assert len(kinds) > 1


class Broken(Target):
    """Behaves as its option says."""

    name, share, seconds = "broken", 1, 0.2

    def draw(self, rng):
        return Case()

    def run(self, case, folder):
        if case.options["how"] == "hang":
            while True:
                pass
        raise case.options["how"]


class Endless(DataError):
    """Other errors of the library cut what is too long."""

    def __str__(self):
        return "a.txt: " + "x" * 20_000


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("hang", "hang: more than 0.2 s"),
        (KeyError("x"), "foreign KeyError"),
        (SystemExit(2), "foreign SystemExit"),
        (MemoryError(), "foreign MemoryError"),
        (Silence("lost a row"), "silence: lost a row"),
        (DataError("something is wrong"), "no place: DataError names none of ('a.txt',)"),
        (Endless(), "message of 20007 characters"),
        (DataError("a.txt: is wrong"), ""),
    ],
)
def test_the_judge_knows_a_defect(tmp_path, how, found):
    outcome = judge(Broken(), Case({"a.txt": b""}, {"how": how}), tmp_path)
    assert outcome.defect.startswith(found)
    assert (outcome.kind == "defect") == bool(found)
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_a_function_of_the_seed():
    for name in ("image bytes", "CSV tables", "COCO", "class files"):
        first, second = TARGETS[name](), TARGETS[name]()
        assert first.draw(generator(3, first, 5)) == second.draw(generator(3, second, 5))
