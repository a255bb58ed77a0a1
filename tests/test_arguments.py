"""Wrong arguments raise errors that name them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cbsa_lightning import Classifier, SSMLLDataModule, SSMLLModule
from cbsa_lightning.callbacks.predictions import WritePredictions
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.readers import COCO, NUSWIDE, VOC, Digits, Table
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.context_task import ContextTask, NormalizedCut
from cbsa_lightning.method.labelers import ClassDistributionAware, Fixed, InstanceAware, TopK
from cbsa_lightning.method.losses import AsymmetricLoss
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.networks.dualcoop import DualCoOp
from cbsa_lightning.training.schedules import OneCycle
from tiny_data import CLASSES, tiny_module

MODULE = [
    ({"ema_decay": 2}, r"ema_decay must be a number of at least 0 and at most 1, got 2"),
    ({"ema_decay": float("nan")}, r"ema_decay .*got nan"),
    ({"ema_decay": "0.9"}, r"ema_decay .*got '0\.9'"),
    ({"warmup_epochs": -1}, r"warmup_epochs must be an integer of at least 0, got -1"),
    ({"warmup_epochs": 1.5}, r"warmup_epochs .*got 1\.5"),
    ({"unsup_weight": -1.0}, r"unsup_weight"),
    ({"max_skipped_steps": -1}, r"max_skipped_steps"),
    ({"labeler": "x"}, r"labeler cannot be a str \('x'\); give an object"),
    ({"contexts": {"weight": 1}}, r"contexts cannot be a dict"),
    ({"loss": "asl"}, r"loss cannot be a str"),
    ({"optimizer": "adam"}, r"optimizer cannot be a str"),
    ({"scheduler": 3}, r"scheduler cannot be a int"),
    ({"num_contexts": -1}, r"num_contexts must be an integer of at least 0, got -1"),
    ({"prompt_length": 0}, r"prompt_length"),
    ({"decoder_layers": 0}, r"decoder_layers"),
    ({"decoder_dropout": 2.0}, r"decoder_dropout"),
    ({"scale": "20"}, r"scale must be a number of at least 0, got '20'"),
    ({"train_pool": "false"}, r"train_pool must be True or False, got 'false'"),
    ({"shared_prompts": 2}, r"shared_prompts must be True or False, got 2"),
    ({"prompt_names": ["a"]}, r"prompt_names has 1 entries for 5 classes"),
]


@pytest.mark.parametrize(("settings", "message"), MODULE, ids=str)
def test_arguments_of_the_module(clip_folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_module(clip_folder, **settings)


@pytest.mark.parametrize(("names", "message"), [
    ("sky", "class_names must be a list of strings, got 'sky'"), ([], "class_names is empty"),
    (["sky", "sky"], "class_names contains 'sky' more than once"), (["sky", ""], "class_names: number 1 is empty"),
    ([1, 2], "class_names must be a list of strings"), (None, "class_names must be a list of strings"),
])  # fmt: skip
def test_class_names(clip_folder, names, message):
    for make in (partial(SSMLLModule, network=partial(DualCoOp, clip=str(clip_folder))),):
        with pytest.raises(ConfigError, match=message):
            make(names)
    with pytest.raises(ConfigError, match=message):
        Classifier(torch.nn.Identity(), names, torch.zeros(1), 64)


@pytest.mark.parametrize(("settings", "message"), [
    ({"source": "photos.csv"}, r"source cannot be a str \('photos\.csv'\); give a source of .*Table\(train=FILE\)"),
    ({"labeled_fraction": 1.5}, "labeled_fraction must be a number of at least 0 and at most 1, got 1.5"),
    ({"held_out_fraction": -0.1}, "held_out_fraction"), ({"strong_view": 3}, "strong_view"),
    ({"batch_size": 8.5}, "batch_size must be an integer"), ({"image_size": "64"}, "image_size"),
    ({"eval_batch_size": 0}, "eval_batch_size"), ({"num_workers": -1}, "num_workers"),
    ({"on_error": "ignore"}, r"data\.on_error must be 'stop' or 'skip', got 'ignore'"),
    ({"image_cache": "cache"}, r"image_cache cannot be a str \('cache'\); give ImageCache\(FOLDER\)"),
    ({"feature_cache": "cache"}, r"feature_cache cannot be a str \('cache'\); give FeatureCache\(FOLDER\)"),
    ({"predict": ["a.jpg"]}, "predict cannot be a list"), ({"split_file": {}}, "split_file cannot be a dict"),
    ({"fast_decode": "no"}, "fast_decode must be True or False"),
])  # fmt: skip
def test_arguments_of_the_data_module(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        SSMLLDataModule(**{"source": Digits(str(tmp_path)), **settings})


@pytest.mark.parametrize(("make", "message"), [
    (partial(ContextTask, weight=-1), r"contexts\.weight must be a number of at least 0, got -1"),
    (partial(ContextTask, confidence=2), r"contexts\.confidence .*at most 1, got 2"),
    (partial(ContextTask, soft_targets="no"), "soft_targets must be True or False"),
    (partial(NormalizedCut, "qr"), r"assign must be 'cluster_qr' or .*, got 'qr'"),
    (partial(ContextTask, pseudo_weight=float("inf")), r"contexts\.pseudo_weight .*got inf"),
    (partial(TopK, k=0), "TopK: k must be an integer of at least 1, got 0"),
    (partial(TopK, k=2.0), r"TopK: k must be an integer of at least 1, got 2\.0"),
    (partial(TopK, k="2"), "TopK: k must be an integer .*got '2'"),
    (partial(ClassDistributionAware, eta_neg=1.2), r"eta_neg must be a number .*at most 1, got 1\.2"),
    (partial(ClassDistributionAware, eta_pos=None), "eta_pos must be a number .*got None"),
    (partial(Fixed, tau_pos=0.1, tau_neg=0.5), r"the negative threshold 0\.5 exceeds the positive threshold 0\.1"),
    (partial(InstanceAware, pos="x"), "the positive threshold must be a number"),
    (partial(StackedProbes, trust="4"), "StackedProbes: trust must be a number"),
    (partial(AsymmetricLoss, gamma_neg=-1), "asymmetric loss: gamma_neg must be a number of at least 0, got -1"),
    (partial(AsymmetricLoss, clip="0.05"), "asymmetric loss: clip must be a number"),
    (partial(OneCycle, cycle=0.5), "OneCycle: cycle must be a number .*at least 1, got 0.5"),
    (partial(OneCycle, pct_start=20), "OneCycle: pct_start must be a number .*at most 1, got 20"),
    (partial(RunReport, num_images=0), r"report\.num_images must be an integer of at least 1, got 0"),
    (partial(WritePredictions, on_error="ignore"), r"predictions\.on_error must be 'stop' or 'skip'"),
    (partial(WritePredictions, output=1), r"predictions\.output cannot be a int"),
    (partial(ImageCache, limit_gb=-1), r"image_cache\.limit_gb must be a number of at least 0"),
    (partial(FeatureCache, strong_views=-1), r"feature_cache\.strong_views must be an integer of at least 0, got -1"),
    (partial(FeatureCache, folder=1), r"feature_cache\.folder cannot be a int"),
    (partial(Table, type("DataFrame", (), {})()), "Table: train cannot be a DataFrame .*write a DataFrame with to_csv"),
    (partial(Table, None), "Table: train is None"),
    (partial(Table, "a.csv", test=["b.csv"]), "Table: test cannot be a list"),
    (partial(Table, "a.csv", separator=""), "Table: separator must be a nonempty string, got ''"),
    (partial(Table, "a.csv", allow_outside="yes"), "Table: allow_outside must be True or False"),
    (partial(COCO, "coco", year=2014), "COCO: year cannot be a int"),
    (partial(VOC, "voc", year="2010"), "VOC: year must be '2012' or '2007', got '2010'"),
    (partial(VOC, "voc", difficult="drop"), "VOC: difficult must be"),
    (partial(NUSWIDE, "nus", layout="csv"), "NUSWIDE: layout must be 'official' or 'list', got 'csv'"),
    (partial(NUSWIDE, 1), "NUSWIDE: root cannot be a int"),
    (partial(Digits, num_train=0), "Digits: num_train must be an integer of at least 1, got 0"),
    (partial(Digits, image_size=32), "Digits: image_size must be an integer of at least 64, got 32"),
    (partial(Classifier, "last.ckpt", ["a"], torch.zeros(1), 64), r"network cannot be a str .*Classifier\.load"),
    (partial(Classifier, torch.nn.Identity(), ["a"], [0.5], 64), "thresholds cannot be a list"),
], ids=lambda value: getattr(getattr(value, "func", None), "__name__", ""))  # fmt: skip
def test_arguments_of_other_objects(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_names_may_be_any_iterable(clip_folder):
    module = SSMLLModule((name for name in CLASSES), partial(DualCoOp, clip=str(clip_folder)))
    assert module.class_names == list(CLASSES)
