"""Custom data modules: missing parts of the interface are named."""

from __future__ import annotations

import pytest
from lightning import LightningDataModule

from cbsa_lightning.data.protocol import SemiSupervisedData, semi_supervised
from cbsa_lightning.errors import ConfigError
from tiny_data import Squares, tiny_data


def test_the_librarys_module_implements_the_protocol(tmp_path):
    data: SemiSupervisedData = tiny_data(Squares(tmp_path))
    data.setup("fit")
    assert semi_supervised(data) is data
    assert [name for name in SemiSupervisedData.__annotations__ if not hasattr(data, name)] == []
    assert [name for name in vars(SemiSupervisedData) if not name.startswith("_") and not hasattr(data, name)] == []


def test_missing_parts_are_named():
    class Mine(LightningDataModule):
        train_table = split = None

        def weak_dataloader(self, epoch):
            return []

    with pytest.raises(ConfigError, match=r"Mine lacks \['plain_dataloader', 'labeled_targets', 'hidden_targets'\]"):
        semi_supervised(Mine())
    with pytest.raises(ConfigError, match="with only loaders"):
        semi_supervised(None)
