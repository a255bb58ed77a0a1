"""Wrong arguments are refused where they are given, by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cbsa_lightning import Classifier, SSMLLDataModule, SSMLLModule
from cbsa_lightning.data.readers import Digits
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.dualcoop import DualCoOp
from tiny_data import CLASSES, tiny_module

MODULE = [
    ({"ema_decay": 2}, r"ema_decay must be a number of at least 0 and at most 1, got 2"),
    ({"ema_decay": float("nan")}, r"ema_decay .*got nan"),
    ({"ema_decay": "0.9"}, r"ema_decay .*got '0\.9'"),
    ({"warmup_epochs": -1}, r"warmup_epochs must be a whole number of at least 0, got -1"),
    ({"warmup_epochs": 1.5}, r"warmup_epochs .*got 1\.5"),
    ({"unsup_weight": -1.0}, r"unsup_weight"),
    ({"max_skipped_steps": -1}, r"max_skipped_steps"),
    ({"labeler": "x"}, r"labeler cannot be a str \('x'\); give an object"),
    ({"contexts": {"weight": 1}}, r"contexts cannot be a dict"),
    ({"loss": "asl"}, r"loss cannot be a str"),
    ({"optimizer": "adam"}, r"optimizer cannot be a str"),
    ({"scheduler": 3}, r"scheduler cannot be a int"),
    ({"num_contexts": -1}, r"num_contexts must be a whole number of at least 0, got -1"),
    ({"prompt_length": 0}, r"prompt_length"),
    ({"decoder_layers": 0}, r"decoder_layers"),
    ({"decoder_dropout": 2.0}, r"decoder_dropout"),
    ({"prompt_names": ["a"]}, r"prompt_names has 1 entries for 5 classes"),
]


@pytest.mark.parametrize(("settings", "message"), MODULE, ids=str)
def test_of_the_module(clip_folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_module(clip_folder, **settings)


@pytest.mark.parametrize(("names", "message"), [
    ("sky", "class_names must be a list of texts, got 'sky'"), ([], "class_names is empty"),
    (["sky", "sky"], "class_names has 'sky' more than once"), (["sky", ""], "class_names: number 1 is empty"),
    ([1, 2], "class_names must be a list of texts"), (None, "class_names must be a list of texts"),
])  # fmt: skip
def test_class_names(clip_folder, names, message):
    for make in (partial(SSMLLModule, network=partial(DualCoOp, clip=str(clip_folder))),):
        with pytest.raises(ConfigError, match=message):
            make(names)
    with pytest.raises(ConfigError, match=message):
        Classifier(torch.nn.Identity(), names, torch.zeros(1), 64)


@pytest.mark.parametrize(("settings", "message"), [
    ({"source": "photos.csv"}, r"source cannot be a str \('photos\.csv'\); give a source of .*Table\(train=FILE\)"),
    ({"labelled_fraction": 1.5}, "labelled_fraction must be a number of at least 0 and at most 1, got 1.5"),
    ({"held_out_fraction": -0.1}, "held_out_fraction"), ({"cutout": 3}, "cutout"),
    ({"batch_size": 8.5}, "batch_size must be a whole number"), ({"image_size": "64"}, "image_size"),
    ({"eval_batch_size": 0}, "eval_batch_size"), ({"num_workers": -1}, "num_workers"),
])  # fmt: skip
def test_of_the_data_module(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        SSMLLDataModule(**{"source": Digits(str(tmp_path)), **settings})


def test_any_iterable_of_names(clip_folder):
    module = SSMLLModule((name for name in CLASSES), partial(DualCoOp, clip=str(clip_folder)))
    assert module.class_names == list(CLASSES)
