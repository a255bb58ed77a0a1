"""Every system exports to ONNX, and every kind of tower and head also to pt2, with the scores of the classifier."""

from __future__ import annotations

import pytest
import torch

from cbsa_lightning.inference.export.scoring import ScoringGraph
from tiny_clip import VISION, tiny_clip
from tiny_systems import NAMES, SYSTEMS, WITHOUT_CLIP, classifier_of, differences, runtimes

pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'cbsa-lightning[export]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'cbsa-lightning[export]'")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return {kind: tiny_clip(tmp_path_factory.mktemp(kind), kind) for kind in VISION}


def assert_the_same(classifier, folder, formats=("onnx", "pt2"), extra=()):
    for run in runtimes(classifier, folder, formats, extra).values():
        for batch in (1, 7):
            difference, changed, spread = differences(classifier, run, batch)
            assert difference < 1e-5
            assert changed == 0
            if batch > 1:
                assert difference < spread / 3


@pytest.mark.parametrize("kind", VISION)
def test_cbsa_fused_with_a_stack(towers, tmp_path, kind):
    torch.manual_seed(0)
    network = SYSTEMS["CBSA"](NAMES, clip=str(towers[kind]))
    assert_the_same(classifier_of(network, VISION[kind]["image_size"], fused=True), tmp_path)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "CBSA"])
def test_systems_with_clip(towers, tmp_path, name):
    """Exports attention maps too if the system has any, since they are one more output of the same graph."""
    torch.manual_seed(0)
    network = SYSTEMS[name](NAMES, clip=str(towers["resnet"]))
    fused = name == "zero-shot"  # probes as systems
    extra = ("attention",) if name in ("DualCoOp", "DualCoOp++", "TaI") else ()
    assert_the_same(classifier_of(network, 64, fused), tmp_path, ("onnx",), extra)


@pytest.mark.parametrize(
    ("name", "formats", "extra"),
    [
        ("CAP", ("onnx", "pt2"), ()),
        ("CAP with ML-Decoder", ("onnx",), ()),
        ("SSGRL", ("onnx",), ("attention",)),
        ("GCN-ML", ("onnx",), ()),
        ("CAP with ML-Decoder", ("onnx", "pt2"), ("attention",)),  # the fused kernel does not compute them
    ],
)
def test_systems_without_clip(tmp_path, name, formats, extra):
    torch.manual_seed(0)
    assert_the_same(classifier_of(WITHOUT_CLIP[name](NAMES), 64), tmp_path, formats, extra)


def test_the_text_tower_is_not_exported(towers):
    network = SYSTEMS["DualCoOp"](NAMES, clip=str(towers["resnet"]))
    graph = ScoringGraph(classifier_of(network, 64))
    assert not any("clip.text" in name for name in graph.state_dict())
    assert sum(value.numel() for value in network.clip.text.state_dict().values()) > 0  # the network still contains it
