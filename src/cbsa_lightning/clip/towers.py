"""The layers of open_clip's image towers below the pool."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from typing import cast

import torch
import torch.fx
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cbsa_lightning.clip.pooling import Pool, ResNetPool, TimmPool, dense_pool, resize_positions
from cbsa_lightning.errors import ConfigError

RESNET_LAYERS = (
    *("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "avgpool"),
    *("layer1", "layer2", "layer3", "layer4"),
)


class ViTTower(nn.Module):
    """Patch embedding and blocks of an open_clip VisionTransformer, from (B, 3, S, S) to (B, 1 + h*w, c).

    Args:
        visual: The tower of open_clip. Its layers keep their names.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.conv1 = cast(nn.Module, visual.conv1)
        self.class_embedding = cast(nn.Parameter, visual.class_embedding)
        self.positional_embedding = cast(nn.Parameter, visual.positional_embedding)
        self.ln_pre = cast(nn.Module, visual.ln_pre)
        self.transformer = cast(nn.Module, visual.transformer)
        self.native_grid = cast(tuple[int, int], tuple(visual.grid_size))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Runs all blocks. If the grid differs from the native one, positions are resized as in open_clip.

        Raises:
            ConfigError: If the images are not square. Their grid could not be inferred from the tokens.
        """
        x = self.conv1(images)
        grid = (x.shape[-2], x.shape[-1])
        if grid[0] != grid[1]:
            raise ConfigError(f"images yield a grid of {grid[0]} x {grid[1]} patches; ViT towers need square images")
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        positions = resize_positions(self.positional_embedding, self.native_grid, grid, antialias=True)
        x = x + positions.to(x.dtype)
        return cast(Tensor, self.transformer(self.ln_pre(x)))


def split_tower(visual: nn.Module) -> tuple[nn.Module, Pool]:
    """Splits an open_clip image tower into (layers below the pool, dense pool), which share its parameters.

    Raises:
        ConfigError: If the tower has no local features (see :func:`dense_pool`).
    """
    pool = dense_pool(visual)
    if isinstance(pool, ResNetPool):
        layers = OrderedDict((name, cast(nn.Module, getattr(visual, name))) for name in RESNET_LAYERS)
        return nn.Sequential(layers), pool
    if isinstance(pool, TimmPool):
        return cast(nn.Module, visual.trunk), pool
    return ViTTower(visual), pool


class _Tracer(torch.fx.Tracer):
    """A tracer that treats batch norms as leaf modules, including those of timm that contain an activation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(tower: nn.Module) -> None:
    """Folds each frozen batch norm into the preceding convolution if no other module uses that convolution's output.

    If the tower cannot be traced, it is left unchanged.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in tower.modules()):
        return
    try:
        graph = _Tracer().trace(tower)
    except Exception:  # tracing runs the tower's own code, which can raise any exception
        warnings.warn(
            f"The batch norms of {type(tower).__name__} cannot be folded, so the tower is slightly slower.",
            stacklevel=3,
        )
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    for node in calls:
        source = node.args[0]
        if source not in calls or len(source.users) > 1 or max(times[node.target], times[source.target]) > 1:
            continue
        norm, convolution = tower.get_submodule(node.target), tower.get_submodule(source.target)
        if isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            tower.set_submodule(source.target, fuse_conv_bn_eval(convolution, norm))
            tower.set_submodule(node.target, cast(nn.Module, getattr(norm, "act", nn.Identity())))


@torch.no_grad()
def fold_quick_gelus(tower: nn.Module) -> None:
    """Replaces QuickGELU, ``x sigmoid(1.702 x)``, by SiLU, ``x sigmoid(x)``, in each feed-forward network of open_clip.

    The layer before it is multiplied by 1.702, and the layer after it is divided by 1.702. Both are changed in place.
    """
    for module in tower.modules():
        if isinstance(getattr(module, "gelu", None), QuickGELU):
            before, after = cast(nn.Linear, module.c_fc), cast(nn.Linear, module.c_proj)
            before.weight.mul_(1.702)
            before.bias.mul_(1.702)
            after.weight.div_(1.702)
            module.gelu = nn.SiLU()
