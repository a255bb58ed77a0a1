"""The images that a table of a run shows."""

from __future__ import annotations

import numpy as np

from cbsa_lightning.reports.telling_images import score_classes, telling_images

NAMES = ("cat", "dog")
# Rows: certain and right, wrong, uncertain, wrong for one class, certain with unknown labels.
SCORES = np.array([[0.99, 0.01], [0.1, 0.9], [0.5, 0.5], [0.99, 0.8], [0.99, 0.99]])
TRUTHS = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [-1, -1]], dtype=np.int8)


def test_each_reason_selects_its_images():
    found = {image.row: image.why for image in telling_images(SCORES, TRUTHS, NAMES, 3)}
    assert found == {1: "worst, suspected label error (cat)", 2: "most doubtful"}
    more = {image.row: image.why for image in telling_images(SCORES, TRUTHS, NAMES, 6)}
    assert more[1] == "worst, most doubtful, suspected label error (cat)"
    assert more[3] == "worst, suspected label error (dog)"
    assert 0 not in more


def test_doubt_is_the_sum_of_the_entropies_in_bits():
    (image,) = [image for image in telling_images(SCORES, TRUTHS, NAMES, 3) if image.row == 2]
    assert image.doubt == 2.0


def test_unknown_labels_are_not_errors():
    unknown = np.full_like(TRUTHS, -1)
    assert {image.why for image in telling_images(SCORES, unknown, NAMES, 9)} == {"most doubtful"}


def test_the_number_of_images_is_bounded():
    rng = np.random.default_rng(0)
    scores, truths = rng.random((200, 5)), (rng.random((200, 5)) < 0.5).astype(np.int8)
    images = telling_images(scores, truths, "abcde", 48)
    assert 16 <= len(images) <= 48
    assert len({image.row for image in images}) == len(images)
    loss = -np.log(np.where(truths == 1, scores, 1 - scores)).mean(1)
    assert [image.row for image in images[:16]] == np.argsort(-loss)[:16].tolist()
    assert all("worst" in image.why for image in images[:16])


def test_many_classes_are_reduced_to_those_of_the_images():
    images = telling_images(SCORES, TRUTHS, NAMES, 3)  # rows 1 and 2
    truths, given = np.zeros((5, 4), np.int8), np.zeros((5, 4), bool)
    truths[1, 3], given[2, [1, 3]], given[0, 0] = 1, True, True
    assert score_classes(images, truths, given, 4) == [0, 1, 2, 3]
    assert score_classes(images, truths, given, 3) == [1, 3]
    assert score_classes(images, truths, given, 1) == [3]
