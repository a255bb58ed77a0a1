"""Writes tiny random CLIP models of every supported kind, as folders for open_clip and FrozenCLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from safetensors.torch import save_file

Kind = Literal["resnet", "timm", "rot", "vit"]

# image_size: 64 for the ResNet (2x2 grid) and the ViT (4x4), 160 for timm (5x5). embed_dim 24, text width 16.
VISION: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "timm": {
        "image_size": 160,
        "timm_model_name": "test_efficientnet",
        "timm_model_pretrained": False,
        "timm_pool": "abs_attn",
        "timm_proj": "",
    },
    "rot": {
        "image_size": 160,
        "timm_model_name": "test_efficientnet",
        "timm_model_pretrained": False,
        "timm_pool": "rot_attn",
        "timm_proj": "linear",
    },
    "vit": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def tiny_config(kind: Kind = "resnet", **changes: Any) -> dict[str, Any]:
    """Returns an open_clip model config; ``changes`` are top-level keys, ``vision_cfg`` and ``text_cfg`` are merged."""
    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": dict(VISION[kind]),
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    return config


def tiny_clip(folder: Path, kind: Kind = "resnet", seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny random model into ``folder`` as open_clip's local-dir format and returns ``folder``.

        Weights and BatchNorm statistics are random and away from their trivial initial values, so that a layer
    omitted, or run in training mode, changes outputs. Mean and std are MEAN and STD, not CLIP's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(kind, **changes)
    content = {"model_cfg": config, "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)}}
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        for name, value in model.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.startswith("visual") and value.is_floating_point() and value.ndim < 2:
                value.add_(torch.randn_like(value) * 0.2)  # biases and norms, most of which start at 0 or 1
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder
