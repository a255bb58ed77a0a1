"""Initialization with the weights of an earlier run, whose classes may differ; see ``cbsa fit --init_from``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbsa_lightning.checkpoints.files import SOURCE
from cbsa_lightning.checkpoints.lean import FINGERPRINT, NETWORK
from cbsa_lightning.errors import CheckpointError, listed
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.finite import not_finite
from cbsa_lightning.networks.base import Network
from cbsa_lightning.networks.compiled import class_of

REMEDY = "Train with the model settings in the config.yaml of the earlier run, or remove --init_from"


class Earlier(NamedTuple):
    """The parts of a checkpoint from which a new run is initialized.

    Attributes:
        source: Name of the file for messages.
        class_names: The C classes of the checkpoint.
        weights: State of the network with averaged weights, by parameter name and without frozen weights.
        partition: ``(C,)``, the context of each class; -1 if there is none.
        network: Name of the network's class; None if the checkpoint does not contain it.
        fingerprint: Fingerprint of the frozen weights; None if there are none.
        image_size: Side length of the images in pixels; None if the checkpoint does not contain it.
    """

    source: str
    class_names: list[str]
    weights: dict[str, Tensor]
    partition: Tensor
    network: str | None
    fingerprint: str | None
    image_size: int | None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Earlier:
        """Reads the averaged weights of a checkpoint, or the raw weights if the average has not started.

        Raises:
            CheckpointError: If weights are missing, are not tensors, or are not finite.
        """
        state, source = checkpoint["state_dict"], str(checkpoint[SOURCE])
        weights = {name.removeprefix("network."): w for name, w in state.items() if name.startswith("network.")}
        if bool(state.get("ema.started", False)):
            averages = {name: state.get(f"ema.{ParameterEMA.key(name)}") for name in weights}
            weights.update({name: average for name, average in averages.items() if average is not None})
        names, partition = list(checkpoint["class_names"]), state.get("context_partition")
        if not isinstance(partition, Tensor) or partition.shape != (len(names),):
            raise CheckpointError(f"{source}: the context_partition does not fit the classes. Use another checkpoint.")
        if wrong := [name for name, weight in weights.items() if not isinstance(weight, Tensor)]:
            raise CheckpointError(f"{source}: {listed(wrong, 5)} are not tensors. Use another checkpoint.")
        if broken := not_finite(weights):
            raise CheckpointError(
                f"{source} has weights that are not finite: {listed(broken, 5)}. Use another checkpoint."
            )
        about = (checkpoint.get(key) for key in (NETWORK, FINGERPRINT, "image_size"))
        return cls(source, names, weights, partition, *about)


def check_fits(earlier: Earlier, network: Network, own: Mapping[str, Tensor], class_names: Sequence[str]) -> None:
    """Checks that the weights of a checkpoint fit a network that may have other classes.

    Args:
        earlier: The checkpoint.
        network: The network of the new run.
        own: The network's state without frozen weights, by name.
        class_names: The network's classes.

    Raises:
        CheckpointError: If the type of the network, the frozen weights or the settings differ. The message states
            the values of the checkpoint and of this run.
    """
    source = earlier.source
    if earlier.network not in (None, class_of(network)):
        raise CheckpointError(f"{source} is from a {earlier.network}; this run trains a {class_of(network)}. {REMEDY}.")
    clip = getattr(network, "clip", None)
    here = None if clip is None else clip.fingerprint
    if earlier.fingerprint != here:
        raise CheckpointError(
            f"{source} was trained with the frozen weights {_short(earlier.fingerprint)}; this run has "
            f"{_short(here)}. Use the same CLIP model and weights (model.clip, model.pretrained), or remove "
            "--init_from."
        )
    by_class = network.class_tensors()
    if by_class is None and earlier.class_names != list(class_names):
        raise CheckpointError(
            f"{source} has the classes {listed(earlier.class_names)}, this run has {listed(class_names)}, and "
            f"{class_of(network)} does not define which of its weights belong to a class (class_tensors). Use the same "
            "classes, or remove --init_from."
        )
    if problems := list(_differences(earlier, network, own)):
        raise CheckpointError(f"The weights of {source} do not fit this run: {listed(problems, 5)}. {REMEDY}.")


def _differences(earlier: Earlier, network: Network, own: Mapping[str, Tensor]) -> Iterator[str]:
    by_class = network.class_tensors() or set()
    contexts = set(network.context_tensors)
    there = earlier.weights.keys() - contexts
    here = own.keys() - contexts
    yield from (f"{name} is missing from the checkpoint" for name in sorted(here - there))
    yield from (f"{name} is missing from this run" for name in sorted(there - here))
    for name in sorted(here & there):
        old, new = earlier.weights[name].shape, own[name].shape
        if name in by_class and len(old) > 0 and old[0] == len(earlier.class_names):
            old, new = old[1:], new[1:]  # rows of classes are matched by name
        if old != new:
            yield (
                f"{name} is {tuple(earlier.weights[name].shape)} in the checkpoint "
                f"and {tuple(own[name].shape)} in this run"
            ) + (_of_prompts(earlier.weights[name], own[name]) if name.endswith("words") else "")


def _of_prompts(there: Tensor, here: Tensor) -> str:
    if there.ndim != here.ndim or there.ndim < 2:
        return " (model.shared_prompts differs)"
    return f" (model.prompt_length is {there.shape[-2]} in the checkpoint and {here.shape[-2]} in this run)"


@torch.no_grad()
def take_over(
    earlier: Earlier, network: Network, own: Mapping[str, Tensor], class_names: Sequence[str], partition: Tensor
) -> str:
    """Copies the weights of an earlier run into a network that :func:`check_fits` has accepted.

    Rows of class-specific weights are matched by class name; rows of new classes keep their initial values. The context
    head is copied if the classes and their partition are the same, even if the ids of the contexts differ.

    Args:
        earlier: The checkpoint.
        network: The network of the new run.
        own: The network's state without frozen weights, by name; it shares memory with the network.
        class_names: The network's C classes.
        partition: ``(C,)``, the context of each class in the new run; -1 if there is none.

    Returns:
        A message that states which weights were copied and which were not.
    """
    by_class, contexts = network.class_tensors() or set(), set(network.context_tensors)
    rows = {name: row for row, name in enumerate(earlier.class_names)}
    common = [k for k, name in enumerate(class_names) if name in rows]
    from_rows = [rows[class_names[k]] for k in common]
    for name in own.keys() - contexts:
        if name in by_class:
            own[name][common] = earlier.weights[name][from_rows].to(own[name])
        else:
            own[name].copy_(earlier.weights[name])
    reused = f"the weights of {len(common)} classes" if by_class else "all weights (none of them is class-specific)"
    dropped_head = ""
    heads = [name for name in network.context_tensors if name in own]
    if heads:
        there = earlier.weights.get(heads[0])
        same_number = there is not None and there.shape == own[heads[0]].shape
        order = _same_contexts(earlier, class_names, partition, len(own[heads[0]])) if same_number else None
        if order is not None:
            for name in heads:
                own[name].copy_(earlier.weights[name][order])
            reused += " and the context head"
        else:
            dropped_head = "Not reused: the context head, because the partition of the classes differs."
    new = [name for name in class_names if name not in rows]
    gone = [name for name in earlier.class_names if name not in set(class_names)]
    told = [f"Training starts from the averaged weights of {earlier.source}.", f"Reused: {reused}.", dropped_head]
    told += [f"New classes, which start from initial weights: {listed(new)}."] if new else []
    told += [f"Removed classes: {listed(gone)}."] if gone else []
    return " ".join(filter(None, told))


def _same_contexts(
    earlier: Earlier, class_names: Sequence[str], partition: Tensor, num_contexts: int
) -> list[int] | None:
    """Returns the earlier id of each of the K contexts, or None if the classes, K or the partitions differ."""
    if set(earlier.class_names) != set(class_names) or bool((partition < 0).any()):
        return None
    before = dict(zip(earlier.class_names, earlier.partition.tolist(), strict=True))
    pairs = {(now, before[name]) for name, now in zip(class_names, partition.tolist(), strict=True)}
    order = dict(pairs)
    same = len(pairs) == len(order) == len(set(order.values())) and sorted(order) == list(range(num_contexts))
    return [order[k] for k in range(num_contexts)] if same and sorted(order.values()) == sorted(order) else None


def _short(fingerprint: Any) -> str:
    return "none" if fingerprint is None else f"sha256 {str(fingerprint)[:12]}..."
