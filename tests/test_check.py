"""`cbsa check`: findings, messages and exit status."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_lightning import SSMLLDataModule
from cbsa_lightning import __main__ as cli
from cbsa_lightning.cli import check as check_command
from cbsa_lightning.clip.pooling import ImageTokens
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.checks.checking import check, count_labels
from cbsa_lightning.data.checks.near_duplicates import near_duplicates
from cbsa_lightning.data.checks.spelling import similar_names
from cbsa_lightning.data.checks.survey import equal_rows
from cbsa_lightning.data.label_masks import LabelMask
from cbsa_lightning.data.plan import RunSettings, make_plan
from cbsa_lightning.data.readers import Table
from cbsa_lightning.data.splits import Split
from cbsa_lightning.errors import ConfigError
from layouts import write_image, write_rows
from tiny_data import Squares, tiny_data


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid data set: 40 images, half of them labeled, in `photos.csv`."""
    monkeypatch.chdir(tmp_path)
    rows = [[f"{i}.png", ("cat;dog", "cat", "sofa;dog", "none")[i % 4] if i < 20 else ""] for i in range(40)]
    for i in range(40):
        write_image(tmp_path / f"{i}.png", seed=i)
    write_rows(tmp_path / "photos.csv", ["image", "labels"], rows)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> dict:
    """Returns the JSON report of a command that exits with ``status``."""
    if status:
        with pytest.raises(SystemExit) as stop:
            cli.main(["check", "--json", *words])
        assert stop.value.code == status
    else:
        cli.main(["check", "--json", *words])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (not status) == (not found["errors"])
    return found


def finding(report: dict, kind: str, among: str) -> dict:
    """Returns the only finding of a kind."""
    (found,) = [entry for entry in report[among] if entry["kind"] == kind]
    assert found["count"] == len(found["items"])
    return found


def names(found: dict) -> list[list[str]]:
    return [item["names"] for item in found["items"]]


def test_a_valid_data_set(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "photos.csv")
    assert list(report) == ["ok", "notes", "classes", "train", "test", "run", "time", "errors", "warnings"]
    assert report["train"] == {"images": 40, "labeled": 20, "empty": 5, "partly": 0, "unlabeled": 20}
    assert report["classes"] == [
        {"name": "sofa", "positives": 5, "negatives": 15, "test_positives": None},
        {"name": "cat", "positives": 10, "negatives": 10, "test_positives": None},
        {"name": "dog", "positives": 10, "negatives": 10, "test_positives": None},
    ]
    assert report["test"] is None
    assert report["time"] is None
    assert not report["errors"] + report["warnings"]


def test_text_report_names_the_same_findings(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "photos.csv"])
    out = capsys.readouterr().out
    assert "train: 40 images, 20 labeled (5 show no class), 20 unlabeled." in out
    assert "3 classes with their numbers of positives, in ascending order: sofa 5, cat 10, dog 10." in out
    assert "A run trains on 16 labeled and 20 unlabeled images, and validates on 4 held-out images" in out
    assert out.endswith("No faults found.\n")


@pytest.mark.parametrize(
    ("settings", "test"),
    [
        ({"labeled_fraction": 0.4, "batch_size": 8}, 7),
        ({"labeled_fraction": 0.4, "batch_size": 8, "held_out_fraction": 0.3, "min_steps_per_epoch": 9}, 7),
        ({"labeled_fraction": 0.5, "batch_size": 6, "labeled_per_batch": 4, "warmup_batch_size": 3}, 0),
    ],
)
def test_the_plan_equals_the_data_module(tmp_path: Path, settings: dict, test: int) -> None:
    source = Squares(tmp_path, test=test)
    data = tiny_data(source, **settings)
    data.setup("fit")
    plan = make_plan(source.train(), source.test(), RunSettings(seed=data.seed, **settings))
    assert plan.split.digest == data.split.digest
    assert plan.validated == len(data.eval_table())
    assert plan.second.steps_per_epoch == len(data.train_dataloader())
    assert (plan.second.labeled, plan.warmup.labeled) == (data.labeled_per_batch, data.warmup_batch_size)
    passes = math.ceil(len(data.split.labeled) / data.warmup_batch_size)
    assert plan.warmup.steps_per_epoch == max(passes, settings.get("min_steps_per_epoch", 1))


@pytest.mark.parametrize("test", [0, 3])
def test_skipped_images_are_not_in_the_plan(tmp_path: Path, test: int) -> None:
    source = Squares(tmp_path, test=test)
    data = tiny_data(source, on_error="skip")
    data.setup("fit")
    evaluated, part = data.eval_table(), 1 if test else 0
    settings = RunSettings(seed=data.seed, labeled_fraction=0.4, batch_size=8, on_error="skip")
    for row in range(1, len(evaluated)):  # all but one
        evaluated.file(row).write_bytes(b"damaged")
    again = tiny_data(source, on_error="skip")
    again.setup("fit")
    report = check(source.train(), source.test(), settings)
    assert report.errors == []
    plan = report.plan
    assert plan.validated == len(again.eval_table()) == 1
    assert plan.split.digest == again.split.digest
    evaluated.file(0).write_bytes(b"damaged")
    (found,) = check(source.train(), source.test(), settings).errors
    assert ("Provide a test table", "all test images are skipped")[part] in found.message


def test_a_split_file_is_used(tmp_path: Path) -> None:
    table = Squares(tmp_path).train()
    for name, split in (("some", Split(range(5), range(5, 20), [20, 21])), ("none", Split([], range(20), [20, 21]))):
        split.save(tmp_path / name, table)
    plan = make_plan(table, None, RunSettings(split_file=str(tmp_path / "some")))
    assert plan.split.labeled.tolist() == list(range(5))
    assert (plan.validated_on, plan.validated) == ("held-out images", 2)
    (found,) = check(table, None, RunSettings(split_file=str(tmp_path / "none"))).errors
    assert "no labeled image" in found.message


def test_settings_have_the_data_modules_defaults() -> None:
    of_module = inspect.signature(SSMLLDataModule).parameters
    for field in fields(RunSettings):
        if field.name not in ("labeled_only", "warmup_epochs", "max_epochs"):
            assert field.default == of_module[field.name].default, field.name


def test_counts_of_each_kind_of_row() -> None:
    counts = count_labels(np.array([[1, 0], [0, 0], [-1, -1], [1, -1], [-1, 0]], np.int8))
    assert (counts.images, counts.labeled, counts.empty, counts.partly, counts.unlabeled) == (5, 4, 1, 2, 1)
    assert counts.positives == (2, 0)
    assert counts.negatives == (1, 3)


def test_missing_images_are_named_and_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "3.png").unlink()
    (photos / "30.png").unlink()
    found = finding(run(capsys, "photos.csv", status=1), "missing", "errors")
    assert names(found) == [["3.png"], ["30.png"]]


def test_a_missing_image_whose_name_has_another_case(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "3.png").rename(photos / "3.PNG")
    if (photos / "3.png").exists():
        pytest.skip("this file system ignores case")
    found = finding(run(capsys, "photos.csv", status=1), "missing", "errors")
    assert found["items"] == [{"names": ["3.png"], "note": "there is 3.PNG"}]


def test_unreadable_images_are_named_with_the_reason(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(content[: len(content) // 2])
    (photos / "2.png").write_bytes(b"")
    (photos / "4.png").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    found = finding(run(capsys, "photos.csv", status=1), "unreadable", "errors")
    assert names(found) == [["1.png"], ["2.png"], ["4.png"]]
    notes = [item["note"] for item in found["items"]]
    assert "cannot be read as an image" in notes[0]
    assert notes[1].startswith("the file is empty")
    assert notes[2].startswith("HEIC files are not supported")


def test_unreadable_images_that_a_run_skips_are_a_warning(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "1.png").write_bytes(b"")
    (photos / "skip.yaml").write_text("data: {on_error: skip}")
    assert names(finding(run(capsys, "skip.yaml", "photos.csv"), "unreadable", "warnings")) == [["1.png"]]


def test_tiny_and_misnamed_images_are_warnings(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(photos / "5.png", seed=5, size=(31, 400))
    write_image(photos / "x.jpg", seed=6)
    (photos / "x.jpg").replace(photos / "6.png")
    report = run(capsys, "photos.csv")
    assert names(finding(report, "tiny", "warnings")) == [["5.png"]]
    assert finding(report, "misnamed", "warnings")["items"] == [{"names": ["6.png"], "note": "is JPEG"}]


def test_equal_images_are_found_by_content(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for copy, original in (("25", "24"), ("39", "24"), ("31", "30")):
        (photos / f"{copy}.png").write_bytes((photos / f"{original}.png").read_bytes())
    found = finding(run(capsys, "photos.csv"), "duplicate", "warnings")
    assert names(found) == [["24.png", "25.png", "39.png"], ["30.png", "31.png"]]


def test_equal_images_with_contradictory_labels(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(photos / "two.csv", ["image", "cat", "dog"], [[f"{i}.png", i % 2, ""] for i in range(20)])
    (photos / "two.csv").write_text((photos / "two.csv").read_text() + "20.png,,\n")
    (photos / "1.png").write_bytes((photos / "0.png").read_bytes())
    report = run(capsys, "two.csv")
    assert report["train"] == {"images": 21, "labeled": 20, "empty": 0, "partly": 20, "unlabeled": 1}
    (found,) = [entry for entry in report["warnings"] if "duplicate" in entry["kind"]]
    assert found["items"] == [{"names": ["0.png", "1.png"], "note": "labels differ"}]


def test_a_held_out_image_used_for_training_under_another_name(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = AnnotationTable(photos, [f"{i}.png" for i in range(40)], np.full((40, 1), 1, np.int8), ("cat",))
    table.labels[20:] = -1
    plan = make_plan(table, None, RunSettings())
    held_out, trained = int(plan.split.held_out[0]), int(plan.split.labeled[0])
    table.file(trained).write_bytes(table.file(held_out).read_bytes())
    (found,) = check(table).warnings
    assert found.kind == "held_out_duplicate"
    assert [set(item.names) for item in found.items()] == [{str(table.file(i)) for i in (held_out, trained)}]


def test_a_test_image_that_is_a_training_image_is_an_error(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "test").mkdir()
    (photos / "test/copy.png").write_bytes((photos / "7.png").read_bytes())
    write_image(photos / "test/new.png", seed=99)
    write_rows(photos / "test.csv", ["image", "labels"], [["test/copy.png", "cat"], ["test/new.png", "dog"]])
    report = run(capsys, "photos.csv", "--test", "test.csv", status=1)
    assert names(finding(report, "leak", "errors")) == [["7.png", "test/copy.png"]]
    assert report["test"]["images"] == 2
    assert report["run"]["validated_on"] == "test images"
    write_rows(photos / "same.csv", ["image", "labels"], [["7.png", "cat"], ["test/new.png", "dog"]])
    report = run(capsys, "photos.csv", "--test", "same.csv", status=1)
    assert names(finding(report, "leak", "errors")) == [["7.png", "7.png"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["0.png", "cat"], ["../0.png", "dog"]], "is outside"),
        ([["0.png", ""], ["1.png", ""]], "no classes"),
        ([["0.png", "Dog"], ["1.png", "dog"]], "classes that differ only in case"),
        ([["0.png", "cat"], ["1.png", ""]], "a fraction of 0.2 of 1 labeled images cannot be held out"),
        ([[f"{i}.png", "cat"] for i in range(10)], "There are no unlabeled images"),
        ([["0.png", "cat", "dog"]], "row 2: the row has 3 cells"),
    ],
)
def test_errors_of_a_fit_are_errors(
    photos: Path, capsys: pytest.CaptureFixture[str], rows: list[list[str]], message: str
) -> None:
    write_rows(photos / "bad.csv", ["image", "labels"], rows)
    report = run(capsys, "bad.csv", status=1)
    assert message in finding(report, "refused", "errors")["message"]
    assert report["run"] is None


def test_a_table_without_a_labeled_image(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(photos / "bad.csv", ["image", "cat"], [["0.png", ""], ["1.png", ""]])
    report = run(capsys, "bad.csv", status=1)
    assert "all 2 rows" in finding(report, "refused", "errors")["message"]
    assert report["train"]["unlabeled"] == 2  # the rest is still reported


def test_options_of_the_command_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "classes.yaml").write_text("cat:\ndog:\nsofa: couch\nzebra:\n")
    write_rows(photos / "tables" / "a.csv", ["image", "labels"], [[f"{i}.png", "cat" * (i < 20)] for i in range(40)])
    words = ["--root", ".", "--class-file", "classes.yaml", "--held-out", "0.5", "--batch-size", "36"]
    report = run(capsys, "tables/a.csv", *words)
    assert (report["run"]["labeled"], report["run"]["held_out"]) == (10, 10)
    assert report["run"]["second_stage"]["unlabeled"] == 20
    assert names(finding(report, "class_without_positive", "warnings")) == [["dog"], ["sofa"], ["zebra"]]


def test_configurations_of_a_fit_are_accepted(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "mine.yaml").write_text(
        "data: {source: {class_path: cbsa_lightning.data.readers.Table, init_args: {train: photos.csv}}, batch_size: 8}"
    )
    report = run(capsys, "methods/cbsa.yaml", "mine.yaml")
    stages = report["run"]["first_stage"], report["run"]["second_stage"]
    assert [stage["epochs"] for stage in stages] == [8, 32]
    assert stages[1] == {"steps_per_epoch": 5, "labeled": 4, "unlabeled": 4, "epochs": 32}
    report = run(capsys, "methods/cbsa.yaml", "methods/labeled_only.yaml", "mine.yaml")
    assert report["run"]["second_stage"] == {"steps_per_epoch": 5, "labeled": 8, "unlabeled": 0, "epochs": 32}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model: {}", "data.source is missing"),
        ("data: 3", "data must be a mapping"),
        ("data: {source: nowhere.Table}", "nowhere"),
        ("data: {source: {class_path: cbsa_lightning.data.readers.Table, init_args: {trian: x}}}", "trian"),
        (
            "data: {source: {class_path: cbsa_lightning.data.readers.Table, init_args: {train: x}}, batch_size: many}",
            "many",
        ),
        (
            "data: {source: {class_path: cbsa_lightning.data.readers.Table, init_args: {train: x, separator: ''}}}",
            "separator",
        ),
    ],
)
def test_invalid_configurations(photos: Path, setting: str, message: str) -> None:
    (photos / "bad.yaml").write_text(setting)
    with pytest.raises(ConfigError, match=message):
        cli.main(["check", "bad.yaml"])


def coco(file: str, images: list[str]) -> str:
    """Writes a COCO file whose images alternately show a cat and a dog."""
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(images)],
        "annotations": [{"image_id": i, "category_id": i % 2} for i in range(len(images))],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    Path(file).write_text(json.dumps(content))
    return file


def test_a_coco_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = coco("train.json", [f"{i}.png" for i in range(20)])
    report = run(capsys, train, status=1)
    assert (report["train"]["images"], report["test"]) == (20, None)
    assert "There are no unlabeled images" in finding(report, "refused", "errors")["message"]
    Path("alone.yaml").write_text("model: {init_args: {labeler: cbsa_lightning.method.labelers.LabeledOnly}}")
    test = coco("test.json", ["30.png", "31.png"])
    report = run(capsys, "alone.yaml", train, "--test", test)
    assert (report["test"]["images"], report["run"]["validated_on"]) == (2, "test images")
    (photos / "elsewhere").mkdir()
    assert run(capsys, coco("elsewhere/a.json", ["1.png"]), "--root", ".", status=1)["train"]["images"] == 1


@pytest.mark.parametrize(
    ("file", "content", "source"),
    [("tasks.json", "\ufeff [{}]", "label_studio.LabelStudio"), ("job.xml", "<annotations/>", "cvat.CVAT")],
)
def test_exports_of_labeling_tools_are_recognized_by_their_content(
    photos: Path, file: str, content: str, source: str
) -> None:
    (photos / file).write_text(content, encoding="utf-8")
    found = check_command._source_of(file, {"root": "photos"})
    assert found["class_path"] == f"cbsa_lightning.data.readers.{source}"
    assert found["init_args"] == {"train": file, "root": "photos"}


class Noted(Squares):
    """A source with a note about its files."""

    def describe(self) -> list[str]:
        return ["names are separated by ';'", "names are separated by ';'"]


def test_notes_of_a_reader_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        f"data: {{source: {{class_path: {__name__}.Noted, init_args: {{folder: .}}}}, labeled_fraction: 0.5}}"
    )
    assert run(capsys, "mine.yaml")["notes"] == ["names are separated by ';'"]
    cli.main(["check", "mine.yaml"])
    assert capsys.readouterr().out.startswith("names are separated by ';'\ntrain: 22 images")


def test_two_files_to_train_on_are_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.csv, b\.csv: pass one file"):
        cli.main(["check", "a.csv", "b.csv"])


@pytest.mark.parametrize(
    ("pair", "similar"),
    [
        (("traffic light", "Traffic-Light"), True),
        (("dog", "dogs"), True),
        (("aeroplane", "areoplane"), True),
        (("bottle", "battle"), True),
        (("cat", "car"), False),
        (("class 1", "class 2"), False),
        (("class 1", "class 10"), False),
        (("at", "a"), False),
        (("sofa", "zebra"), False),
        (("+", "-"), False),
    ],
)
def test_similar_names(pair: tuple[str, str], similar: bool) -> None:
    assert similar_names(["other", *pair]) == ([pair] if similar else [])


def test_similar_names_of_many_classes_are_found_fast() -> None:
    words = ["".join(word) for word in np.random.default_rng(0).choice(list("abcdefghij"), (20_000, 12))]
    assert similar_names([*words, f"{words[7]}s"]) == [(words[7], f"{words[7]}s")]


def test_equal_rows_match_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    digest = rng.integers(0, 7, (60, 2)).astype(np.uint64)
    rows = np.sort(rng.permutation(60)[:50])
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(tuple(digest[row].tolist()), []).append(row)
    expected = [group for group in groups.values() if len(group) > 1]
    assert [group.tolist() for group in equal_rows(digest, rows)] == expected
    assert equal_rows(digest, rows[:1]) == equal_rows(digest, rows[:0]) == []


def test_a_check_imports_neither_torch_nor_lightning(photos: Path) -> None:
    code = (
        "import sys; from cbsa_lightning.__main__ import main; main(['check', 'photos.csv']); "
        "print(sorted({'lightning', 'pytorch_lightning', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_standard_output_contains_only_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "{class_path: cbsa_lightning.data.readers.Digits, init_args: {root: ., num_train: 30, num_test: 10}}"
    (tmp_path / "digits.yaml").write_text(f"data: {{source: {source}, labeled_fraction: 0.5}}")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "digits.yaml")["run"]["labeled"] == 15


class Pixels:
    """Replaces a CLIP: features are the 4 x 5 cells of an image."""

    image_size, embed_dim = 20, 60

    def image_tokens(self, images: torch.Tensor) -> ImageTokens:
        cells = torch.nn.functional.adaptive_avg_pool2d(images.float(), (4, 5)).flatten(1)
        return ImageTokens(cells, cells[:, None], (1, 1))


def test_near_duplicates_pair_each_image_with_the_most_similar_earlier_one(tmp_path: Path) -> None:
    for i in range(1100):  # more than one block
        write_image(tmp_path / f"{i}.png", seed=i)
    for copy, original, size in ((30, 24, (80, 64)), (1090, 24, (400, 320)), (1050, 7, (45, 30))):
        with Image.open(tmp_path / f"{original}.png") as image:
            image.resize(size).save(tmp_path / f"{copy}.png")
    (tmp_path / "9.png").write_bytes(b"")
    found = near_duplicates([tmp_path / f"{i}.png" for i in range(1100)], Pixels())
    assert {(i, j) for i, j, _ in found.pairs} in ({(24, 30), (24, 1090), (7, 1050)}, {(24, 30), (30, 1090), (7, 1050)})
    assert [cosine for *_, cosine in found.pairs] == sorted((cosine for *_, cosine in found.pairs), reverse=True)
    assert list(found.unread) == [9]


def test_near_duplicates_of_a_data_set(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(photos / "24.png") as image:
        image.point(lambda value: 0.97 * value).save(photos / "0.png")
    (photos / "31.png").write_bytes((photos / "32.png").read_bytes())  # equal images are not reported again
    found = finding(run(capsys, "photos.csv", "--near-duplicates", "embedded"), "near_duplicate", "warnings")
    assert ["0.png", "24.png"] in names(found)
    assert not any("32.png" in pair for pair in names(found))
    assert all(item["note"].startswith("similarity ") for item in found["items"])


def test_damage_within_a_file_is_found_if_images_are_decoded(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((photos / "8.png").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (photos / "8.png").write_bytes(content)
    run(capsys, "photos.csv")
    report = run(capsys, "photos.csv", "--near-duplicates", "embedded", status=1)
    assert names(finding(report, "unreadable", "errors")) == [["8.png"]]


def test_weights_without_a_model_are_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match="Pass both"):
        cli.main(["check", "photos.csv", "--pretrained", "openai"])


def test_every_image_is_opened_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cbsa_lightning.data.checks import survey

    opened: list[Path] = []
    plain = survey.open_image
    monkeypatch.setattr(survey, "open_image", lambda path: opened.append(path) or plain(path))
    cli.main(["check", "photos.csv"])
    assert sorted(path.name for path in opened) == sorted(f"{i}.png" for i in range(40))


def test_labels_that_are_known_in_part(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["0.png", 1, ""], ["1.png", "", 0], ["2.png", 1, ""], ["3.png", "", 0], ["4.png", "", ""], ["5.png", "", 0]]
    write_rows(photos / "part.csv", ["image", "cat", "dog"], rows)
    report = run(capsys, "part.csv")
    assert (report["train"]["labeled"], report["train"]["partly"], report["train"]["unlabeled"]) == (5, 2, 1)
    told = finding(report, "class_without_negative", "warnings")["message"]
    assert "1 of 2 classes have known positives but no known negative: cat." in told
    assert names(finding(report, "class_without_positive", "warnings")) == [["dog"]]


def test_settings_of_partial_labels(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[f"{i}.png", i % 2, 1 - i % 2, int(i % 3 == 0)] for i in range(30)]
    write_rows(photos / "full.csv", ["image", "cat", "dog", "sofa"], rows)
    source = "source: {class_path: Table, init_args: {train: full.csv}}"
    Path("part.yaml").write_text(f"data: {{{source}, known_fraction: 0.5}}\nseed_everything: 3")
    report = run(capsys, "part.yaml")
    table = Table("full.csv").train()
    counts = count_labels(LabelMask.draw(table, 0.5, seed=3)(table).labels)
    assert report["train"]["partly"] == counts.partly > 0
    assert report["train"]["unlabeled"] == counts.unlabeled
    LabelMask.of(table, np.arange(90).reshape(30, 3) != 0).save("mask.json")
    Path("own.yaml").write_text(f"data: {{{source}, known_file: mask.json}}")
    report = run(capsys, "own.yaml")
    assert (report["train"]["partly"], report["train"]["unlabeled"]) == (1, 0)
    write_rows(photos / "full.csv", ["image", "cat", "dog", "sofa"], [["0.png", 1, 1, 1], *rows[1:]])
    report = run(capsys, "own.yaml", status=1)
    assert "was created for a table with digest" in finding(report, "refused", "errors")["message"]


def test_a_class_of_which_no_label_is_known(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[f"{i}.png", i % 2, "", i % 3 % 2] if i < 30 else [f"{i}.png", "", "", ""] for i in range(40)]
    write_rows(photos / "none.csv", ["image", "cat", "dog", "sofa"], rows)
    report = run(capsys, "none.csv")
    assert names(finding(report, "class_without_label", "warnings")) == [["dog"]]
