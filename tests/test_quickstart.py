"""A small version of the README's first command: the shipped quickstart on few canvases, and its output files."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.csv
import pytest
import torch

from cbsa_lightning import Classifier
from cbsa_lightning.__main__ import main

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SMALL = [
    "--data.source.init_args.num_train=60",
    "--data.source.init_args.num_test=24",
    "--data.num_workers=0",
    "--data.labeled_fraction=0.3",
    "--model.init_args.warmup_epochs=1",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=2",
    "--trainer.enable_progress_bar=false",
    "--report.num_images=4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", str(CONFIG), *SMALL])
    return folder / "runs" / "quickstart" / "version_0"


def test_the_comparison_contains_simpler_systems(run: Path) -> None:
    rows = list(csv.reader((run / "comparison.csv").open()))
    assert [row[0] for row in rows] == [
        "run",
        "zero-shot",
        "linear probe",
        "stacked probes",
        "labeled only",
        "network alone",
        "semi-supervised",
    ]
    assert all(0 < float(row[1]) < 1 for row in rows[1:])


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_checkpoint_reproduces_the_result(verb: str, run: Path) -> None:
    reported = float(list(csv.reader((run / "comparison.csv").open()))[-1][1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[2])
        cli = main(
            [
                verb,
                "--config",
                str(run / "config.yaml"),
                f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
                "--trainer.logger=false",
            ]
        )
    prefix = {"validate": "val", "test": "test"}[verb]
    assert float(cli.trainer.callback_metrics[f"{prefix}/mAP"]) == pytest.approx(reported, abs=1e-6)


def test_seed_zero_is_supported(run: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[2])
        arguments = ["--config", str(run / "config.yaml"), "--seed_everything=0", "--trainer.logger=false"]
        cli = main(["validate", *arguments, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"])
    assert cli.datamodule.seed == 0


def test_output_files_of_a_run(run: Path) -> None:
    pictures = {p.name for p in (run / "pictures").iterdir() if p.stat().st_size > 5_000}
    assert {"predictions.png", "attention.png", "contexts.png"} <= pictures
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2>Suspicious labels</h2>" in page
    assert "the same network trained on the labeled images only has" in page
    table = pyarrow.csv.read_csv(run / "predictions.csv")
    assert len(table) == 24
    assert {"image", "labels", "zero", "nine"} <= set(table.column_names)
    assert (run / "config.yaml").is_file()
    assert (run / "split.json").is_file()
    labels = pyarrow.csv.read_csv(run / "labels.csv")
    assert len(labels) == 42
    assert labels.column_names[:5] == ["image", "labels", "review", "place", "zero"]
    assert len(pyarrow.csv.read_csv(run / "next_to_label.csv")) == 42
    assert {"image", "class", "given", "wrong"} == set(pyarrow.csv.read_csv(run / "suspicious_labels.csv").column_names)


def test_the_checkpoint_loads_with_weights_only_and_predicts_equally(run: Path, tmp_path: Path) -> None:
    """`cbsa predict` on a folder, and the Classifier without a Trainer, give the same scores."""
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    assert not any(key.startswith(("network.clip.tower", "network.clip.text")) for key in content["state_dict"])
    images = next((run.parents[2] / "data" / "digits").glob("*/test"))
    out = tmp_path / "labels.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[2])
        main(
            [
                "predict",
                "--config",
                str(run / "config.yaml"),
                f"--ckpt_path={checkpoint}",
                f"--data.predict={images}",
                f"--predictions.output={out}",
                "--trainer.logger=false",
            ]
        )
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert len(rows) == 24
    classifier = Classifier.load(checkpoint)
    files = [images / Path(row["image"]).name for row in rows]
    predictions = classifier(files)
    for row, prediction in zip(rows, predictions, strict=True):
        assert row["labels"] == (";".join(prediction.labels) or "none")
        for name, score in prediction.scores.items():
            assert row[name] == pytest.approx(score, abs=1e-5)
