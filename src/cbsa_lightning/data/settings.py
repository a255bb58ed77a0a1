"""Checks of the settings of the data module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cbsa_lightning.arguments import check_choice, check_flags, check_kind, check_number, check_paths
from cbsa_lightning.data.augmentations import Augmentation
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.readers import Source
from cbsa_lightning.errors import ConfigError

_OBJECTS = {
    "source": (Source, "a source of cbsa_lightning.data.readers, such as Table(train=FILE)"),
    "weak_view": (Augmentation, "an object such as Flip()"),
    "strong_view": (Augmentation, "an object such as CutoutRandAugment(cutout=0.25)"),
    "image_cache": (ImageCache, "ImageCache(FOLDER) of cbsa_lightning.data.caches.image_cache"),
    "feature_cache": (FeatureCache, "FeatureCache(FOLDER) of cbsa_lightning.data.caches.feature_cache"),
}
_FRACTIONS = ("labeled_fraction", "held_out_fraction", "known_fraction")
# A minimum of None means that check_batch checks small values, with a better explanation.
_BOUNDS: dict[str, tuple[int | None, int]] = {
    "image_size": (1, 1 << 13),
    "seed": (0, (1 << 32) - 1),  # the range of numpy's RandomState, which is used to draw splits
    "batch_size": (None, 1 << 20),
    "labeled_per_batch": (None, 1 << 20),
    "warmup_batch_size": (1, 1 << 20),
    "min_steps_per_epoch": (1, 1 << 20),
    "eval_batch_size": (1, 1 << 20),
    "num_workers": (0, 1 << 10),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks the types and bounds of the data module's constructor arguments.

    Args:
        settings: All arguments by name.

    Raises:
        ConfigError: If an argument has the wrong type or is out of range. The message names it.
    """
    for name, (kind, example) in _OBJECTS.items():
        check_kind(name, settings[name], kind, example)
    for name in _FRACTIONS:
        if settings[name] is not None:
            check_number(name, settings[name], 0, 1)
    for name, (least, most) in _BOUNDS.items():
        value = settings[name]
        if value is None:
            continue
        check_number(name, value, whole=True)
        if not (value if least is None else least) <= value <= most:
            bounds = f"at most {most}" if least is None else f"between {least} and {most}"
            raise ConfigError(f"{name} must be {bounds}, got {value}.")
    check_choice("data.on_error", settings["on_error"], ("stop", "skip"))
    check_paths(**{name: settings[name] for name in ("split_file", "known_file", "predict")})
    check_flags(**{name: settings[name] for name in ("fast_decode", "unknown_as_absent")})
