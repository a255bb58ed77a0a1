"""Detection of nearly identical images, such as copies of different size, with features of a frozen CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.plain_view import PlainView
from cbsa_lightning.errors import DataError

SIMILARITY = 0.85
"""Minimum cosine of the centered features of near duplicates."""

_BATCH = 32
_BLOCK = 1024  # number of images that are compared with all others at a time


class Similar(NamedTuple):
    """Result of :func:`near_duplicates`.

    Attributes:
        pairs: Tuples (earlier position, position, similarity) in descending order of similarity.
        unread: Mapping from the position of an unreadable image to the reason.
    """

    pairs: list[tuple[int, int, float]]
    unread: dict[int, str]


def near_duplicates(files: Sequence[Path], clip: FrozenCLIP) -> Similar:
    """Compares all images with each other.

    The mean over the images is subtracted from the features. One threshold then works for all towers and data sets,
    even if the features of all images have a large component in common.

    Args:
        files: The n image files.
        clip: CLIP model that computes the features, which need 4 n d bytes.

    Returns:
        Pairs of an image and the most similar earlier image if their similarity is at least :data:`SIMILARITY`.
    """
    features, unread = _features(files, clip)
    read = np.array([i for i in range(len(files)) if i not in unread], dtype=np.int64)
    centered = features[torch.from_numpy(read)]
    centered = normalize(centered - centered.mean(dim=0), dim=1)
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(read), _BLOCK):
        end = min(start + _BLOCK, len(read))
        cosines = centered[start:end] @ centered[:end].T
        cosines.masked_fill_(
            torch.ones_like(cosines, dtype=torch.bool).triu(start), -1
        )  # exclude the image itself and later ones
        best, earlier = cosines.max(dim=1)
        for k in torch.nonzero(best >= SIMILARITY)[:, 0].tolist():
            pairs.append((int(read[earlier[k]]), int(read[start + k]), float(best[k])))
    return Similar(sorted(pairs, key=lambda pair: -pair[2]), unread)


@torch.no_grad()
def _features(files: Sequence[Path], clip: FrozenCLIP) -> tuple[Tensor, dict[int, str]]:
    """Computes global features (n, d), which are 0 for unreadable images. Also returns the reasons for these."""
    view, unread = PlainView(clip.image_size), dict[int, str]()
    features = torch.zeros(len(files), clip.embed_dim)

    def read(i: int) -> Tensor | None:
        try:
            return view(decode(files[i], at_least=clip.image_size))
        except DataError as error:
            unread[i] = str(error)
            return None

    with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc="Features", leave=False, delay=1) as bar:
        for start in range(0, len(files), _BATCH):
            rows = range(start, min(start + _BATCH, len(files)))
            found = {i: image for i, image in zip(rows, pool.map(read, rows), strict=True) if image is not None}
            if found:
                features[list(found)] = clip.image_tokens(torch.stack(list(found.values()))).g.float()
            bar.update(len(rows))
    return features, unread
