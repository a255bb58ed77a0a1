"""Cells of the paper's tables: merging of overlays, identity, and running."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from filelock import FileLock

from cbsa_lightning.cli.overlays import merged, read
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.reproduce import cells
from cbsa_lightning.reproduce.cells import make, result_of
from cbsa_lightning.reproduce.paper import CBSA, SYSTEMS, TABLES, Row
from cbsa_lightning.reproduce.recipes import Cell, DataSet, classes_of, make_cell
from cbsa_lightning.reproduce.wandb_runs import with_run_name
from parsed import parse
from tiny_tables import CONFIGS, PowerCutError, short, tiny_voc, write_overlay
from wandb_records import offline_runs

LABELERS = "cbsa_lightning.method.labelers"
BY_LABEL = {row.label: row for row in SYSTEMS}


# Merging ---------------------------------------------------------------------------------------------------------


def labeler(above: Any) -> dict[str, Any]:
    return {"model": {"init_args": {"labeler": above}}}


OVERLAYS = {
    "fixed": labeler({"class_path": f"{LABELERS}.Fixed", "init_args": {"tau_pos": 0.8}}),
    "fixed_too": labeler({"class_path": f"{LABELERS}.Fixed", "init_args": {"tau_neg": 0.1}}),
    "fixed_by_path": labeler(f"{LABELERS}.Fixed"),
    "arguments": labeler({"init_args": {"tau_neg": 0.2}}),
    "cat": labeler({"class_path": f"{LABELERS}.ClassDistributionAware", "init_args": {"eta_pos": 0.7}}),
    "none": labeler(None),
    "callbacks": {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]}},
    "no_callbacks": {"trainer": {"callbacks": []}},
    "dualcoop_clip": {"model": {"init_args": {"network": {"init_args": {"prompt_length": 3}}}}},
}


@pytest.mark.parametrize(
    "names",
    [
        "methods/cbsa data/coco methods/coco/cbsa methods/without_contexts hardware/cpu",
        "methods/cbsa data/voc methods/labeled_only",
        "methods/cbsa data/voc methods/cbsa_safe hardware/gpu loggers/wandb",
        "methods/top_k data/coco methods/coco/top_k",
        "methods/dualcoop data/voc dualcoop_clip",
        "methods/bce data/voc methods/voc/bce",
        "methods/cbsa data/voc fixed fixed_too",
        "methods/cbsa data/voc fixed_by_path arguments",
        "methods/cbsa data/voc fixed fixed_by_path arguments",
        "methods/cbsa data/voc fixed arguments",
        "methods/cbsa data/voc cat fixed",
        "methods/cbsa data/voc cat fixed_by_path",
        "methods/cbsa data/voc fixed none fixed_too",
        "methods/cbsa data/voc callbacks no_callbacks",
        "methods/cbsa data/voc no_callbacks callbacks",
    ],
)
def test_overlays_merge_as_on_the_command_line(names: str, tmp_path: Path) -> None:
    files = [
        write_overlay(tmp_path / f"{name}.yaml", **OVERLAYS[name]) if name in OVERLAYS else CONFIGS / f"{name}.yaml"
        for name in names.split()
    ]
    one = merged(read(file) for file in files)
    assert parse([write_overlay(tmp_path / "merged.yaml", **one)]) == parse(files)


def test_a_new_class_starts_without_arguments(tmp_path: Path) -> None:
    """This differs from the command line, which keeps the arguments that both classes accept."""
    overlays = [
        {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}}}}},
        {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5}}}}},
    ]
    arguments = merged(overlays)["model"]["init_args"]
    assert arguments == {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5}}}
    files = [write_overlay(tmp_path / f"{i}.yaml", **overlay) for i, overlay in enumerate(overlays)]
    theirs = parse([CONFIGS / "methods" / "cbsa.yaml", CONFIGS / "data" / "voc.yaml", *files])
    assert theirs["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


def test_merging_does_not_modify_the_overlays() -> None:
    below, above = {"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "d": {"e": 3}}}
    result = merged([below, above])
    assert result == {"a": {"b": 2, "c": [1], "d": {"e": 3}}}
    result["a"]["d"]["e"] = result["a"]["b"] = 4
    assert (below, above) == ({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "d": {"e": 3}}})


def test_errors_name_the_invalid_overlay(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The overlay .*nowhere\.yaml does not exist.*--configs"):
        cell(Row("nowhere", ("nowhere",)))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list\.yaml must be a mapping"):
        cell(CBSA, extra=[tmp_path / "list.yaml"])
    with pytest.raises(ConfigError, match=r"name a model .*cbsa\+cbsa_safe"):
        cell(CBSA, extra=[write_overlay(tmp_path / "model.yaml", model="cbsa_lightning.SSMLLModule")])
    with pytest.raises(ConfigError, match="and data"):
        cell(CBSA, extra=[write_overlay(tmp_path / "data.yaml", data=None)])
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        cell(CBSA, extra=[tmp_path / "broken.yaml"])
    with pytest.raises(ConfigError, match=r"cbsa\+cbsa_safe"):  # an overlay that modifies a method, without the method
        cell(Row("cbsa_safe", ("cbsa_safe",)))
    assert cell(Row("", ("cbsa", "cbsa_safe"))).recipe["model"]["init_args"]["ema_decay"] == 0.98
    other = write_overlay(tmp_path / "own.yaml", model={"class_path": "nowhere.Module"})
    with pytest.raises(ConfigError, match=r"no class nowhere\.Module.*PYTHONPATH"):
        cell(CBSA, extra=[other], clip=("embedded", "openai"))


# Identity --------------------------------------------------------------------------------------------------------


def cell(row: Row, data: str = "coco", share: float = 0.05, seed: int = 1, **settings: Any) -> Cell:
    return make_cell(row, DataSet.named(data, CONFIGS), share, seed, CONFIGS, **settings)


def row_of(number: int, label: str) -> Row:
    return next(row for row in TABLES[number].rows if row.label == label)


def test_tables_share_cells() -> None:
    whole = [(1, "Ours"), (3, "TP + SAA + CI"), (4, "K = 6"), (6, "Random"), (7, "16"), (8, "CSP"), (9, "Ours")]
    folders = {cell(row_of(*place)).folder for place in [*whole, (10, "Ours")]}
    assert len(folders) == 1
    assert len({cell(row_of(*place)).folder for place in [(3, "TP + SAA"), (4, "K = 1")]} | folders) == 2
    assert cell(BY_LABEL["CAP"]).folder == cell(row_of(3, "CAP")).folder
    rows = [row for table in TABLES.values() for row in table.rows if table.number != 5]
    # The last summands are the additional rows of Tables 3, 4, 6, 7 and 8.
    assert len({cell(row).folder for row in rows}) == len(SYSTEMS) + 2 + 1 + 1 + 4 + 1


def test_recipes_contain_the_settings_of_their_rows() -> None:
    def arguments(row: Row, data: str = "coco") -> dict[str, Any]:
        return cell(row, data).recipe["model"]["init_args"]

    assert arguments(CBSA)["num_contexts"] == 6
    assert arguments(CBSA, "voc")["num_contexts"] == 2
    assert arguments(row_of(3, "TP + SAA"))["num_contexts"] == 0  # overrides the setting of CBSA for COCO
    assert arguments(row_of(3, "TP"))["semantic_alignment"] is False
    assert arguments(row_of(4, "K = 4"))["num_contexts"] == 4
    assert arguments(row_of(6, "Template"))["prompt_template"] == "a photo of a"
    assert arguments(row_of(7, "48"))["prompt_length"] == 48
    assert arguments(row_of(8, "w/o CSP"))["shared_prompts"] is True
    assert arguments(BY_LABEL["Top-k*"])["labeler"]["init_args"] == {"k": 3}
    assert cell(BY_LABEL["BCE"], "voc").recipe["data"]["batch_size"] == 32
    recipe = cell(CBSA, share=0.15, seed=7).recipe
    assert (recipe["data"]["labeled_fraction"], recipe["seed_everything"]) == (0.15, 7)


def test_partial_labels() -> None:
    """Table 5 varies the fraction of known labels and uses a ResNet-101 CLIP at 448 pixels."""
    table = TABLES[5]
    batch_sizes = {"SSGRL": 4, "GCN-ML": 16, "SST": 8, "SARB": 8, "HST": 32, "DSRB": 8}
    for row in table.rows:
        found = cell(row, share=0.3, setting=table.setting, clip=table.clip)
        data, model = found.recipe["data"], found.recipe["model"]["init_args"]
        assert data["known_fraction"] == 0.3
        assert "labeled_fraction" not in data
        assert data["image_size"] == 448
        assert found.name == f"{row.label} on coco, 30 % known, seed 1"
        assert found.folder.startswith("coco-known300-seed1-")
        if row.label in batch_sizes:
            assert data["batch_size"] == batch_sizes[row.label]
            network = model["network"]["init_args"]
            assert network["words"]["init_args"] == {"clip": "RN101-quickgelu", "pretrained": "openai"}
            assert network["backbone"] == "resnet101.tv_in1k"
        else:
            assert {**model, **model.get("network", {}).get("init_args", {})}["clip"] == "RN101-quickgelu"
            assert model.get("num_contexts", 0) == 0
        assert model["labeler"] == "LabeledOnly"


def test_settings_that_only_affect_speed_do_not_change_the_cell(tmp_path: Path) -> None:
    def folder(**overlay: Any) -> str:
        return cell(CBSA, extra=[write_overlay(tmp_path / "extra.yaml", **overlay)]).folder

    cache = {"folder": "a", "limit_gb": 1, "strong_views": 8}
    here = folder(
        trainer={"accelerator": "cpu", "precision": "32-true"}, data={"num_workers": 1, "feature_cache": cache}
    )
    assert here == folder(
        trainer={"accelerator": "gpu", "precision": "32-true", "devices": 1, "enable_progress_bar": False},
        data={"num_workers": 8, "feature_cache": {"folder": "b", "strong_views": 8}, "image_cache": "c"},
    )
    changed = {
        folder(trainer={"precision": "16-mixed"}, data={"feature_cache": cache}),
        folder(trainer={"precision": "32-true", "max_epochs": 41}, data={"feature_cache": cache}),
        folder(trainer={"precision": "32-true"}, data={"feature_cache": cache | {"strong_views": 4}}),
        folder(trainer={"precision": "32-true"}),
        folder(trainer={"precision": "32-true"}, data={"feature_cache": cache, "batch_size": 3}),
        folder(trainer={"precision": "32-true"}, data={"feature_cache": cache}, model={"init_args": {"loss": "x"}}),
    }
    assert len(changed | {here}) == 7
    others = {cell(CBSA, seed=2).folder, cell(CBSA, share=0.1).folder, cell(CBSA, "voc").folder, cell(CBSA).folder}
    assert len(others) == 4
    assert cell(CBSA, seed=2).folder.startswith("coco-p050-seed2-cbsa-")
    assert cell(CBSA).name == "Ours on coco, p = 0.05, seed 1"


def test_computing_the_folder_name_does_not_modify_the_recipe(tmp_path: Path) -> None:
    """Settings that are excluded from the hash must still be in the recipe."""
    cell_of_cpu = cell(CBSA, extra=[CONFIGS / "hardware" / "cpu.yaml"])
    assert cell_of_cpu.folder
    assert cell_of_cpu.recipe["trainer"]["accelerator"] == "cpu"
    assert cell_of_cpu.recipe["data"]["feature_cache"]["folder"] == "cache"


@pytest.mark.parametrize("label", BY_LABEL)
def test_clip_is_set_in_every_network_that_uses_it(label: str) -> None:
    plain, other = (cell(BY_LABEL[label], clip=clip).recipe for clip in (None, ("tiny", "file.pt")))
    if label in ("BCE", "ASL", "CAP"):
        assert other == plain
        return
    found = classes_of(other)[-1]["init_args"]
    assert (found["clip"], found["pretrained"]) == ("tiny", "file.pt")
    found.update(clip="RN50-quickgelu", pretrained="openai")
    assert other == plain


def test_data_set_by_name_or_with_a_file() -> None:
    assert DataSet.named("voc", CONFIGS) == DataSet("voc", CONFIGS / "data" / "voc.yaml")
    assert DataSet.named("voc=a=b.yaml", CONFIGS) == DataSet("voc", Path("a=b.yaml"))


# Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_cell(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Callable[..., Cell]:
    """Builds a cell that stops in the first step of its last epoch while the file ``flag`` exists."""
    folder = tmp_path_factory.mktemp("short")
    voc = tiny_voc(folder)

    def made(row: Row, flag: Path, epochs: int = 3, **trainer: Any) -> Cell:
        cut = {"class_path": "tiny_tables.PowerCut", "init_args": {"flag": str(flag), "epoch": epochs - 1}}
        extra = [short(folder, epochs, callbacks=[cut], **trainer)]
        return make_cell(row, DataSet("voc", voc), 0.2, 1, CONFIGS, extra, (str(clip_folder), "openai"))

    return made


def history(cell: Cell, out: Path) -> dict[str, dict[str, float]]:
    found = result_of(cell, out)
    assert found is not None
    return {name: values for name, values in found["history"].items() if not name.startswith("time/")}


def fails(*_: Any, **__: Any) -> None:
    raise AssertionError("this must not be called")


@pytest.mark.parametrize(
    ("label", "epochs", "every"),
    [("Ours", 3, 1), ("Ours", 4, 2), pytest.param("DualCoOp", 3, 1, marks=pytest.mark.slow)],
    ids=["cbsa", "2nd", "dualcoop"],
)
def test_a_cell_interrupted_in_the_second_stage_resumes_bit_identically(
    label: str, epochs: int, every: int, short_cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every metric of every epoch is bit-identical, also if the process stopped before the result was written."""
    flag, whole, cut = (tmp_path / name for name in ("flag", "whole", "cut"))
    one = short_cell(BY_LABEL[label], flag, epochs, check_val_every_n_epoch=every)
    assert make(one, whole)
    assert not (whole / one.folder / "last.ckpt").exists()
    expected = history(one, whole)
    last = str(epochs - 1)
    assert {"val/mAP", "val/mAP_raw", "val/CF1", "val/AP/person", "pseudo/CF1", "train/loss_unsup"} <= expected.keys()
    assert list(expected["train/loss"]) == [str(epoch) for epoch in range(epochs)]
    assert last in expected["val/mAP"]

    flag.touch()
    with pytest.raises(PowerCutError):
        make(one, cut)
    folder = cut / one.folder
    assert (folder / "last.ckpt").is_file()
    assert result_of(one, cut) is None

    commands = []
    make_cli = cells.make_cli
    monkeypatch.setattr(cells, "make_cli", lambda args: commands.append(args) or make_cli(args))
    assert make(one, cut, keep_checkpoint=True)
    assert commands[0][-1] == f"--ckpt_path={folder / 'last.ckpt'}"
    assert history(one, cut) == expected
    assert [file.name for file in folder.glob("*.ckpt")] == ["last.ckpt"]

    if label == "Ours":  # as if killed between the last checkpoint and the result
        (folder / "result.json").unlink()
        assert make(one, cut)
        assert history(one, cut) == expected
    monkeypatch.setattr(cells, "make_cli", fails)
    assert make(one, cut)  # a finished cell is not run again


@pytest.fixture
def instant(short_cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A cell whose run is replaced by a stub."""
    monkeypatch.setattr(cells, "make_cli", lambda args: SimpleNamespace(trainer=SimpleNamespace(loggers=[])))
    monkeypatch.setattr(cells, "_found", lambda cli, seconds: {"history": {}, "seconds": seconds})
    return short_cell(CBSA, tmp_path / "flag")


def test_a_result_identifies_its_cell(instant: Cell, tmp_path: Path) -> None:
    assert make(instant, tmp_path)
    found = result_of(instant, tmp_path)
    assert found is not None
    assert found.pop("seconds") >= 0
    assert found == {"cell": instant.name, "row": "Ours", "data": "voc", "share": 0.2, "seed": 1, "history": {}}
    assert yaml.safe_load((tmp_path / instant.folder / "recipe.yaml").read_text()) == instant.recipe


def test_a_cell_that_another_process_is_running_is_skipped(
    instant: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / instant.folder
    folder.mkdir()
    monkeypatch.setattr(cells, "make_cli", fails)
    with FileLock(folder / ".lock"):
        assert not make(instant, tmp_path)
    assert result_of(instant, tmp_path) is None


def test_a_cell_runs_in_one_process(instant: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="runs in one process"):
        make(instant, tmp_path)
    assert result_of(instant, tmp_path) is None


def test_a_result_is_written_atomically(instant: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk is full while the result is written, the checkpoint remains for resuming."""
    write_text = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        if "result" not in self.name:
            return write_text(self, text, **options)
        write_text(self, text[: len(text) // 2], **options)
        raise OSError("no space left")

    folder = tmp_path / instant.folder
    folder.mkdir()
    (folder / "last.ckpt").touch()
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        make(instant, tmp_path)
    assert result_of(instant, tmp_path) is None
    assert (folder / "last.ckpt").exists()
    monkeypatch.setattr(Path, "write_text", write_text)
    assert make(instant, tmp_path)
    assert result_of(instant, tmp_path) is not None
    assert not (folder / "last.ckpt").exists()


def test_undefined_metrics_are_null(tmp_path: Path, short_cell: Any) -> None:
    """The result also has the positives of each class, so that ``--min_positives`` can change without a new run."""
    one = short_cell(CBSA, tmp_path / "flag", 2)
    assert make(one, tmp_path)
    text = (tmp_path / one.folder / "result.json").read_text()
    found = json.loads(text, parse_constant=fails)
    absent = [name for name, number in found["positives"].items() if number == 0]
    assert absent == ["person", "pottedplant", "train"]
    assert found["history"]["val/AP/person"] == {"0": None, "1": None}
    assert found["history"]["val/AP/cat"]["1"] > 0
    assert found["device"]
    assert found["seconds_since_last_start"] > 0


def test_the_last_epoch_is_validated_with_any_interval(tmp_path: Path, short_cell: Any) -> None:
    one = short_cell(CBSA, tmp_path / "flag", 3, check_val_every_n_epoch=2)
    assert make(one, tmp_path)
    assert list(history(one, tmp_path)["val/mAP"]) == ["1", "2"]


def test_a_recipe_without_a_number_of_epochs_is_refused(
    tmp_path: Path, short_cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = short_cell(CBSA, tmp_path / "flag")
    one.recipe["trainer"]["max_epochs"] = None
    monkeypatch.setattr(cells, "make_cli", fails)  # the check comes before training
    with pytest.raises(ConfigError, match=r"no trainer\.max_epochs"):
        make(one, tmp_path)


def test_a_run_that_is_stopped_early_has_no_result(tmp_path: Path, short_cell: Any) -> None:
    one = short_cell(CBSA, tmp_path / "flag", 2, max_steps=1)
    with pytest.raises(ConfigError, match="without validation in its last epoch, 1"):
        make(one, tmp_path)
    assert result_of(one, tmp_path) is None


def test_invalid_options_raise_an_error(tmp_path: Path, short_cell: Any) -> None:
    one = short_cell(CBSA, tmp_path / "flag", 2, no_such_argument=1)
    with pytest.raises(ConfigError, match=r"recipe\.yaml: --trainer\.no_such_argument is not an option\.$"):
        make(one, tmp_path)


def test_each_cell_is_a_separate_wandb_run(tmp_path: Path, short_cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": str(tmp_path)}}
    made = []
    for label in ("TP", "DualCoOp"):
        row = next(row for row in (*TABLES[3].rows, *SYSTEMS) if row.label == label)
        made.append(short_cell(row, tmp_path / "flag", 2, logger=[logger]))
        assert make(made[-1], tmp_path, table=3)
    found = {(run.display_name, run.run_group, run.job_type) for run in (run.run for run in offline_runs(tmp_path))}
    assert found == {(cell.name, "table 3/voc/p = 0.20", cell.row.label) for cell in made}
    assert len({cell.name for cell in made}) == 2


def test_names_of_wandb_runs_do_not_change_the_hash() -> None:
    path = "lightning.pytorch.loggers.WandbLogger"
    overlay = CONFIGS / "loggers" / "wandb.yaml"
    plain, logged = cell(CBSA), cell(CBSA, extra=[overlay])
    before = copy.deepcopy(logged.recipe)
    _, named = with_run_name(logged.recipe["trainer"]["logger"], logged, None)
    arguments = {"name": logged.name, "group": "coco/p = 0.05", "job_type": CBSA.label}
    assert named == {"class_path": path, "init_args": {"save_dir": "runs", "project": "cbsa", **arguments}}
    assert logged.recipe == before
    assert logged.folder == plain.folder
    own = {"class_path": "WandbLogger", "init_args": {"group": "mine", "job_type": None}}
    assert with_run_name(own, plain, 1)["init_args"] == {**arguments, "group": "mine"}
    assert [with_run_name(other, plain, 1) for other in (True, None, {"class_path": "RunLogger"})] == [
        *(True, None, {"class_path": "RunLogger"})
    ]


def test_a_cell_runs_on_one_device_and_keeps_its_loggers(instant: Cell, tmp_path: Path) -> None:
    assert make(instant, tmp_path)
    here = yaml.safe_load((tmp_path / instant.folder / "here.yaml").read_text())
    assert here["trainer"]["devices"] == 1
    assert here["trainer"]["logger"]["init_args"]["name"] == "log"
    own = replace(instant, seed=5, recipe={**instant.recipe, "seed_everything": 5})
    own.recipe["trainer"] = {**own.recipe["trainer"], "logger": [{"class_path": "W"}]}
    assert own.folder == replace(own, recipe={**instant.recipe, "seed_everything": 5}).folder
    assert make(own, tmp_path)
    here = yaml.safe_load((tmp_path / own.folder / "here.yaml").read_text())
    assert here["trainer"]["logger"] == [{"class_path": "W"}]
