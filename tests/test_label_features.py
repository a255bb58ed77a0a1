"""The features of the label decoder remain label-specific during training; a collapsed decoder fails these tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from cbsa_lightning import CBSAModule
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.readers.digits import Digits
from cbsa_lightning.method.metrics import mean_pairwise_cosine

STEPS, BATCH = 100, 16


@pytest.fixture(scope="module")
def canvases(tmp_path_factory):
    source = Digits(root=str(tmp_path_factory.mktemp("digits")), num_train=240, num_test=160)
    source.prepare()
    return source


@pytest.fixture(scope="module")
def trained(canvases):
    """Trains 100 steps on labeled canvases; returns the network, and features and labels of the test canvases."""
    torch.manual_seed(0)
    module = CBSAModule(canvases.class_names, clip="embedded", prompt_length=4, decoder_feedforward=256)
    network, loss = module.network, module.loss
    features, labels = {}, {}
    for part, table in (("train", canvases.train()), ("test", canvases.test())):
        images = torch.stack([torch.from_numpy(np.array(decode(table.file(i)))) for i in range(len(table))])
        features[part] = network.features(images.permute(0, 3, 1, 2))
        labels[part] = torch.as_tensor(table.labels)
    groups = network.parameter_groups()
    optimizer = torch.optim.AdamW([{"params": g["params"], "lr": 1e-3 * g["lr_scale"]} for g in groups])
    for _ in range(STEPS):
        rows = torch.randint(len(features["train"]), (BATCH,))
        loss(network(features["train"][rows]).logits, labels["train"][rows]).sum().div(BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    with torch.no_grad():
        output = network(features["test"], attention=True)
        mean_logits = network.mean_feature_logits(output.label_features)
    return output, mean_logits, labels["test"].numpy()


def mean_ap(labels, logits):
    return np.mean([average_precision_score(labels[:, k], logits[:, k]) for k in range(labels.shape[1])])


def test_features_differ_between_labels(trained):
    assert float(mean_pairwise_cosine(trained[0].label_features).mean()) < 0.97


def test_label_specific_features_raise_map(trained):
    output, mean_logits, labels = trained
    assert mean_ap(labels, output.logits.numpy()) > mean_ap(labels, mean_logits.numpy()) + 0.01


def test_attention_is_on_the_digit_of_the_label(trained, canvases):
    """Uses canvases with several digits; the control uses the attention maps of the other digits."""
    maps = trained[0].attention
    side, hits, controls = maps.shape[-1], [], []
    for image, boxes in zip(maps, canvases.boxes("test"), strict=True):
        for digit, (left, top, right, bottom) in boxes.items():
            for other in boxes:
                y, x = ((np.array(divmod(int(image[other].argmax()), side)) + 0.5) * 160 / side).tolist()
                (hits if other == digit else controls).append(left <= x <= right and top <= y <= bottom)
    assert len(controls) > 100
    assert np.mean(hits) > np.mean(controls) + 0.15
