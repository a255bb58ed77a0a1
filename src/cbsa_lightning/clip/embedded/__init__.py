"""A small CLIP model that is included in the package, so that a first run does not need to download weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cbsa_lightning.errors import WeightsError

FILES = ("open_clip_config.json", "open_clip_model.safetensors")


def folder() -> Path:
    """Returns the folder of the embedded CLIP model. open_clip loads it as ``"local-dir:" + str(folder())``.

    Raises:
        WeightsError: If the package was installed without its data files, or is run from an archive.
    """
    here = Path(str(files(__name__)))
    if missing := [name for name in FILES if not (here / name).is_file()]:
        raise WeightsError(
            f"the embedded CLIP lacks {', '.join(missing)} in {here}; reinstall the package as unpacked files"
        )
    return here
