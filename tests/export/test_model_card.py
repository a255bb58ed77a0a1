"""The model card states the license of the pretrained weights only if it is known."""

from __future__ import annotations

import pytest

from cbsa_lightning.inference.export.model_card import UNKNOWN, _towers


@pytest.mark.parametrize(
    ("settings", "name", "sentence"),
    [
        ({"clip": "embedded", "pretrained": "openai"}, "the small CLIP", "MIT license"),
        (
            {"clip": "RN50-quickgelu", "pretrained": "openai"},
            "RN50-quickgelu of OpenAI",
            "deployed use is out of scope",
        ),
        ({"clip": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, "laion2b_s34b_b79k", "LAION publishes"),
        ({"clip": "ViT-B-32", "pretrained": "datacomp_s34b_b86k"}, "datacomp_s34b_b86k", UNKNOWN),
        ({"clip": "ViT-B-32", "pretrained": "/weights/laion.pt"}, "laion.pt", UNKNOWN),
        ({"clip": "/models/my-clip", "pretrained": "openai"}, "my-clip", UNKNOWN),  # uses the weights of the folder
        ({"clip": "hf-hub:user/clip", "pretrained": "openai"}, "user/clip", "https://huggingface.co/user/clip"),
        ({"clip": None, "backbone": "resnet50.tv_in1k", "pretrained": "timm"}, "resnet50.tv_in1k", "bsd-3-clause"),
        ({"clip": None, "backbone": "resnet50.tv_in1k", "pretrained": "timm"}, "resnet50.tv_in1k", "ImageNet"),
        ({"clip": None, "backbone": "resnet50.tv_in1k", "pretrained": "a.pth"}, "resnet50.tv_in1k", UNKNOWN),
    ],
)
def test_licenses_of_pretrained_weights(settings, name, sentence):
    towers, stated = _towers({"hyper_parameters": settings})
    assert name in towers
    assert sentence in stated
    if sentence == UNKNOWN:
        assert stated == UNKNOWN
