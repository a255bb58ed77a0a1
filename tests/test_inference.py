"""The Classifier gives the scores of the module that wrote the checkpoint, without Lightning."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_lightning.checkpoints.lean import FINGERPRINT
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.views import PlainView
from cbsa_lightning.errors import CheckpointError, DataError
from cbsa_lightning.inference import classifier as inference
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.training.cbsa import CBSAModule
from tiny_clip import tiny_clip

CLASSES = ["cat", "dog", "potted_plant"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("towers"), "resnet")


def make_module(towers: Path, averaged: bool = True, **settings) -> CBSAModule:
    torch.manual_seed(0)
    settings = {"num_contexts": 2, "prompt_length": 3, "decoder_feedforward": 16, **settings}
    module = CBSAModule(CLASSES, clip=str(towers), **settings)
    if averaged:
        module.ema.start(module.network)
    with torch.no_grad():
        for parameter in module.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if averaged:
        module.ema.update(module.network)
    module.cut.copy_(torch.tensor([0.3, float("nan"), 0.6]))
    return module.eval()


def save(module: CBSAModule, path: Path) -> Path:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def module(towers: Path) -> CBSAModule:
    return make_module(towers)


@pytest.fixture(scope="module")
def checkpoint(module: CBSAModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(module, tmp_path_factory.mktemp("run") / "last.ckpt")


@pytest.fixture(scope="module")
def classifier(checkpoint: Path) -> Classifier:
    return Classifier.load(checkpoint)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_scores_equal_those_of_the_module(module, classifier, images):
    expected = module(images)
    assert torch.equal(classifier.scores(images), expected)
    torch.testing.assert_close(classifier.scores(images, batch_size=2), expected)
    raw = module.score(module.network.features(images), "raw").logits.sigmoid()
    assert not torch.allclose(expected, raw)  # otherwise the test could not detect the average


def test_before_the_average_starts_the_raw_weights_are_used(towers, images, tmp_path):
    module = make_module(towers, averaged=False)
    assert torch.equal(Classifier.load(save(module, tmp_path / "warm.ckpt")).scores(images), module(images))


@pytest.mark.parametrize("settings", [{"semantic_alignment": False}, {"shared_prompts": True}, {"train_pool": False}])
def test_other_settings_are_rebuilt(towers, images, tmp_path, settings):
    module = make_module(towers, **{"num_contexts": 0, **settings})
    classifier = Classifier.load(save(module, tmp_path / "other.ckpt"))
    assert torch.equal(classifier.scores(images), module(images))


def test_labels_are_classes_above_their_thresholds(module, classifier, images):
    assert classifier.class_names == tuple(CLASSES)
    assert torch.equal(classifier.thresholds, torch.tensor([0.3, 0.5, 0.6]))
    scores = module(images)
    for prediction, row in zip(classifier(images), scores.tolist(), strict=True):
        assert list(prediction.scores) == CLASSES
        assert prediction.scores == pytest.approx(dict(zip(CLASSES, row, strict=True)))
        expected = [n for n, s, t in zip(CLASSES, row, [0.3, 0.5, 0.6], strict=True) if s >= t]
        assert prediction.labels == tuple(expected)


def test_paths_pillow_images_and_arrays_give_equal_results(classifier, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    file = tmp_path / "image.png"
    Image.fromarray(array).save(file)
    mixed = [file, str(file), Image.fromarray(array), array]
    expected = classifier.scores(PlainView(64)(array)[None])
    assert torch.allclose(classifier.scores(mixed), expected.expand(4, -1), atol=1e-6)
    assert torch.allclose(classifier.scores(torch.from_numpy(array).permute(2, 0, 1)[None]), expected, atol=1e-6)


def test_attention_equals_that_of_the_module(module, classifier, images):
    maps = classifier.attention(images, batch_size=3)
    expected = module.score(module.network.features(images), attention=True).attention
    assert maps.shape == (5, 3, 2, 2)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(5, 3))


def test_missing_images_and_a_missing_decoder(classifier, towers, tmp_path):
    assert classifier([]) == []
    assert classifier.scores([]).shape == (0, 3)
    with pytest.raises(DataError, match="no image"):
        classifier.attention([])
    plain = make_module(towers, semantic_alignment=False)
    with pytest.raises(DataError, match="no decoder"):
        Classifier.load(save(plain, tmp_path / "p.ckpt")).attention(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("cat.png", "list of images"),
        (torch.zeros(1, 3, 8, 8), "uint8"),
        ([np.zeros((8, 8, 2), np.uint8)], "image 0"),
        ([np.zeros((8, 8, 3), np.uint8), 7], "image 1"),
        (["nowhere/cat.png"], "nowhere/cat.png"),
    ],
)
def test_errors_name_invalid_images(classifier, images, message):
    with pytest.raises(DataError, match=message):
        classifier(images)


def test_invalid_files_are_refused(checkpoint, towers, tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.ckpt"):
        Classifier.load(tmp_path / "nothing.ckpt")
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Classifier.load(text)
    short = tmp_path / "short.ckpt"
    short.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="damaged"):
        Classifier.load(short)
    torch.save(module_like := {"state_dict": {}}, tmp_path / "bare.ckpt")
    assert module_like
    with pytest.raises(CheckpointError, match="hyper_parameters"):
        Classifier.load(tmp_path / "bare.ckpt")

    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, FINGERPRINT: "0" * 64}, tmp_path / "frozen.ckpt")
    with pytest.raises(CheckpointError, match="other frozen weights"):
        Classifier.load(tmp_path / "frozen.ckpt")
    state = {k: v for k, v in content["state_dict"].items() if k != "network.log_scale"}
    torch.save({**content, "state_dict": state}, tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match=r"network\.log_scale"):
        Classifier.load(tmp_path / "part.ckpt")
    stored = {k: v for k, v in content["hyper_parameters"].items() if k != "prompt_length"}
    torch.save({**content, "hyper_parameters": stored}, tmp_path / "settings.ckpt")
    with pytest.raises(CheckpointError, match="prompt_length"):
        Classifier.load(tmp_path / "settings.ckpt")


def test_errors_name_settings_of_another_type(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    for name, value in (("decoder_heads", 4.0), ("prompt_length", True), ("num_contexts", "2")):
        changed = {**content, "hyper_parameters": {**content["hyper_parameters"], name: value}}
        torch.save(changed, tmp_path / "changed.ckpt")
        with pytest.raises(CheckpointError, match=rf"changed\.ckpt: setting {name} must be a whole number"):
            Classifier.load(tmp_path / "changed.ckpt")


def test_moved_towers(checkpoint, classifier, images, tmp_path):
    moved, other = tiny_clip(tmp_path / "moved", "resnet"), tiny_clip(tmp_path / "other", "resnet", seed=1)
    assert torch.equal(Classifier.load(checkpoint, clip=str(moved)).scores(images), classifier.scores(images))
    with pytest.raises(CheckpointError, match="other frozen weights"):
        Classifier.load(checkpoint, clip=str(other))


def test_image_size_of_the_checkpoint(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "image_size": 96}, tmp_path / "large.ckpt")
    assert Classifier.load(checkpoint).image_size == 64
    assert Classifier.load(tmp_path / "large.ckpt").image_size == 96
    assert Classifier.load(tmp_path / "large.ckpt", image_size=128).image_size == 128


class Column:
    """Imitates a sorted pandas column: iteration follows its order, and indexing uses labels."""

    def __init__(self, values):
        self.values = list(values)

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[len(self.values) - 1 - label]


@pytest.mark.parametrize(
    "given", [tuple, iter, lambda x: (y for y in x), Column, lambda x: dict(enumerate(x)).values(), np.array],
    ids=["tuple", "iterator", "generator", "column", "values", "array"],
)  # fmt: skip
def test_iterables_are_labeled_in_order(classifier, tmp_path, given, monkeypatch):
    paths, opened = [str(tmp_path / f"{i}.png") for i in range(5)], []
    for path in paths:
        Image.new("RGB", (40, 30)).save(path)
    monkeypatch.setattr(inference, "decode", lambda path: opened.append(str(path)) or decode(path))
    assert classifier.scores(given(paths), batch_size=2).shape == (5, 3)
    assert opened == paths


def test_arrays_are_read_like_files(classifier, tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)
    gray, rgba = rgb[..., 0], np.dstack([rgb, rng.integers(0, 256, (30, 40), np.uint8)])
    arrays = [rgb, gray, rgba]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    expected = [classifier.view(tmp_path / f"{i}.png", i) for i in (0, 1, 2, 1, 0, 0)]
    bgr = rgb[..., ::-1].copy()
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    for image, view in zip([rgb, gray, rgba, gray[..., None], bgr[..., ::-1], tensor], expected, strict=True):
        assert torch.equal(classifier.view(image, 0), view)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((8, 8, 3))], r"image 0: an array of float64 .* an unknown range"),
        ([np.zeros((3, 8, 9), np.uint8)], "channels in the first dimension"),
        ([np.zeros((8, 9, 7), np.uint8)], "is not an image"),
        ([torch.zeros(3, 8, 8)], r"image 0: a tensor must be \(3, H, W\) uint8"),
        ([7], "a int is not an image"),
        (np.zeros((8, 8, 3), np.uint8), "even for a single one"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "even for a single one"),
        ({"a.png": 1}, "pass its values"),
        (5, "Pass a list"),
    ],
)
def test_other_objects_are_refused(classifier, images, message):
    with pytest.raises(DataError, match=message):
        classifier.scores(images)
