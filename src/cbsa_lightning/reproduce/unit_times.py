"""Measures the duration of each part of a run on this machine: views, the frozen tower, a training step, scoring.

``python -m cbsa_lightning.reproduce.unit_times`` reads a :class:`~cbsa_lightning.data.checks.run_time.Request` as YAML
and prints :class:`~cbsa_lightning.data.checks.run_time.Units` as JSON. `cbsa check --time` starts it. The weights are
random, which costs the same and needs no download. The caches of the run are not modified.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from cbsa_lightning.cli.lightning_cli import CBSACLI, make_cli
from cbsa_lightning.data.checks.run_time import Request, Units
from cbsa_lightning.data.image_check import unreadable
from cbsa_lightning.data.images import ImageFiles
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.data.views import PlainView, StrongView
from cbsa_lightning.errors import CBSAError, DataError
from cbsa_lightning.method.labelers import EvidenceLabeler
from cbsa_lightning.reproduce.cost import Clock, quiet_trainer, random_batch, settle, train_on, with_random_weights

_VIEWS = 64
"""Batch size for timing the frozen tower, similar to the one used to fill a feature cache."""


def unit_times(request: Request) -> Units:
    """Measures the parts of a run.

    Args:
        request: The run, the images to read, and the batch sizes of a step.

    Raises:
        CBSAError: If the configuration cannot be built or an image cannot be read.
    """
    cli = _built(request.recipe)
    module, data = cli.model, cli.datamodule
    frozen, warmup_epochs = module.network.frozen_weights is not None, module.warmup_epochs
    cached = frozen and data.feature_cache is not None
    strong_views = data.feature_cache.strong_views if cached and module.trains else 0
    loading = _loading(data, request.rows)
    features, tower, head = _without_gradient(cli, _repeated(loading.views, _VIEWS))
    views = features.to("cpu", torch.float16) if strong_views else loading.views
    step = {}
    for size in set(request.sizes) if module.trains else ():
        clock = Clock(request.steps)
        train_on(cli, random_batch(cli, _repeated(views, size)), clock)
        step[size] = clock.seconds / request.steps
    evidence = isinstance(module.labeler, EvidenceLabeler)
    return Units(
        trains=module.trains,
        frozen=frozen,
        cached=cached,
        strong_views=strong_views,
        evidence=evidence,
        labels_once=evidence and not module.num_contexts,
        warmup_epochs=warmup_epochs,
        max_epochs=-1 if cli.trainer.max_epochs is None else cli.trainer.max_epochs,
        validated_every=cli.trainer.check_val_every_n_epoch or 1,
        loaders=max(1, min(data.num_workers, os.cpu_count() or 1)),
        overlaps=features.device.type != "cpu" and data.num_workers > 0,
        images=len(loading.views),
        steps=request.steps,
        read=loading.read,
        plain=loading.plain,
        strong=loading.strong,
        tower=tower,
        head=head,
        step=step,
    )


def _built(recipe: dict[str, Any]) -> CBSACLI:
    """Builds module, data and Trainer of a recipe, without the image cache, which would otherwise be filled."""
    recipe = copy.deepcopy(recipe)
    recipe["data"].pop("image_cache", None)
    recipe["trainer"] = {**(recipe.get("trainer") or {}), "logger": False}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(with_random_weights(recipe)), encoding="utf-8")
        try:
            return make_cli([f"--config={file}"], run=False)
        except CBSAError as error:
            raise type(error)(str(error).replace(str(file), "The configuration")) from error


class _Loading(NamedTuple):
    """Seconds per image for decoding and for the plain and strong views, and the plain views ``(n, 3, S, S)``."""

    read: float
    plain: float
    strong: float
    views: Tensor


def _loading(data: Any, rows: list[int]) -> _Loading:
    table = data.source.train()
    chosen = np.array(rows)
    if data.on_error == "skip":
        chosen = np.setdiff1d(chosen, unreadable(table, chosen))
    if not len(chosen):
        raise DataError(
            "None of the sampled images can be read, so the duration cannot be measured. Run `cbsa check` to find "
            "unreadable images."
        )
    files = ImageFiles(table, data.image_size if data.fast_decode else None)
    arrays = [files[row] for row in chosen]
    plain, strong = PlainView(data.image_size), StrongView(data.image_size, data.seed, data.strong_view)
    views = torch.stack([plain(array) for array in arrays])

    def mean(work: Callable[[int], Any]) -> float:
        seconds, _ = _timed(lambda: [work(i) for i in range(len(arrays))])
        return seconds / len(arrays)

    return _Loading(
        mean(lambda i: files[chosen[i]]),
        mean(lambda i: plain(arrays[i])),
        mean(lambda i: strong(arrays[i], Draw(i, 0, 0))),
        views,
    )


@torch.no_grad()
def _without_gradient(cli: CBSACLI, views: Tensor) -> tuple[Tensor, float, float]:
    """Returns features of the views, and the seconds per image of the frozen tower and of scoring its features."""
    module, data, trainer = cli.model, cli.datamodule, quiet_trainer(cli)
    device = trainer.strategy.root_device
    module.to(device)

    def features() -> Tensor:
        with trainer.precision_plugin.forward_context():
            found: Tensor = module.network.features(views.to(device))
        settle(device)
        return found

    tower, found = _timed(features)
    many = _repeated(found, data.eval_batch_size)

    def score() -> None:
        with trainer.precision_plugin.forward_context():
            module.score(many)
        settle(device)

    with module.evaluating():
        head, _ = _timed(score)
    return found, tower / len(views), head / len(many)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the duration in seconds and the result of a second call; the first may load code or allocate memory."""
    work()
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def _repeated(rows: Tensor, count: int) -> Tensor:
    """Returns ``count`` rows by repeating the given ones."""
    return rows[torch.arange(count, device=rows.device) % len(rows)]


if __name__ == "__main__":
    try:
        found = asdict(unit_times(Request(**yaml.safe_load(sys.stdin))))
    except (CBSAError, MisconfigurationException) as error:
        found = {"refused": str(error)}
    print(json.dumps(found))
