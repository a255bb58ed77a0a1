"""Monitors that do not exist are refused before the first step; the list of metrics equals what a run logs."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from cbsa_lightning.callbacks.monitors import logged_names
from cbsa_lightning.errors import ConfigError
from tiny_data import Squares, tiny_fit


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


@pytest.mark.parametrize("settings", [{}, {"num_contexts": 0, "semantic_alignment": False}])
def test_the_list_equals_the_logged_metrics(tmp_path, clip_folder, squares, settings):
    module, trainer = tiny_fit(tmp_path, clip_folder, squares, **settings)
    logged = {name for name in trainer.callback_metrics if "/" in name}
    assert logged == set(logged_names(module))


@pytest.mark.parametrize("name", ["val_loss", "val/map", "val/AP/purple"])
@pytest.mark.parametrize("make", [EarlyStopping, lambda monitor: ModelCheckpoint(monitor=monitor)])
def test_an_unknown_metric_is_refused(tmp_path, clip_folder, squares, name, make):
    settings = {"callbacks": [make(name)], "enable_checkpointing": True}
    with pytest.raises(ConfigError, match=rf"monitors '{name}', which this run does not log.*val/"):
        tiny_fit(tmp_path, clip_folder, squares, trainer=settings)


def test_custom_callbacks_may_log_more_metrics(tmp_path, clip_folder, squares):
    class Mine(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("mine", 1.0)

    callbacks = [Mine(), EarlyStopping("mine", patience=5)]
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, trainer={"callbacks": callbacks})
    assert trainer.callback_metrics["mine"] == 1
