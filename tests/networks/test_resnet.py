"""The ImageNet network: heads compared with slow recomputations, weights, and complete runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from cbsa_lightning import SSMLLModule
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.cli.lightning_cli import make_cli
from cbsa_lightning.errors import ConfigError, DataError, WeightsError
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.losses import BinaryCrossEntropy, binary_cross_entropy
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.networks.resnet import ImageNetNetwork, LinearHead, MLDecoderHead
from layouts import make_voc
from reference.decoder import weights_of
from reference.resnet import linear, ml_decoder, slope
from tiny_data import CLASSES, SIZE, Squares, tiny_data, tiny_trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = "test_resnet.r160_in1k"
HEADS = {"linear": LinearHead, "ml-decoder": partial(MLDecoderHead, width=16, heads=4, feedforward=24)}


def network(**settings):
    torch.manual_seed(0)
    return ImageNetNetwork(CLASSES, **{"backbone": TINY, "pretrained": "random", **settings})


def images(number=4):
    return torch.randint(0, 256, (number, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.manual_seed(1))


def shaken(head):
    """Converts to float64 without dropout. Norms and biases are not 0 or 1, so that omissions are detected."""
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn(p.shape, generator=torch.manual_seed(p.numel())) * 0.1)
    return head.double().eval()


def arrays(head):
    return {name: value.detach().numpy() for name, value in head.state_dict().items()}


def check_gradients(head, found, features, value):
    """Compares gradients of a weighted sum of logits, for map and weights, with central differences of ``value``."""
    weighing = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    wanted = {"features": features, **dict(head.named_parameters())}
    gradients = torch.autograd.grad((found * weighing).sum(), list(wanted.values()))
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        expected = slope(lambda: (value() * weighing.numpy()).sum(), x.detach().numpy())
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-7, err_msg=name)


def test_linear_head_equals_the_reference():
    torch.manual_seed(0)
    head = shaken(LinearHead(6, 3))
    features = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    output, weights = head(features, attention=True), arrays(head)

    def value():
        return linear(features.detach().numpy(), weights["linear.weight"], weights["linear.bias"])

    np.testing.assert_allclose(output.logits.detach().numpy(), value(), atol=1e-12)
    assert output.attention is None
    check_gradients(head, output.logits, features, value)


@pytest.mark.parametrize("maps", [False, True])
def test_ml_decoder_head_equals_the_reference(maps):
    torch.manual_seed(0)
    head = shaken(MLDecoderHead(6, 3, width=8, heads=2, feedforward=5))
    features = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    output, weights = head(features, maps), arrays(head)

    def value():
        return ml_decoder(features.detach().numpy(), weights, weights_of(head.decoder["layers"][0]), 2)[0]

    np.testing.assert_allclose(output.logits.detach().numpy(), value(), atol=1e-12)
    assert (output.attention is not None) == maps
    if maps:
        expected = ml_decoder(features.detach().numpy(), weights, weights_of(head.decoder["layers"][0]), 2)[1]
        np.testing.assert_allclose(output.attention.detach().numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(output.attention.sum((2, 3)).detach().numpy(), 1)
    check_gradients(head, output.logits, features, value)


def test_ml_decoder_head_has_the_published_sizes():
    head = MLDecoderHead(2048, 80)
    assert {name: tuple(p.shape) for name, p in head.named_parameters() if "." not in name} == {
        "weight": (80, 768),
        "bias": (80,),
    }
    assert tuple(head.queries.shape) == (80, 768)
    assert not head.queries.requires_grad
    (block,) = head.decoder["layers"]
    assert (block.multihead_attn.num_heads, block.linear1.out_features) == (8, 2048)
    assert (block.dropout.p, block.multihead_attn.dropout) == (0.1, 0.1)
    with pytest.raises(ConfigError, match="the feature width 768 is not divisible by 5 attention heads"):
        MLDecoderHead(2048, 80, heads=5)


def test_the_default_trunk_is_resnet_50():
    trunk = network(backbone="resnet50.tv_in1k").trunk
    assert trunk.num_features == 2048
    assert sum(p.numel() for p in trunk.parameters()) == 25_557_032 - 2_049_000  # torchvision's, without its classifier


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_everything_is_trained(head):
    net = network(head=head)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # timm initializes the last norm of a block to 0, which blocks the gradient
    net(net.features(images())).logits.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    (group,) = net.parameter_groups()
    assert (len(group["params"]), group["lr_scale"]) == (len(list(net.parameters())), 1.0)
    assert net.frozen_weights is None
    assert net.encode_text() is None
    assert net.num_contexts == 0


def test_features_of_the_network_are_the_images():
    net, batch = network(), images()
    assert torch.equal(net.features(batch), batch.float() / 255)
    assert torch.equal(net.features(batch.float() / 255), net.features(batch))
    with pytest.raises(DataError, match=r"\(B, 3, H, W\), got \(3, 64, 64\)"):
        net.features(batch[0])
    with pytest.raises(DataError, match=r"got torch\.int64"):
        net.features(batch.long())


def test_normalization_only_on_request():
    plain, net = network().eval(), network(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5]).eval()
    x = plain.features(images())
    by_hand = torch.stack([(x[:, 0] - 0.5) / 0.2, (x[:, 1] - 0.4) / 0.25, (x[:, 2] - 0.3) / 0.5], 1)
    with torch.no_grad():
        assert torch.equal(plain(x).logits, plain.head(plain.trunk(x)).logits)
        torch.testing.assert_close(net(x).logits, plain(by_hand).logits)
    with pytest.raises(ConfigError, match=r"image_mean must be three numbers, got \[0.5\]"):
        network(image_mean=[0.5])
    with pytest.raises(ConfigError, match=r"image_std must be three numbers above 0, got \[1, 1, 0\]"):
        network(image_std=[1, 1, 0])


def test_batch_norm_statistics_change_only_in_training():
    net = network()
    statistics = {k: v for k, v in net.trunk.state_dict().items() if "running_" in k}
    before = {k: v.clone() for k, v in statistics.items()}
    net.eval()(net.features(images()))
    assert all(torch.equal(statistics[k], before[k]) for k in before)
    net.train()(net.features(images()))
    assert before
    assert not any(torch.equal(statistics[k], before[k]) for k in before)


def test_attention_maps():
    net = network(head=HEADS["ml-decoder"]).eval()
    x = net.features(images())
    with torch.no_grad():
        output, plain = net(x, attention=True), net(x)
    assert output.attention.shape[:2] == (4, len(CLASSES))
    assert output.attention.shape[2:] == net.trunk(x).shape[2:]
    torch.testing.assert_close(output.attention.sum((2, 3)), torch.ones(4, len(CLASSES)))
    assert plain.attention is None
    torch.testing.assert_close(output.logits, plain.logits)


def test_unsuitable_backbones_are_refused():
    with pytest.raises(ConfigError, match=r"does not have a model 'resnet50x'; similar names: .*resnet50"):
        network(backbone="resnet50x")
    net = network(backbone="test_vit")
    with pytest.raises(
        ConfigError, match=r"VisionTransformer returns a tensor of shape \(1, 101, 64\), but a map \(B, 64, h, w\)"
    ):
        net(torch.zeros(1, 3, 160, 160))


# Weights ---------------------------------------------------------------------------------------------------------


def test_offline_error_lists_the_ways_to_get_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        ImageNetNetwork(CLASSES)
    text = str(caught.value)
    assert "ImageNet weights of resnet50.tv_in1k, huggingface.co/timm/resnet50.tv_in1k, could not be loaded" in text
    assert all(way in text for way in ("HF_HOME", "pretrained=<file>", "pretrained='random'"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    """Files may contain a classifier, as on the Hub, and lack counters, as older files of torchvision do."""
    torch.manual_seed(7)
    source = ImageNetNetwork(CLASSES, TINY, "random").trunk
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    state |= {"fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    trunk = network(pretrained=str(file)).trunk
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in trunk.state_dict().items())
    assert not torch.equal(trunk.state_dict()["conv1.0.weight"], network().trunk.state_dict()["conv1.0.weight"])


def test_a_file_of_torchvision_restores_its_network(tmp_path):
    torch.manual_seed(3)
    theirs, file = resnet18().eval(), tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), file)
    ours = network(backbone="resnet18.tv_in1k", pretrained=str(file)).eval()
    ours.head.linear.load_state_dict({k: v[: len(CLASSES)] for k, v in theirs.fc.state_dict().items()})
    x = ours.features(images())
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x)[:, : len(CLASSES)])


def test_unsuitable_files_are_refused(tmp_path):
    state, file = network().trunk.state_dict(), tmp_path / "w.pth"

    def message(content):
        torch.save(content, file)
        with pytest.raises(WeightsError) as caught:
            network(pretrained=str(file))
        assert "pretrained=<file>" in str(caught.value)
        return str(caught.value)

    less = {k: v for k, v in state.items() if k != "conv1.0.weight"}
    text = message({**less, "odd": torch.zeros(2), "bn1.bias": torch.zeros(3)})
    assert f"{file} does not contain the weights of this backbone" in text
    assert "missing: conv1.0.weight" in text
    assert "unknown: odd" in text
    assert f"other shape: bn1.bias (3,) instead of {tuple(state['bn1.bias'].shape)}" in text
    assert f"{file} does not contain a plain mapping from names to tensors" in message({"state_dict": state})
    assert f"{file} cannot be read as a weights file" in message(Path("code"))  # it would have to be unpickled
    file.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="cannot be read as a weights file"):
        network(pretrained=str(file))
    with pytest.raises(WeightsError, match=r"there\.pth' is neither 'timm' nor an existing file"):
        network(pretrained=str(tmp_path / "not_there.pth"))


# Training --------------------------------------------------------------------------------------------------------


def test_bce_row_uses_binary_cross_entropy():
    logits = torch.randn(6, 5, generator=torch.manual_seed(0)).mul(4).requires_grad_(True)
    targets = torch.randint(0, 2, (6, 5), generator=torch.manual_seed(1))
    ours = binary_cross_entropy(logits, targets)
    theirs = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.fixture(scope="module", params=HEADS)
def run(request, tmp_path_factory, squares_folder):
    """Returns a run of 1 + 1 epochs, its checkpoint, and a function that builds its network."""
    folder = tmp_path_factory.mktemp("run")
    make = partial(ImageNetNetwork, backbone=TINY, pretrained="random", head=HEADS[request.param])
    torch.manual_seed(0)
    module = SSMLLModule(CLASSES, make, warmup_epochs=1, ema_decay=0.8)
    callbacks = [ModelCheckpoint(folder, save_last=True), RunReport(num_images=1)]
    trainer = tiny_trainer(folder, callbacks=callbacks, enable_checkpointing=True, logger=CSVLogger(folder))
    trainer.fit(module, datamodule=tiny_data(Squares(squares_folder)))
    return module, trainer, folder / "last.ckpt", make


def test_a_complete_run(run):
    module, trainer, _, _ = run
    metrics = trainer.callback_metrics
    assert 0 <= metrics["val/mAP"] <= 1
    assert metrics["train/loss_unsup"] > 0
    assert bool(module.ema.started)
    assert not module.tau_pos.isnan().all()
    averaged = module.ema.get_buffer("average_of_trunk__bn1__running_mean")
    assert not torch.equal(averaged, module.network.trunk.bn1.running_mean)


def test_attention_is_plotted_if_the_head_has_maps(run):
    module, trainer, _, _ = run
    drawn = {file.name for file in (Path(trainer.log_dir) / "pictures").iterdir()}
    assert "predictions.png" in drawn
    assert ("attention.png" in drawn) == isinstance(module.network.head, MLDecoderHead)


def test_a_checkpoint_predicts_like_the_run(run):
    module, _, file, make = run
    torch.manual_seed(99)
    loaded = SSMLLModule.load_from_checkpoint(file, network=make, weights_only=True).eval()
    assert torch.equal(loaded(images()), module.eval()(images()))
    assert torch.equal(loaded.decision_thresholds(), module.decision_thresholds())
    with module.ema.applied_to(module.network):  # averaged weights need averaged statistics
        assert torch.equal(module.network(module.network.features(images())).logits.sigmoid(), loaded(images()))


def test_labels_from_frozen_features_are_refused(tmp_path, squares_folder):
    module = SSMLLModule(CLASSES, partial(ImageNetNetwork, backbone=TINY, pretrained="random"), labeler=StackedProbes())
    with pytest.raises(ConfigError, match=r"no frozen features .*ClassDistributionAware"):
        tiny_trainer(tmp_path).fit(module, datamodule=tiny_data(Squares(squares_folder)))


def build(folder, method, *more):
    """Builds the overlays of the paper's table with a tiny random backbone."""
    make_voc(folder / "voc")
    tiny = folder / "tiny.yaml"
    tiny.write_text(f"model: {{init_args: {{network: {{init_args: {{backbone: {TINY}, pretrained: random}}}}}}}}\n")
    overlays = [CONFIGS / f"{name}.yaml" for name in (f"methods/{method}", "data/voc", f"methods/voc/{method}")]
    return make_cli(
        [
            *(part for file in (*overlays, tiny) for part in ("--config", str(file))),
            f"--data.source.init_args.root={folder / 'voc'}",
            "--trainer.accelerator=cpu",
            *more,
        ],
        run=False,
    )


@pytest.mark.parametrize("method", ["bce", "asl", "cap", "cap_ml_decoder"])
def test_each_overlay(method, tmp_path):
    """Checks only the settings; ``test_systems.py`` trains these systems."""
    cli = build(tmp_path, method)
    module, net = cli.model, cli.model.network
    assert isinstance(net, ImageNetNetwork)
    assert isinstance(net.head, MLDecoderHead if method == "cap_ml_decoder" else LinearHead)
    assert isinstance(module.labeler, LabeledOnly) == (method in ("bce", "asl"))
    assert isinstance(module.loss, BinaryCrossEntropy) == (method == "bce")
    assert cli.datamodule.batch_size == 32
    assert module.make_optimizer(net.parameters()).defaults["weight_decay"] == 1e-4


def test_a_network_setting_by_flag(tmp_path):
    flags = ("backbone=resnet18", "head.init_args.width=48", "image_mean=[0.4,0.4,0.4]")
    more = [f"--model.init_args.network.init_args.{flag}" for flag in flags]
    net = build(tmp_path, "cap_ml_decoder", *more).model.network
    assert (net.trunk.num_features, net.head.weight.shape[1]) == (512, 48)
    assert net.mean.flatten().tolist() == pytest.approx([0.4, 0.4, 0.4])
