"""Maps that show where an image shows each label: Grad-CAM (Fig. 7), attention and value-path similarity.

Grad-CAM (Selvaraju et al., 2017; reference [29] of the paper) weights the channels of a feature map with the mean
gradient of a class logit over the places. Here, the feature map is the output of the frozen image tower, and the
gradient passes through the attention pool and the label decoder. Common packages attach hooks to a layer and
differentiate one output at a time from the pixels. The frozen map, however, is already the input of the trained part,
so a gradient with respect to this input suffices, and one forward pass serves all classes. The computation is therefore
implemented here, without a further dependency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbsa_lightning.errors import DataError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.feature_batches import feature_batches
from cbsa_lightning.networks.base import Network
from cbsa_lightning.networks.prompted import PromptedCLIP, cosines


class LabelMaps(NamedTuple):
    """Maps of m classes of each of n images over the grid of the image tower; all values are at least 0.

    Attributes:
        grad_cam: ``(n, m, h, w)``, positive part of the weighted feature map; not normalized.
        attention: ``(n, m, h, w)``, attention of the label decoder, which sums to 1; None without a decoder.
        similarity: ``(n, m, h, w)``, see :func:`similarity_maps`, with CLIP's text features of "a photo of a ...".
    """

    grad_cam: Tensor
    attention: Tensor | None
    similarity: Tensor


def label_maps(classifier: Classifier, images: Sequence[Any], classes: Tensor, batch_size: int = 64) -> LabelMaps:
    """Computes all maps of chosen classes of images.

    Grad-CAM uses the logits of the network alone; a stack that is fused with them does not depend on places.

    Args:
        classifier: Classifier with a network on a frozen CLIP.
        images: The n images; see :data:`~cbsa_lightning.inference.classifier.Images`.
        classes: ``(n, m)`` int64, the classes of each image.
        batch_size: Number of images per forward pass.

    Returns:
        The maps, float32 on the CPU.

    Raises:
        DataError: If the network has no frozen feature map, there are no images, or an image cannot be read.
    """
    if classes.ndim != 2 or len(classes) != len(images) or not len(images):
        raise DataError(f"{len(images)} images do not fit classes {tuple(classes.shape)}; pass one row per image.")
    network = _check(classifier.network)
    texts = network.zero_shot_text()
    cams, attentions, similarities = [], [], []
    for rows, features in feature_batches(classifier, images, batch_size, "Maps"):
        chosen = classes[rows].to(features.device)
        cam, attention = _grad_cam_and_attention(network, features, classifier.text, chosen)
        cams.append(cam.float().cpu())
        if attention is not None:
            attentions.append(_of(attention, chosen).float().cpu())
        similarities.append(_of(similarity_maps(network, features, texts), chosen).cpu())
    return LabelMaps(torch.cat(cams), torch.cat(attentions) if attentions else None, torch.cat(similarities))


def grad_cam(network: Network, features: Tensor, text: Any, classes: Tensor) -> Tensor:
    """Computes Grad-CAM maps with respect to the frozen feature map.

    Args:
        network: Network in evaluation mode.
        features: ``(B, D, h, w)`` or tokens ``(B, 1 + h * w, D)`` of a ViT, from ``network.features``.
        text: Output of ``network.encode_text``, without gradients.
        classes: ``(B, m)`` int64, the classes of each image.

    Returns:
        ``(B, m, h, w)``, at least 0. A map is 0 everywhere if no place raises the logit.

    Raises:
        DataError: If the network has no frozen feature map.
    """
    return _grad_cam_and_attention(_check(network), features, text, classes)[0]


@torch.no_grad()
def similarity_maps(network: Network, features: Tensor, texts: Tensor) -> Tensor:
    """Computes the similarity of each place with each class, from the value path of CLIP's attention pool.

    The similarity is the cosine of the value-path token of the place with the text feature of the class, minus its mean
    over the places; negative values are set to 0.

    Args:
        network: Network in evaluation mode.
        features: Output of ``network.features``.
        texts: ``(C, d)``, text features of the classes, such as those of ``network.zero_shot_text``.

    Returns:
        ``(B, C, h, w)`` float32, at least 0.

    Raises:
        DataError: If the network has no CLIP.
    """
    tokens = _check(network).clip.pool.values(features)
    found = cosines(tokens.l, texts)
    maps = (found - found.mean(1, keepdim=True)).relu().transpose(1, 2)
    return maps.reshape(*maps.shape[:2], *tokens.grid)


def _grad_cam_and_attention(
    network: PromptedCLIP, features: Tensor, text: Any, classes: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Computes :func:`grad_cam`, and the attention ``(B, C, h, w)`` of all classes, in one forward pass."""
    maps = []
    with torch.enable_grad():
        leaf = features.detach().requires_grad_()
        output = network(leaf, text, attention=True)
        for column in classes.T:
            # Images do not affect each other's logits, so the gradient of the sum contains the gradient of each image.
            total = output.logits.gather(1, column[:, None]).sum()
            (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
            weights = _map(gradient).mean((2, 3), keepdim=True)
            maps.append((weights * _map(leaf.detach())).sum(1).relu())
    return torch.stack(maps, 1), None if output.attention is None else output.attention.detach()


def _check(network: Network) -> PromptedCLIP:
    if not isinstance(network, PromptedCLIP):
        raise DataError(
            f"{type(network).__name__} has no frozen feature map, which Grad-CAM and the value path need. Use a "
            "network on a frozen CLIP, such as CBSA."
        )
    return network


def _map(features: Tensor) -> Tensor:
    """Returns features as a map ``(B, D, h, w)``; the class token of a ViT has no place and is omitted."""
    if features.ndim == 4:
        return features
    side = math.isqrt(features.shape[1] - 1)
    return features[:, 1:].transpose(1, 2).reshape(len(features), -1, side, side)


def _of(maps: Tensor, classes: Tensor) -> Tensor:
    """Selects ``classes (B, m)`` of maps ``(B, C, h, w)``."""
    return maps.gather(1, classes[..., None, None].expand(*classes.shape, *maps.shape[2:]))
