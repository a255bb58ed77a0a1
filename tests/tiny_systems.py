"""Small networks of every system with random weights, and their scores in the exported formats."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from partial import SYSTEMS as PARTIAL
from partial import TinyWords

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
    "CAP": partial(ImageNetNetwork, **RESNET),  # also the network of ASL and BCE
    "CAP with ML-Decoder": partial(ImageNetNetwork, **RESNET, head=partial(MLDecoderHead, width=16, feedforward=16)),
    **{name: partial(system, words=TinyWords, **RESNET) for name, system in PARTIAL.items()},
}


def moved(network):
    """Returns the network with noise added to its trained weights, and a random graph if it has one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in network.named_buffers():
            if name.endswith("graph"):  # of the classes, which is computed from the training labels
                buffer.copy_(torch.rand(buffer.shape, generator=generator))
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


def classifier_of(network, size, fused=False):
    fusion = random_fusion(network, size) if fused else None
    return Classifier(moved(network), NAMES, torch.tensor([0.3, 0.5, 0.6]), size, fusion=fusion)


Run = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def runtimes(classifier: Classifier, folder: Path, formats=("onnx", "pt2"), extra=()) -> dict[str, Run]:
    """Exports a classifier and returns a function for each format that computes logits, probabilities and labels."""
    import onnxruntime

    program = exported(ScoringGraph(classifier, extra), classifier.image_size)
    found: dict[str, Run] = {}
    if "onnx" in formats:
        write_onnx(program, folder / "model.onnx", tuple(extra), {})
        session = onnxruntime.InferenceSession(folder / "model.onnx", one_thread(onnxruntime))
        found["onnx"] = lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))
    if "pt2" in formats:
        write_program(program, folder / "model.pt2", {})
        found["pt2"] = torch.no_grad()(read_program(folder / "model.pt2")[0])
    return found


def one_thread(onnxruntime):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def varied_images(number: int, size: int) -> torch.Tensor:
    """Returns smooth images ``(number, 3, size, size)`` of different color and contrast.

    The scores of small networks with random weights depend more on them than on uniform noise, so that errors that
    depend on the image are visible.
    """
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(number, 3, 4, 4, generator=generator) * 400 - 72
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * torch.rand(number, 1, 1, 1, generator=generator)).clamp(0, 255).to(torch.uint8)


def differences(classifier, run: Run, batch: int) -> tuple[float, int, float]:
    """Returns the largest difference of a probability, the number of different labels, and the spread.

    The spread is the standard deviation of a probability over the images, averaged over the classes. A difference that
    is not far below it would not prove that the scores depend on the image in the same way.
    """
    images = varied_images(batch, classifier.image_size)
    expected = classifier.scores(images)
    _, probabilities, labels, *_ = run(images)
    changed = labels != (expected >= classifier.thresholds)
    spread = expected.std(0, correction=0).mean()
    return float((probabilities - expected).abs().max()), int(changed.sum()), float(spread)
