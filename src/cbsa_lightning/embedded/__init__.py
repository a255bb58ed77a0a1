"""A small CLIP that ships inside the package, so that a first run needs no download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cbsa_lightning.errors import WeightsError


def folder() -> Path:
    """The folder of the embedded CLIP, in open_clip's local-dir layout: ``"local-dir:" + str(folder())`` loads it.

    Raises:
        WeightsError: The package was installed without its data files, or runs from inside an archive.
    """
    here = Path(str(files(__package__)))
    missing = [
        name
        for name in ("open_clip_config.json", "open_clip_model.safetensors")
        if not (here / name).is_file()
    ]
    if missing:
        raise WeightsError(
            f"the embedded CLIP lacks {', '.join(missing)} in {here}; install the package anew, unpacked"
        )
    return here
