"""The CLIP inside the package loads offline, is small, and recognizes some digits."""

from __future__ import annotations

import json
import socket

import numpy as np
import open_clip
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import average_precision_score

from cbsa_lightning.clip import embedded
from cbsa_lightning.data.canvases import draw_canvas, exemplars
from cbsa_lightning.data.readers.digits import NAMES, draw_labels
from cbsa_lightning.errors import WeightsError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads do not speed up such a small model, and they wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded():
    def refuse(*_args, **_kwargs):
        raise AssertionError("the embedded CLIP asked for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        name = f"local-dir:{embedded.folder()}"
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)


def test_is_small():
    assert sum(file.stat().st_size for file in embedded.folder().iterdir() if file.is_file()) < 8e6


def test_missing_files_are_named(monkeypatch):
    monkeypatch.setattr(embedded, "FILES", ("open_clip_config.json", "no_such.safetensors"))
    with pytest.raises(WeightsError, match=r"lacks no_such\.safetensors"):
        embedded.folder()


def test_loads_every_weight(loaded):
    model, _, _ = loaded
    state = model.state_dict()
    with safe_open(embedded.folder() / "open_clip_model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(state)
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            stored = file.get_tensor(key)
            assert torch.isfinite(stored.float()).all(), key
            assert torch.equal(stored.float(), state[key].float()), key
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_has_the_parts_for_dense_features(loaded):
    model, _, _ = loaded
    config = json.loads((embedded.folder() / "open_clip_config.json").read_text())["model_cfg"]
    assert isinstance(model.visual.attnpool, open_clip.modified_resnet.AttentionPool2d)
    size = config["vision_cfg"]["image_size"]
    with torch.no_grad():
        (features,) = model.visual.forward_intermediates(torch.zeros(1, 3, size, size), indices=1)[
            "image_intermediates"
        ]
    assert features.shape[-2:] == (size // 32, size // 32)
    assert model.visual.attnpool.positional_embedding.shape[0] == (size // 32) ** 2 + 1
    assert model.encode_text(torch.zeros(1, 77, dtype=torch.int64)).shape == (1, config["embed_dim"])


def test_zero_shot_beats_permuted_names(loaded):
    model, preprocess, tokenizer = loaded
    source, images, labels = exemplars("test"), [], np.zeros((100, 10), dtype=int)
    for i in range(100):
        rng = np.random.default_rng((11, i))
        scene, digits = draw_labels(rng)
        images.append(preprocess(draw_canvas(rng, 160, scene, digits, source).image))
        labels[i, digits] = 1
    with torch.no_grad():
        text = model.encode_text(tokenizer([f"a photo of a {name}." for name in NAMES]), normalize=True)
        scores = (model.encode_image(torch.stack(images), normalize=True) @ text.T).numpy()
    right = average_precision_score(labels, scores)
    permuted = [average_precision_score(labels, np.roll(scores, k, axis=1)) for k in range(1, 10)]
    assert right > max(permuted) + 0.03
    assert right > labels.mean() + 0.08
    assert right < 0.9  # a quickstart needs something to learn
