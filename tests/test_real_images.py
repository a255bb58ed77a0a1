"""A short run on real photographs with the COCO reader and the table reader, then predictions."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.csv
import pytest
import torch

from cbsa_lightning import CBSAModule, SSMLLDataModule
from cbsa_lightning.callbacks.predictions import WritePredictions
from cbsa_lightning.data.readers import COCO, Source, Table
from layouts import write_rows

PARTS = {
    "train_annotations": "annotations/instances_train.json",
    "val_annotations": "annotations/instances_val.json",
    "train_images": "images",
    "val_images": "images",
}


def twenty_rows(photos: Path, folder: Path) -> Table:
    """Returns a table of twenty photographs, the first ten labeled."""
    content = json.loads((photos / PARTS["train_annotations"]).read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    labels: dict[int, set[str]] = {}
    for one in content["annotations"]:
        labels.setdefault(one["image_id"], set()).add(names[one["category_id"]])
    images = [image for image in content["images"] if image["id"] in labels][:20]
    rows = [
        [image["file_name"], ";".join(sorted(labels[image["id"]])) if i < 10 else ""] for i, image in enumerate(images)
    ]
    return Table(str(write_rows(folder / "twenty.csv", ["image", "labels"], rows)), root=str(photos / "images"))


@pytest.mark.parametrize("kind", ["coco", "table"])
def test_trains_and_predicts(kind: str, realbench: Path, clip_folder: Path, tmp_path: Path) -> None:
    photos = realbench / "coco-small"
    source: Source = COCO(str(photos), **PARTS, unannotated="drop") if kind == "coco" else twenty_rows(photos, tmp_path)
    data = SSMLLDataModule(
        source,
        image_size=64,
        labeled_fraction=0.2 if kind == "coco" else None,
        batch_size=8,
        num_workers=0,
        predict=str(photos / "images"),
    )
    module = CBSAModule(
        data.class_names,
        clip=str(clip_folder),
        num_contexts=2,
        prompt_length=2,
        decoder_feedforward=16,
        warmup_epochs=1,
    )
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_train_batches=2,
        limit_predict_batches=1,
        callbacks=[WritePredictions(str(tmp_path / "all.csv"))],
    )
    trainer.fit(module, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss_unsup"])
    assert module.tau_pos.isnan().sum() == 0

    files = sorted((photos / "images").glob("*.jpg"))[:12]
    chosen = write_rows(tmp_path / "some.csv", ["image"], [[f.name] for f in files])
    data.predict = str(chosen)
    for file in files:
        (tmp_path / file.name).symlink_to(file)
    trainer.predict(module, datamodule=data, return_predictions=False)
    table = pyarrow.csv.read_csv(tmp_path / "all.csv")
    assert table["image"].to_pylist() == [f.name for f in files]
    scores = np.stack([table[name].to_numpy() for name in data.class_names])
    assert ((scores >= 0) & (scores <= 1)).all()
