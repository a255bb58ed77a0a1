"""Which image a labeling tool means: local-files paths, URLs and uploads -> paths below a root."""

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
    """Finds the image below ``root`` that each value means.

    - What lies below ``prefix`` is a path relative to ``root``.
    - Without a prefix, a path that is a file below ``root`` is that file.
    - An upload, and without a prefix every other value, is the one image below ``root`` with its file name; the 8
      hexadecimal digits that Label Studio puts before the names of uploads are left out.

    Args:
        values: n paths or URLs as they stand in the export.
        root: Folder of the images.
        prefix: Path or URL of ``root`` in the tool, such as "photos", "s3://bucket/photos" or "https://host/photos".
        where: Row -> file and record, for a message.

    Returns:
        The n paths, and the rows that were matched by their file names alone.

    Raises:
        ConfigError: The prefix is empty.
        DataError: Values are not matched: they lie elsewhere, no image or several have that name, or two values mean
            the same file by its name alone.
    """
    images = _Images(root, prefix)
    paths: list[str] = []
    by_name: list[int] = []
    wrong: list[str] = []
    meant: dict[str, str] = {}  # path -> the value that means it by its name alone
    for i, value in enumerate(values):
        try:
            path, alone = images.find(value)
            if alone and meant.setdefault(path, value) != value:
                raise ValueError(f"means the same file as {brief(meant[path])}")
        except DataError as error:  # of the folder, not of this value
            raise DataError(f"{where(i)}: {brief(value)} is looked for by its file name, but {error}") from error
        except ValueError as error:
            wrong.append(f"{where(i)}: {brief(value)} ({error})")
            continue
        paths.append(path)
        if alone:
            by_name.append(i)
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(values)} images are not matched with files below {root}: {listed(wrong)}; say with "
            "prefix what comes before the paths below root, or give each record the path of its image"
        )
    return paths, by_name


class _Images:
    """Images below a root, found by paths and names of a labeling tool."""

    def __init__(self, root: Path, prefix: str | None) -> None:
        self.root = root
        self.prefix = None
        if prefix is not None:
            try:
                self.prefix = _location(prefix).rstrip("/") + "/"
            except ValueError as error:
                raise ConfigError(f"prefix {brief(prefix)} is no path or URL ({error}); correct it") from error
            if self.prefix == "/":
                raise ConfigError("prefix is empty; give what comes before the paths, or leave it out")

    def find(self, value: str) -> tuple[str, bool]:
        """The path that ``value`` means, and whether its file name alone says so.

        Raises:
            ValueError: Why there is none.
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
            raise ValueError(f"{len(found) or 'no'} images have this name" if name else "names no file")
        return found[0], True

    @cached_property
    def _named(self) -> dict[str, list[str]]:
        """File name -> the paths below root that have it."""
        named: dict[str, list[str]] = {}
        if os.path.isdir(self.root):
            for path in read_images(self.root, ("any",)).paths.tolist():
                named.setdefault(path.rpartition("/")[2], []).append(path)
        return named


def _location(value: str) -> str:
    """A path or URL without percent-encoding, query and host of Label Studio; keys of buckets are taken as they are.

    Raises:
        ValueError: It is no URL, or its encoding is no UTF-8.
    """
    if "://" in value and not value.startswith(("http://", "https://")):
        return value
    parts = urlsplit(value)
    if parts.path.rstrip("/").endswith("/data/local-files"):
        found = parse_qs(parts.query, errors="strict").get("d", [])
        if len(found) != 1:
            raise ValueError("has no single d= with a path")
        return found[0].replace("\\", "/")  # of a server on Windows
    path = unquote(parts.path, errors="strict")
    at = path.find("/data/upload/")
    if at >= 0 and path.startswith("/"):  # on the server, perhaps below a folder of it
        return path[at:]
    return f"{parts.scheme}://{parts.netloc}{path}" if parts.netloc else value
