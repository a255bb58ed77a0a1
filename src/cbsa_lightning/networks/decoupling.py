"""Semantic decoupling: attention over the places of a map, guided by the vectors of the class names.

Source: "Learning Semantic-Specific Graph Representation for Multi-Label Image Recognition" (SSGRL; Chen et al., ICCV
2019), repository HCPLab-SYSU/SSGRL.

A place with feature f and a class with word vector w have the score ``a . W tanh(U f * V w)``, where ``*`` is the
element-wise product. To compute the scores, the released code stores several tensors ``(B, H, W, C, m)``, and tensors
``(B, H, W, C, D)`` for the attended features. The implementation below differs as follows:

- The two linear maps after tanh are combined into one vector, ``u = W^T a``. A dot product thus replaces an m x m
  product for every place and class. The biases after tanh are omitted, since softmax is invariant to them.
- ``u . tanh(x * y)`` is computed for a few classes at a time, and is recomputed in the backward pass.
- The attended features are computed as one matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_AT_ONCE = {"cpu": 1 << 18}  # entries of tanh per step; they fit into the cache of a CPU
_ELSEWHERE = 1 << 25


class SemanticDecoupling(nn.Module):
    """Computes one image feature per class, the mean of a map weighted by the attention of the class.

    Args:
        num_features: D, the number of channels of the map.
        word_dim: Size of a word vector.
        width: m, the size of the space that features and word vectors are projected to.
    """

    def __init__(self, num_features: int, word_dim: int, width: int) -> None:
        super().__init__()
        self.image = nn.Linear(num_features, width, bias=False)
        self.word = nn.Linear(word_dim, width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the features of a batch and their attention.

        Args:
            features: Map ``(B, D, h, w)``.
            words: Word vectors ``(C, word_dim)``.

        Returns:
            Features ``(B, C, D)``, and the attention ``(B, C, h * w)``, whose rows sum to 1.
        """
        places = features.flatten(2).transpose(1, 2)
        # One vector replaces two layers. Both layers remain parameters, so that they are trained as in the original.
        u = (self.score.weight @ self.mix.weight)[0]
        scores = gated_scores(self.image(places), self.word(words), u)
        attention = scores.transpose(1, 2).softmax(-1)
        return attention.to(places.dtype) @ places, attention


def gated_scores(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Returns scores ``sum_i u_i tanh(x_i y_i)`` ``(B, R, C)`` of places ``x (B, R, m)`` and classes ``y (C, m)``."""
    if torch.compiler.is_exporting():  # the steps of _GatedScores depend on the batch size, which a graph must not fix
        return torch.stack([(x * word).tanh() @ u for word in y], -1)
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = _GatedScores.apply(x.float(), y.float(), u.float())
    return found


class _GatedScores(torch.autograd.Function):
    """Stores the products of only a few classes at a time and recomputes them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, u)
        scores = x.new_empty(*x.shape[:2], len(y))
        for rows, some in _parts(x, y):
            scores[rows, :, some] = _products(x[rows], y[some]).tanh_() @ u
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, u = ctx.saved_tensors
        (gradient,) = gradients
        dx, dy, du = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(u)
        for rows, some in _parts(x, y):
            g = gradient[rows, :, some]
            t = _products(x[rows], y[some]).tanh_()
            du += g.reshape(-1) @ t.view(-1, len(u))
            slope = t.square_().neg_().add_(1).mul_(g[..., None])  # lacks the factor u, which all entries share
            dx[rows] += torch.einsum("brcm,cm->brm", slope, y[some])
            dy[some] += torch.einsum("brcm,brm->cm", slope, x[rows])
        return dx * u, dy * u, du


def _products(x: Tensor, y: Tensor) -> Tensor:
    return x[:, :, None] * y


def _parts(x: Tensor, y: Tensor) -> list[tuple[slice, slice]]:
    """Returns the slices of images and classes that are processed together."""
    room = _AT_ONCE.get(x.device.type, _ELSEWHERE)
    of_class = x[0].numel()
    classes = max(1, min(len(y), room // max(of_class, 1)))
    images = max(1, min(len(x), room // max(of_class * classes, 1)))
    return [
        (slice(i, i + images), slice(k, k + classes))
        for i in range(0, len(x), images)
        for k in range(0, len(y), classes)
    ]
