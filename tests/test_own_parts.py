"""A configuration can replace views, decoder, average and partition with objects of another package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cbsa_lightning.__main__ import main
from cbsa_lightning.data.views import PlainView
from cbsa_lightning.errors import CheckpointError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.networks.cbsa import CBSANetwork
from layouts import make_table
from own_parts import LastWeights, MeanToken

OWN = {
    "model": {
        "class_path": "CBSAModule",
        "init_args": {
            "decoder": {"class_path": "own_parts.MeanToken", "init_args": {"start": 0.25}},
            "average": "own_parts.LastWeights",
            "contexts": {"partition": "own_parts.OddAndEven"},
            "num_contexts": 2,
            "prompt_length": 2,
            "warmup_epochs": 1,
        },
    },
    "data": {
        "weak_view": {"class_path": "Albumentations", "init_args": {"transforms": []}},
        "strong_view": "own_parts.Inverted",
        "image_size": 64,
        "batch_size": 8,
        "num_workers": 0,
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "limit_train_batches": 2},
    "report": {"num_images": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Any:
    folder = tmp_path_factory.mktemp("own_parts")
    make_table(folder, n_train=24, unlabeled=12)
    (folder / "own.yaml").write_text(yaml.safe_dump(OWN), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return main(
            [
                *("fit", "--config", "own.yaml", "--model.init_args.clip", str(clip_folder)),
                *("--data.source", "Table", f"--data.source.init_args.train={folder / 'train.csv'}"),
                f"--trainer.default_root_dir={folder}",
            ]
        )


def test_training_sees_the_strong_view(run: Any) -> None:
    batch = next(iter(run.datamodule.train_dataloader()))
    table, images = run.datamodule.train_table, run.datamodule._train_images
    for image, row in zip(batch.images, batch.index.tolist(), strict=True):
        assert torch.equal(image, 255 - PlainView(64)(images[row])), table.file(row)


def test_pseudo_labels_use_the_weak_view(run: Any) -> None:
    batch = next(iter(run.datamodule.weak_dataloader(0)))
    images = run.datamodule._train_images
    for image, row in zip(batch.images, batch.index.tolist(), strict=True):
        assert torch.equal(image, PlainView(64)(images[row]))


def test_the_configured_average_is_used(run: Any) -> None:
    assert type(run.model.ema) is LastWeights
    weights = dict(run.model.network.named_parameters())
    for name in run.model.ema.names:
        assert torch.equal(run.model.ema.get_buffer(run.model.ema.key(name)), weights[name])


def test_the_configured_partition_is_used(run: Any) -> None:
    num_classes = len(run.model.class_names)
    assert run.model.context_partition.tolist() == [k % 2 for k in range(num_classes)]


def test_the_decoder_is_trained(run: Any) -> None:
    assert isinstance(run.model.network.decoder, MeanToken)
    assert not torch.equal(run.model.network.decoder.offset, torch.full_like(run.model.network.decoder.offset, 0.25))


def test_a_checkpoint_names_the_decoder_and_chooses_no_code(run: Any, clip_folder: Path) -> None:
    file = run.trainer.checkpoint_callback.last_model_path
    with pytest.raises(CheckpointError, match=r"uses a custom decoder.*MeanToken.*network=\.\.\."):
        Classifier.load(file)

    def network(names: Any) -> CBSANetwork:
        return CBSANetwork(names, str(clip_folder), num_contexts=2, prompt_length=2, decoder=MeanToken)

    classifier = Classifier.load(file, network=network, image_size=64)
    assert list(classifier.class_names) == run.model.class_names
