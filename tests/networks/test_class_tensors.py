"""Every network lists the tensors whose rows are classes."""

from __future__ import annotations

from functools import partial

import pytest

from cbsa_lightning import CBSAModule
from cbsa_lightning.networks.dualcoop import DualCoOp
from cbsa_lightning.networks.dualcoop_plus import DualCoOpPlusPlus
from cbsa_lightning.networks.resnet import ImageNetNetwork, LinearHead, MLDecoderHead
from cbsa_lightning.networks.scpnet import SCPNet
from cbsa_lightning.networks.tai import TaI
from cbsa_lightning.networks.zero_shot import ZeroShotCLIP

NAMES = ["cat", "dog", "potted plant", "boat", "train", "horse", "cow"]
PROMPTED = {"prompt_length": 2}


def cbsa(names, **settings):
    return CBSAModule(names, **{"num_contexts": 2, "decoder_feedforward": 8, **PROMPTED, **settings}).network


def resnet(names, clip, head):
    return ImageNetNetwork(names, backbone="test_resnet.r160_in1k", pretrained="random", head=head)


NETWORKS = {
    "CBSA": cbsa,
    "CBSA, shared prompts": partial(cbsa, shared_prompts=True),
    "CBSA, fixed target prompts": partial(cbsa, target_prompts=False),
    "CBSA, no decoder": partial(cbsa, semantic_alignment=False),
    "DualCoOp": partial(DualCoOp, **PROMPTED),
    "DualCoOp++": partial(DualCoOpPlusPlus, **PROMPTED),
    "SCPNet": partial(SCPNet, hidden=8, **PROMPTED),
    "TaI": partial(TaI, **PROMPTED),
    "zero-shot": ZeroShotCLIP,
    "ResNet": partial(resnet, head=LinearHead),
    "ML-Decoder": partial(resnet, head=partial(MLDecoderHead, width=16, heads=4, feedforward=8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_class_tensors_grow_with_the_number_of_classes(clip_folder, name):
    few, many = (NETWORKS[name](NAMES[:number], clip=str(clip_folder)) for number in (5, 7))
    there = many.state_dict()
    grown = {key for key, value in few.state_dict().items() if value.shape != there[key].shape}
    assert few.class_tensors() == grown
    assert all(few.state_dict()[key].shape[0] == 5 for key in grown)
