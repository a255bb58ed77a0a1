"""Every system exports to ONNX, and every kind of tower and head also to pt2, with the scores of the classifier."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.export.onnx_model import write_onnx
from cbsa_lightning.inference.export.program_file import read_program, write_program
from cbsa_lightning.inference.export.scoring import ScoringGraph, exported
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.networks.cbsa import CBSANetwork
from cbsa_lightning.networks.dualcoop import DualCoOp
from cbsa_lightning.networks.dualcoop_plus import DualCoOpPlusPlus
from cbsa_lightning.networks.resnet import ImageNetNetwork, MLDecoderHead
from cbsa_lightning.networks.scpnet import SCPNet
from cbsa_lightning.networks.tai import TaI
from cbsa_lightning.networks.zero_shot import ZeroShotCLIP
from tiny_clip import VISION, tiny_clip

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'cbsa-lightning[export]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'cbsa-lightning[export]'")

NAMES = ["cat", "dog", "potted plant"]
PROMPTS = {"prompt_length": 3}
DECODER = {**PROMPTS, "num_contexts": 2, "decoder_heads": 4, "decoder_feedforward": 16}
RESNET = {"backbone": "test_resnet.r160_in1k", "pretrained": "random"}
SYSTEMS = {
    "CBSA": partial(CBSANetwork, **DECODER, decoder_layers=1),
    "CBSA without self-attention": partial(CBSANetwork, **DECODER, decoder_self_attention=False),
    "TP": partial(CBSANetwork, **PROMPTS, semantic_alignment=False, num_contexts=0, train_pool=False),
    "DualCoOp": partial(DualCoOp, **PROMPTS),
    "DualCoOp++": partial(DualCoOpPlusPlus, **PROMPTS),
    "SCPNet": partial(SCPNet, **PROMPTS, hidden=16),
    "TaI": partial(TaI, **PROMPTS),
    "zero-shot": ZeroShotCLIP,
}
WITHOUT_CLIP = {
    "CAP": partial(ImageNetNetwork, **RESNET),
    "CAP with ML-Decoder": partial(ImageNetNetwork, **RESNET, head=partial(MLDecoderHead, width=16, feedforward=16)),
}


def moved(network):
    """Returns the network with noise added to its trained weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def random_fusion(network, size):
    """Returns a fusion with random weights, and the function that computes its features."""
    describe = network.describer(keep=True)
    description = describe(network.features(torch.zeros(1, 3, size, size, dtype=torch.uint8)))
    widths = [part.shape[1] for part in (*description.descriptors, *description.scores)]
    random, classes = torch.Generator().manual_seed(2), len(NAMES)

    def tensor(*shape):
        return torch.randn(*shape, generator=random)

    count = len(widths)
    fusion = Fusion(
        tuple(tensor(width) for width in widths),
        tuple(tensor(width, classes) / width for width in widths),
        *(tensor(count, classes), tensor(count, classes), tensor(classes), torch.tensor(6.0)),
        *(tensor(classes), tensor(classes).abs(), tensor(classes), tensor(classes).abs() + 0.1),
        *(torch.tensor(0.5), torch.tensor(5.0), tensor(6, classes) * 0.1),
    )
    return fusion, describe


def differences(classifier, folder, formats=("onnx", "pt2"), extra=()):
    """Returns the largest difference in probability and the number of different labels, for each format."""
    graph = ScoringGraph(classifier, extra)
    program = exported(graph, classifier.image_size)
    run = {}
    if "onnx" in formats:
        write_onnx(program, folder / "model.onnx", tuple(extra), {})
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        run["onnx"] = lambda images: session.run(None, {"images": images.numpy()})
    if "pt2" in formats:
        write_program(program, folder / "model.pt2", {})
        loaded, _ = read_program(folder / "model.pt2")
        run["pt2"] = lambda images: [value.numpy() for value in loaded(images)]
    found = np.zeros((len(run), 2))
    for batch in (1, 7):
        size = (batch, 3, classifier.image_size, classifier.image_size)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))
        expected = classifier.scores(images)
        labels = (expected >= classifier.thresholds).numpy()
        for row, outputs in zip(found, run.values(), strict=True):
            with torch.no_grad():
                values = outputs(images)
            row[0] = max(row[0], np.abs(values[1] - expected.numpy()).max())
            row[1] += (values[2] != labels).sum()
    return found


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return {kind: tiny_clip(tmp_path_factory.mktemp(kind), kind) for kind in VISION}


def classifier_of(network, size, fused=False):
    fusion = random_fusion(network, size) if fused else None
    return Classifier(moved(network), NAMES, torch.tensor([0.3, 0.5, 0.6]), size, fusion=fusion)


def assert_the_same(found):
    assert found[:, 0].max() < 1e-5
    assert found[:, 1].sum() == 0


@pytest.mark.parametrize("kind", VISION)
def test_cbsa_fused_with_a_stack(towers, tmp_path, kind):
    torch.manual_seed(0)
    network = SYSTEMS["CBSA"](NAMES, clip=str(towers[kind]))
    assert_the_same(differences(classifier_of(network, VISION[kind]["image_size"], fused=True), tmp_path))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "CBSA"])
def test_systems_with_clip(towers, tmp_path, name):
    """Exports attention maps too if the system has any, since they are one more output of the same graph."""
    torch.manual_seed(0)
    network = SYSTEMS[name](NAMES, clip=str(towers["resnet"]))
    fused = name == "zero-shot"  # probes as systems
    extra = ("attention",) if name in ("DualCoOp", "DualCoOp++", "TaI") else ()
    assert_the_same(differences(classifier_of(network, 64, fused), tmp_path, ("onnx",), extra))


@pytest.mark.parametrize(
    ("name", "formats", "extra"),
    [
        ("CAP", ("onnx", "pt2"), ()),
        ("CAP with ML-Decoder", ("onnx",), ()),
        ("CAP with ML-Decoder", ("onnx", "pt2"), ("attention",)),  # the fused kernel does not compute them
    ],
)
def test_systems_without_clip(tmp_path, name, formats, extra):
    torch.manual_seed(0)
    assert_the_same(differences(classifier_of(WITHOUT_CLIP[name](NAMES), 64), tmp_path, formats, extra))


def test_the_text_tower_is_not_exported(towers):
    network = SYSTEMS["DualCoOp"](NAMES, clip=str(towers["resnet"]))
    graph = ScoringGraph(classifier_of(network, 64))
    assert not any("clip.text" in name for name in graph.state_dict())
    assert sum(value.numel() for value in network.clip.text.state_dict().values()) > 0  # the network still contains it
