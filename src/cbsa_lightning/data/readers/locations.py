"""Matching of the paths, URLs and uploads of a labeling tool with images below a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.io.reading import brief

_UPLOAD = re.compile(r"^/data/upload/(?:.*/)?([^/]+)$")
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")


def find_images(
    values: Sequence[str], root: Path, prefix: str | None, where: Callable[[int], str]
) -> tuple[list[str], list[int]]:
    """Finds the image below ``root`` for each value.

    - A value that starts with ``prefix`` is a path relative to ``root``.
    - Without a prefix, a value may be the path of a file below ``root``.
    - An upload is matched with the only image below ``root`` that has the same file name. Without a prefix, this also
      applies to all other values. The 8 hexadecimal digits that Label Studio prepends to the names of uploads are
      ignored.

    Args:
        values: n paths or URLs from the export.
        root: Folder that contains the images.
        prefix: Path or URL of ``root`` in the tool, such as "photos", "s3://bucket/photos" or "https://host/photos".
        where: Function that describes the file and the record of a row, for error messages.

    Returns:
        The n paths, and the rows that were matched only by their file names.

    Raises:
        ConfigError: If the prefix is empty.
        DataError: If values cannot be matched, because they do not start with the prefix, no image or several images
            have this name, or two values match the same file by name.
    """
    images = _Images(root, prefix)
    paths: list[str] = []
    by_name: list[int] = []
    wrong: list[str] = []
    meant: dict[str, str] = {}  # mapping from path to the value that matches by name
    for i, value in enumerate(values):
        try:
            path, alone = images.find(value)
            if alone and meant.setdefault(path, value) != value:
                raise ValueError(f"matches the same file as {brief(meant[path])}")
        except DataError as error:  # an error of the folder, not of this value
            raise DataError(f"{where(i)}: {brief(value)} cannot be matched by its file name: {error}") from error
        except ValueError as error:
            wrong.append(f"{where(i)}: {brief(value)} ({error})")
            continue
        paths.append(path)
        if alone:
            by_name.append(i)
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(values)} images cannot be matched with files below {root}: {listed(wrong)}; set "
            "prefix to the part that precedes the paths below root, or give each record the path of its image"
        )
    return paths, by_name


class _Images:
    """Index of the images below a folder, which finds them by paths and names of a labeling tool."""

    def __init__(self, root: Path, prefix: str | None) -> None:
        self.root = root
        self.prefix = None
        if prefix is not None:
            try:
                self.prefix = _location(prefix).rstrip("/") + "/"
            except ValueError as error:
                raise ConfigError(f"prefix {brief(prefix)} is not a path or URL ({error}); correct it") from error
            if self.prefix == "/":
                raise ConfigError("prefix is empty; give the part that precedes the paths, or omit it")

    def find(self, value: str) -> tuple[str, bool]:
        """Returns the path for ``value``, and whether it was matched only by its file name.

        Raises:
            ValueError: If there is no image. The message states the reason.
        """
        location = _location(value)
        if self.prefix is not None and location.startswith(self.prefix):
            return location[len(self.prefix) :], False
        upload = _UPLOAD.match(location)
        if self.prefix is not None and not upload:
            raise ValueError(f"not below {brief(self.prefix)}")
        if not upload and os.path.isfile(self.root / location):
            return location, False
        name = upload[1] if upload else location.rpartition("/")[2]
        found = [path for known in {name, _UPLOAD_PREFIX.sub("", name)} for path in self._named.get(known, ())]
        if len(found) != 1:
            raise ValueError(f"{len(found) or 'no'} images have this name" if name else "contains no file name")
        return found[0], True

    @cached_property
    def _named(self) -> dict[str, list[str]]:
        """Maps each file name to the paths below the root that have this name."""
        named: dict[str, list[str]] = {}
        if os.path.isdir(self.root):
            for path in read_images(self.root, ("any",)).paths.tolist():
                named.setdefault(path.rpartition("/")[2], []).append(path)
        return named


def _location(value: str) -> str:
    """Returns a path or URL without percent-encoding, query and Label Studio's host. Bucket keys are unchanged.

    Raises:
        ValueError: If the value is not a URL, or its encoding is not UTF-8.
    """
    if "://" in value and not value.startswith(("http://", "https://")):
        return value
    parts = urlsplit(value)
    if parts.path.rstrip("/").endswith("/data/local-files"):
        found = parse_qs(parts.query, errors="strict").get("d", [])
        if len(found) != 1:
            raise ValueError("must have exactly one d= with a path")
        return found[0].replace("\\", "/")  # paths of a server on Windows
    path = unquote(parts.path, errors="strict")
    at = path.find("/data/upload/")
    if at >= 0 and path.startswith("/"):  # a path on the server, possibly below a folder
        return path[at:]
    return f"{parts.scheme}://{parts.netloc}{path}" if parts.netloc else value
