"""Complete runs of the systems for partial labels: training, validation, checkpoints, prediction, resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cbsa_lightning import SSMLLModule
from cbsa_lightning.__main__ import main
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.method.losses import MeanBinaryCrossEntropy
from cbsa_lightning.networks.dsrb import DSRB
from cbsa_lightning.networks.gcn_ml import GCNML
from cbsa_lightning.networks.hst import HST
from cbsa_lightning.networks.sarb import SARB
from cbsa_lightning.networks.ssgrl import SSGRL
from cbsa_lightning.networks.sst import SST
from partial import SMALL, SYSTEMS, PartialSquares, TinyWords, tiny_system
from tiny_data import CLASSES, SIZE, Squares, differences, tiny_data, tiny_trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OVERLAYS = {"ssgrl": SSGRL, "gcn_ml": GCNML, "sst": SST, "sarb": SARB, "hst": HST, "dsrb": DSRB}


def fit(folder, squares, network, epochs=2, ckpt_path=None, change=None, **settings):
    module = tiny_system(network, **settings)
    saver = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = tiny_trainer(folder, epochs, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(
        module, datamodule=tiny_data(PartialSquares(squares, change=change), labeled_fraction=None), ckpt_path=ckpt_path
    )
    return module, trainer


@pytest.fixture(scope="module", params=SYSTEMS)
def run(request, tmp_path_factory, squares_folder):
    folder = tmp_path_factory.mktemp("run")
    module, trainer = fit(folder, squares_folder, SYSTEMS[request.param])
    return request.param, module, trainer, folder


def test_a_complete_run(run):
    name, module, trainer, _ = run
    metrics = trainer.callback_metrics
    assert 0 <= metrics["val/mAP"] <= 1
    assert torch.isfinite(metrics["train/loss"])
    assert trainer.global_step == 6
    graph = getattr(module.network, "graph", None)
    assert graph is None or graph.any(), name


def test_a_checkpoint_predicts_like_the_run(run):
    name, module, _, folder = run
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.manual_seed(1))
    torch.manual_seed(99)
    make = partial(SYSTEMS[name], words=TinyWords, **SMALL)
    file = folder / "epoch=1-step=6.ckpt"
    loaded = SSMLLModule.load_from_checkpoint(file, network=make, weights_only=True).eval()
    assert torch.equal(loaded(images), module.eval()(images))
    assert loaded(images).shape == (4, len(CLASSES))


@pytest.mark.parametrize("step", [2, 3], ids=["within an epoch", "after an epoch"])
def test_a_resumed_run_is_bit_identical(run, step, tmp_path, squares_folder):
    name, module, _, folder = run
    file = folder / f"epoch=0-step={step}.ckpt"
    resumed, _ = fit(tmp_path, squares_folder, SYSTEMS[name], ckpt_path=str(file))
    assert differences(resumed.state_dict(), module.state_dict()) == []


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("method", OVERLAYS)
def test_each_overlay_fits_the_embedded_data(method, tmp_path, monkeypatch):
    """Uses each overlay with small networks and word vectors from the embedded CLIP."""
    monkeypatch.chdir(tmp_path)
    network = "--model.init_args.network.init_args"
    words = [] if method == "gcn_ml" else [f"{network}.attention_width=8"]
    words += [] if method in ("gcn_ml", "ssgrl") else [f"{network}.dim=8"]
    cli = main(
        [
            *("fit", "--config", str(CONFIGS / "methods" / f"{method}.yaml")),
            *(f"{network}.backbone={SMALL['backbone']}", f"{network}.pretrained=random", *words),
            *(f"{network}.words.class_path=ClipWords", f"{network}.words.init_args.clip=embedded"),
            *("--data.source=Digits", "--data.source.init_args.root=digits", "--data.source.init_args.num_train=24"),
            *("--data.source.init_args.num_test=8", "--data.labeled_fraction=0.9", "--data.image_size=64"),
            *("--data.num_workers=0", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"),
            *("--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"),
            *("--trainer.enable_model_summary=false", "--trainer.sync_batchnorm=false"),
        ]
    )
    module = cli.model
    assert isinstance(module.network, OVERLAYS[method])
    assert isinstance(module.loss, MeanBinaryCrossEntropy)
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    folder = Path(cli.trainer.log_dir)
    assert (folder / "predictions.csv").is_file()
    found = Classifier.load(folder / "checkpoints" / "last.ckpt")([next((tmp_path / "digits").rglob("*.png"))])
    assert len(found[0].scores) == 10


def forget_a_class(labels):
    """Makes one class completely unknown and removes the known positives of another."""
    labels[:, 0] = -1
    labels[:, 1][labels[:, 1] == 1] = -1
    labels[:, 2] = np.arange(len(labels)) % 2  # each image has a known label


def keep_positives(labels):
    """Makes all negatives unknown."""
    labels[labels == 0] = -1
    labels[np.arange(len(labels)), np.arange(len(labels)) % 5] = 1


def keep_negatives(labels):
    labels[labels == 1] = 0


@pytest.mark.parametrize("change", [forget_a_class, keep_positives])
@pytest.mark.parametrize("name", SYSTEMS)
def test_labels_with_unknown_or_missing_classes(name, change, tmp_path, squares_folder):
    module, trainer = fit(tmp_path, squares_folder, SYSTEMS[name], change=change)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(value.isfinite().all() for value in module.network.state_dict().values())
    prototypes = getattr(module.network.hooks, "prototypes", None)
    if change is forget_a_class and prototypes is not None:
        assert prototypes.any(-1).any(-1).tolist()[:3] == [False, False, True]


@pytest.mark.parametrize("name", ["SARB", "HST", "DSRB"])
def test_prototypes_need_a_known_positive(name, tmp_path, squares_folder):
    with pytest.raises(ConfigError, match=rf"{name} computes prototypes from 0 image\(s\) .*Label more images"):
        fit(tmp_path, squares_folder, SYSTEMS[name], change=keep_negatives)


@pytest.mark.parametrize("name", SYSTEMS)
def test_pseudo_labels_of_unlabeled_images_in_half_precision(name, tmp_path, squares_folder):
    """Trains with unlabeled images and CAT's pseudo-labels in bfloat16."""
    module = tiny_system(SYSTEMS[name], labeler=None, warmup_epochs=1)
    trainer = tiny_trainer(tmp_path, 3, precision="bf16-mixed")
    trainer.fit(module, datamodule=tiny_data(Squares(squares_folder)))
    metrics = trainer.callback_metrics
    assert metrics["train/loss_unsup"] > 0
    assert torch.isfinite(metrics["train/loss"])
