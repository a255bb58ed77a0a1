"""Classifier, which labels images with a trained checkpoint. It needs torch, but not Lightning."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cbsa_lightning.arguments import check_kind, check_names, check_number
from cbsa_lightning.checkpoints.files import SOURCE, read_checkpoint
from cbsa_lightning.checkpoints.lean import FUSION, LeanCheckpoint
from cbsa_lightning.checkpoints.portable import read_portable
from cbsa_lightning.data.class_names import default_prompts
from cbsa_lightning.data.images import as_rgb, decode
from cbsa_lightning.data.plain_view import PlainView
from cbsa_lightning.errors import CBSAError, CheckpointError, ConfigError, DataError, WeightsError, listed
from cbsa_lightning.inference.hub import download
from cbsa_lightning.inference.stored_network import stored_network
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.finite import refuse_scores
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.networks.base import Network, NetworkOutput
from cbsa_lightning.networks.cbsa import SETTINGS, CBSANetwork
from cbsa_lightning.networks.prompted import PromptedCLIP

Images = Iterable[str | os.PathLike[str] | Image.Image | np.ndarray | Tensor] | Tensor
"""Images as an iterable (for example, a list, a generator or a pandas column) or as one uint8 tensor ``(n, 3, H, W)``.

An iterable may mix files, Pillow images, uint8 arrays (gray ``(H, W)``, RGB or RGBA ``(H, W, 3 or 4)``) and uint8
tensors ``(3, H, W)``.
"""


class Prediction(NamedTuple):
    """Prediction for an image.

    Attributes:
        labels: Names of the classes whose score is at or above their threshold.
        scores: Score of each class, in [0, 1].
    """

    labels: tuple[str, ...]
    scores: dict[str, float]


class Classifier:
    """Labels images with a trained network.

    Args:
        network: Network with its weights. It is switched to evaluation mode.
        class_names: The C class names.
        thresholds: ``(C,)``, decision threshold of each class.
        image_size: Side length in pixels of the square that images are resized to, as in training.
        device: Device for the computation.
        fusion: The stack to fuse with the network's scores, and a module that computes its inputs from images.

    Attributes:
        text: The network's text features of the classes.
        calibrated: Whether scores are calibrated probabilities.
    """

    def __init__(
        self,
        network: Network,
        class_names: Sequence[str],
        thresholds: Tensor,
        image_size: int,
        device: str | torch.device = "cpu",
        fusion: tuple[Fusion, nn.Module] | None = None,
    ) -> None:
        check_kind("network", network, nn.Module, "a network; Classifier.load(PATH) reads a checkpoint")
        check_kind("thresholds", thresholds, Tensor, "a tensor with one threshold for each class name")
        check_number("image_size", image_size, 1, whole=True)
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.class_names = tuple(check_names("class_names", class_names))
        if tuple(thresholds.shape) != (len(self.class_names),):
            raise ConfigError(f"thresholds have the shape {tuple(thresholds.shape)}; pass one threshold per class.")
        self.thresholds = thresholds.detach().float().cpu()
        self.image_size = image_size
        self.fusion = None if fusion is None else (fusion[0].to(self.device), fusion[1].to(self.device))
        self.calibrated = fusion is not None
        self._view = PlainView(image_size)
        with torch.no_grad():
            self.text = self.network.encode_text()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        image_size: int | None = None,
        clip: str | None = None,
        pretrained: str | None = None,
        network: Callable[[Sequence[str]], Network] | None = None,
    ) -> Self:
        """Loads a checkpoint and rebuilds its network with averaged weights.

        A checkpoint contains a description of its network if it was written by
        :class:`~cbsa_lightning.training.cbsa.CBSAModule`, or if `cbsa fit` trained any network of this library. For
        other checkpoints, pass ``network``. If the checkpoint was written during the warm-up, before averaging starts,
        the raw weights are used, as in the module.

        Args:
            path: The checkpoint, or a folder that was written by `cbsa export` with safetensors. No code from the file
                is run.
            device: Device for the computation.
            image_size: Side length of the views in pixels. By default, it is read from the checkpoint. If the
                checkpoint does not contain it, the native size of the towers is used.
            clip: Location of the towers if it has changed since training. Towers with other weights are rejected.
            pretrained: Location of the weights of the towers if it has changed since training.
            network: Builds another network from the prompt names, for example
                ``functools.partial(DualCoOp, clip=...)``, as in training. ``clip`` and ``pretrained`` are then ignored.

        Raises:
            CheckpointError: If the file is damaged or not a checkpoint of this library, or if it contains another
                network or other frozen weights.
            WeightsError: If the CLIP weights are not available.
        """
        needed = ("state_dict", "hyper_parameters", "class_names")
        checkpoint = read_portable(Path(path)) if os.path.isdir(path) else read_checkpoint(path, needed)
        class_names = list(checkpoint["class_names"])
        moved = {name: value for name, value in (("clip", clip), ("pretrained", pretrained)) if value}
        make = network if network is not None else _network_of(checkpoint, moved)
        try:
            built = make(list(checkpoint["hyper_parameters"].get("prompt_names") or default_prompts(class_names)))
        except WeightsError:  # its message lists the locations that were searched
            raise
        except CBSAError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # an invalid setting can fail anywhere
            if network is not None:  # the error comes from the caller's function
                raise
            raise CheckpointError(
                f"{path}: the network cannot be built from its settings ({error}). The settings were changed or belong "
                "to another version."
            ) from error
        trained = _Trained(built, class_names)
        towers = getattr(built, "clip", None)
        # The describer must be built before the trained attention pool replaces CLIP's own.
        describe = built.describer(keep=True) if FUSION in checkpoint and isinstance(built, PromptedCLIP) else None
        trained.on_load_checkpoint(checkpoint)
        trained.load_state_dict(trained.part_of(checkpoint["state_dict"]))
        size = image_size or checkpoint.get("image_size") or getattr(towers, "image_size", None)
        if size is None:
            raise CheckpointError(f"{path} has no image size. Pass image_size.")
        # During the warm-up, the scale of the network's logits is unknown, so scores are not fused, as in the module.
        ready = trained.fusion is not None and trained.fusion.ready
        fusion = (trained.fusion, describe) if ready and trained.fusion and describe else None
        return cls(trained.averaged(), class_names, trained.thresholds(), size, device, fusion)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        device: str | torch.device = "cpu",
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads a model that was uploaded to the Hugging Face Hub by `cbsa export --push_to`.

        Args:
            repo_id: Name of the repository, such as "user/model".
            device: Device for the computation.
            revision: Branch, tag or commit. If None, the default branch is used.
            cache_dir: Folder for downloaded files. The default is that of huggingface_hub.
            token: Access token for private repositories. The default is the token that `hf auth login` has stored.
            **options: Options of :meth:`load`.

        Raises:
            CheckpointError: If the repository is not available or does not contain an exported model, or if
                :meth:`load` rejects the model.
            WeightsError: If the CLIP weights are not available.
        """
        return cls.load(download(repo_id, revision, cache_dir, token), device, **options)

    def __call__(self, images: Images, batch_size: int = 64) -> list[Prediction]:
        """Predicts labels and scores of images, in the given order.

        Args:
            images: See :data:`Images`. They are resized to the training size, as in validation.
            batch_size: Number of images per forward pass.

        Raises:
            DataError: If an image cannot be read or has the wrong format; the message names it.
        """
        scores = self.scores(images, batch_size)
        given = scores >= self.thresholds
        return [
            Prediction(
                tuple(name for name, has in zip(self.class_names, row, strict=True) if has),
                dict(zip(self.class_names, values, strict=True)),
            )
            for row, values in zip(given.tolist(), scores.tolist(), strict=True)
        ]

    def scores(self, images: Images, batch_size: int = 64) -> Tensor:
        """Returns scores ``(n, C)`` in [0, 1], float32 on the CPU; see :meth:`__call__`."""
        parts = [output.logits.float().sigmoid().cpu() for output in self._outputs(images, batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.class_names))

    def attention(self, images: Images, batch_size: int = 64) -> Tensor:
        """Returns attention maps of all classes, ``(n, C, h, w)``, each summing to 1; see :meth:`__call__`.

        Raises:
            DataError: If there are no images, or the network has no attention.
        """
        maps = [output.attention for output in self._outputs(images, batch_size, attention=True)]
        if not maps or any(part is None for part in maps):
            raise DataError(
                "There are no attention maps: "
                + ("no images were given." if not maps else "the network has no decoder.")
            )
        return torch.cat([part.float().cpu() for part in maps if part is not None])

    def _outputs(self, images: Images, batch_size: int, **options: Any) -> Iterator[NetworkOutput]:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; use 1 or more.")
        start, rest = 0, iter(_each(images))  # not by index, which pandas treats as a label
        while batch := list(islice(rest, batch_size)):
            views = [self.view(image, start + i) for i, image in enumerate(batch)]
            names = [_name(image, start + i) for i, image in enumerate(batch)]
            with torch.no_grad():
                output = self._output_of(self.network.features(torch.stack(views).to(self.device)), **options)
                refuse_scores(output.logits, names.__getitem__, "Scores")
                yield output
            start += len(batch)

    def to(self, device: str | torch.device) -> Self:
        """Moves the classifier to a device."""
        self.device = torch.device(device)
        self.network = self.network.to(self.device)
        if self.fusion is not None:
            self.fusion = (self.fusion[0].to(self.device), self.fusion[1].to(self.device))
        with torch.no_grad():
            self.text = self.network.encode_text()
        return self

    def logits_of(self, features: Tensor) -> Tensor:
        """Returns final logits ``(B, C)`` from frozen features of a network with the same towers."""
        with torch.no_grad():
            logits: Tensor = self._output_of(features).logits
        return logits

    def _output_of(self, features: Tensor, **options: Any) -> NetworkOutput:
        output: NetworkOutput = self.network(features, self.text, **options)
        if self.fusion is None:
            return output
        fusion, describe = self.fusion
        stack = fusion.stack_logits(describe(features))
        return output._replace(logits=fusion.fused(output.logits, stack))

    def view(self, image: Any, position: int = 0) -> Tensor:
        """Returns the input of the network for one image, ``(3, S, S)`` uint8.

        Args:
            image: One of :data:`Images`.
            position: Position of the image, for error messages.

        Raises:
            DataError: If the image cannot be read or has the wrong format.
        """
        if isinstance(image, (str, os.PathLike)):
            return self._view(decode(image))
        try:
            if isinstance(image, Tensor):
                if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
                    raise DataError(f"a tensor must be (3, H, W) uint8, got {image.dtype} {tuple(image.shape)}.")
                if image.shape[1:] == (self.image_size, self.image_size):
                    return image.cpu()
                image = image.permute(1, 2, 0).cpu().numpy()
            elif not isinstance(image, (Image.Image, np.ndarray)):
                raise DataError(f"a {type(image).__name__} is not an image; pass a path, a Pillow image or an array.")
            return self._view(as_rgb(image))
        except DataError as error:
            raise DataError(f"image {position}: {error}") from None


class _Trained(LeanCheckpoint):
    """The part of a module's state that predictions depend on; it is loaded and checked as in the module."""

    cut: Tensor

    def __init__(self, network: Any, class_names: list[str]) -> None:
        super().__init__()
        self.network = network
        self.class_names = class_names
        self.ema = ParameterEMA(network, decay=1.0)
        self.register_buffer("cut", torch.full((len(class_names),), float("nan")))

    @staticmethod
    def part_of(state: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in state.items() if k.startswith(("network.", "ema.")) or k == "cut"}

    def averaged(self) -> Any:
        with self.ema.applied_to(self.network):
            state = self.network.state_dict()
            weights = {name: state[name].clone() for name in self.ema.names}
        self.network.load_state_dict(weights, strict=False)
        return self.network

    def thresholds(self) -> Tensor:
        return torch.where(self.cut.isnan(), torch.full_like(self.cut, 0.5), self.cut)


def _each(images: Images) -> Iterable[Any]:
    """Iterates over the images.

    Raises:
        DataError: If the input is a single image, a mapping or a table.
    """
    single = isinstance(images, (str, os.PathLike, Image.Image)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.dtype != object and images.ndim in (2, 3)
    )
    if single or not isinstance(images, Iterable):
        raise DataError(f"Pass a list of images, even for a single one; got {type(images).__name__}.")
    if isinstance(images, Mapping) or hasattr(images, "columns"):
        raise DataError(f"A {type(images).__name__} is not a list of images; pass its values or one column.")
    return images


def _name(image: Any, position: int) -> str:
    return str(image) if isinstance(image, (str, os.PathLike)) else f"image {position}"


def _network_of(checkpoint: Mapping[str, Any], moved: Mapping[str, Any]) -> Callable[[Sequence[str]], Network]:
    """Returns a function that builds the network of a checkpoint written by a CBSAModule or by `cbsa fit`."""
    source = checkpoint[SOURCE]
    if not SETTINGS.keys() & checkpoint["hyper_parameters"].keys():
        return stored_network(checkpoint, **moved)
    stored = {"decoder": None, **checkpoint["hyper_parameters"]}  # earlier checkpoints lack this setting
    lacking = [f"setting {name}" for name in SETTINGS if name not in stored]
    if lacking:
        raise CheckpointError(
            f"{source} is not the checkpoint of a CBSAModule: it has no {listed(lacking)}. For another network, "
            "specify how to build it: Classifier.load(path, network=...)."
        )
    for name, default in SETTINGS.items():
        if name == "decoder" and stored[name] is not None:
            raise CheckpointError(
                f"{source} uses a custom decoder, {stored[name]!s:.200}. Specify how to build the network: "
                "Classifier.load(path, network=...)."
            )
        if type(default) is int and type(stored[name]) is not int:
            raise CheckpointError(f"{source}: setting {name} must be a whole number, found {stored[name]!r:.100}.")
    return partial(CBSANetwork, **{**{name: stored[name] for name in SETTINGS}, **moved})
