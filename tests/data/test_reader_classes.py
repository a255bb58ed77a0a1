"""Classes without a data set, which predictions by a checkpoint take."""

from __future__ import annotations

import pytest

from cbsa_lightning.data.readers.classes import Classes
from cbsa_lightning.errors import ConfigError, DataError


def test_classes_are_as_given_and_have_no_images():
    source = Classes(["cat", "tvmonitor"], ["cat", "tv monitor"])
    source.prepare()
    assert source.class_names == ("cat", "tvmonitor")
    assert source.prompt_names == ("cat", "tv monitor")
    for read in (source.train, source.test):
        with pytest.raises(DataError, match="have no images"):
            read()


def test_another_number_of_prompt_names_is_refused():
    with pytest.raises(ConfigError, match="prompt_names"):
        Classes(["cat", "dog"], ["cat"])
