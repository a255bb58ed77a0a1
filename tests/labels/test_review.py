"""Lists of images to label next and of suspicious labels."""

from __future__ import annotations

import numpy as np

from cbsa_lightning.inference.labels.image_labels import ImageLabels
from cbsa_lightning.inference.labels.review import next_to_label, suspicious_labels

NAMES = ("cat", "dog")
IMAGES = np.array(["a", "b", "c"], np.dtypes.StringDType())


def test_the_least_certain_images_are_first():
    probabilities = np.array([[0.9, 0.0], [0.5, 0.4], [0.3, 1.0]], np.float32)
    labels = ImageLabels.decided(IMAGES, NAMES, probabilities, np.array([0.5, 0.5]))
    found = next_to_label(labels, budget=2)
    assert found["image"].to_pylist() == ["b", "c"]
    assert found["classes"].to_pylist() == ["cat;dog", "cat;dog"]
    assert found["labels"].to_pylist() == ["cat", "dog"]
    assert next_to_label(labels, budget=9).num_rows == 3


def test_rare_classes_can_have_more_weight():
    probabilities = np.array([[0.5, 0.0], [0.0, 0.3], [0.0, 0.0]], np.float32)
    labels = ImageLabels.decided(IMAGES, NAMES, probabilities, np.array([0.5, 0.5]))
    assert next_to_label(labels, 1)["image"].to_pylist() == ["a"]
    assert next_to_label(labels, 1, positives=np.array([99, 0]))["image"].to_pylist() == ["b"]


def test_labels_that_out_of_fold_probabilities_contradict_are_listed():
    given = np.array([[1, 0], [0, -1], [1, 1]], np.int8)
    left_out = np.array([[0.1, 0.6], [0.2, 0.99], [0.8, 0.05]])
    found = suspicious_labels(IMAGES, NAMES, given, left_out)
    assert found.to_pylist() == [
        {"image": "c", "class": "dog", "given": "yes", "wrong": 0.95},
        {"image": "a", "class": "cat", "given": "yes", "wrong": 0.9},
        {"image": "a", "class": "dog", "given": "no", "wrong": 0.6},
    ]
