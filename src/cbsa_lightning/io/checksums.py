"""Writing and checking of the SHA256SUMS file of a folder, in the format of the `sha256sum` command."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cbsa_lightning.errors import DataError
from cbsa_lightning.io.files import replacing

SUMS = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files in a folder.

    Raises:
        OutputError: If the file cannot be written.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    with replacing(folder / SUMS) as draft:
        draft.write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")


def check_checksums(folder: Path, names: Iterable[str]) -> None:
    """Compares files with their checksums.

    Raises:
        DataError: If a file is missing, is not listed, or was changed.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / SUMS}: the file cannot be read ({error}). Copy the whole folder again.") from error
    for name in names:
        file = folder / name
        if not file.is_file():
            raise DataError(
                f"{file}: the file is missing. Copy the whole folder again, or export the model again, including this "
                "file."
            )
        if _sha256(file) != expected.get(name):
            raise DataError(
                f"{file}: the file is damaged or was changed after it was written (its SHA-256 differs from the one in "
                f"{SUMS}). Copy it again."
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
