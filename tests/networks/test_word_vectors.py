"""Word vectors of class names from a file, and CLIP's text features as a replacement."""

from __future__ import annotations

import pytest
import torch

from cbsa_lightning.errors import WeightsError
from cbsa_lightning.networks.word_vectors import ENTRY, ClipWords, GloVe


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2 3\ndining 0 0 2\ntable 2 0 0\nat mail@x.org 5 6 7\nTV 1 1 1\n", encoding="utf-8")
    return str(path)


def test_words_of_a_name_are_averaged(file):
    found = GloVe(["dog", "dining table", "dining_table", "Dog"], file).vectors
    assert found.tolist() == [[1, 2, 3], [1, 0, 1], [1, 0, 1], [1, 2, 3]]


def test_errors_name_missing_words(file):
    with pytest.raises(WeightsError) as caught:
        GloVe(["dog", "dining chair", "at", "yak"], file)
    text = str(caught.value)
    assert "'chair' of class 'dining chair'" in text
    assert "'yak' of class 'yak'" in text
    assert "'at' of class 'at'" in text  # "at mail@x.org" in the file is a different token
    assert "'dining'" not in text
    assert "ClipWords" in text


def test_files_without_vectors_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"GloVe vectors cannot be read .*ClipWords"):
        GloVe(["dog"], str(tmp_path / "not_there.txt"))
    (tmp_path / "text.txt").write_text("dog is an animal\n")
    with pytest.raises(WeightsError, match="line 1: could not convert"):
        GloVe(["dog"], str(tmp_path / "text.txt"))
    (tmp_path / "nan.txt").write_text("cat 1 2\ndog 1 nan\n")
    with pytest.raises(WeightsError, match="line 2: the vector is empty or not finite"):
        GloVe(["dog"], str(tmp_path / "nan.txt"))


def test_text_features_replace_word_vectors(clip_folder):
    found = ClipWords(["dog", "cat"], str(clip_folder), "random").vectors
    torch.testing.assert_close(found.square().mean(1).sqrt(), torch.full((2,), ENTRY))
    assert not found.requires_grad
    assert not torch.equal(found[0], found[1])
