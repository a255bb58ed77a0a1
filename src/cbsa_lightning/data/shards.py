"""Images in Arrow files ("shards"), for data sets with too many images for one file per image.

The path of such an image consists of the path of its shard and its name, as in ``data/train-0.arrow/photos/1.jpg``. A
shard is mapped into memory. Any row can therefore be read without reading the rows before it, and all processes share
the pages that the operating system has read. A mapped file remains mapped in forked workers and does not need a file
handle.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, open_regular

SUFFIX = ".arrow"
_MAPPED = 1 << 14  # maximum number of mapped shards per process; Linux allows 65,530 mappings
_REWRITE = "write the shard again (docs/reference/data.md)"


class Shard:
    """A mapped Arrow file with one column of images.

    The column of images is the only column that contains binary values or structs ``{bytes, path}``. The name of an
    image is its ``path``. An image without a ``path`` is named after its row, counted from 0.

    Args:
        path: An Arrow file in the stream or file format, without compression.

    Attributes:
        table: All columns.
        place: Position of the column of images in the table.
        column: Name of this column.
        names: Chunked Arrow array of n strings, the names of the images.

    Raises:
        DataError: If the file is damaged or compressed, or does not have exactly one column of images.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with pa.memory_map(path) as file:
                content = file.read_buffer()  # keeps the file mapped after it is closed
            self.table = _reader(content).read_all()
            self.table.validate(full=True)  # otherwise, wrong offsets in a damaged file would crash the process
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: the file cannot be read as an Arrow file ({error}); {_REWRITE}") from error
        self.place = self._image_column()
        self.column = self.table.column_names[self.place]
        images = self.table.column(self.place)
        self._bytes = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
        self._refuse_compressed(content)
        self.names = self._names(images)

    def row(self, name: str) -> int | None:
        """Returns the row of the image with the given name, or None if there is no such image."""
        row: int = pc.index(self.names, name).as_py()
        return None if row < 0 else row

    def image(self, row: int) -> Any:
        """Returns the content of the image file in a row as a buffer in the mapped file.

        Raises:
            DataError: If the shard contains only the path of this image.
        """
        content = self._bytes[row].as_buffer()
        if content is None:
            raise DataError(
                f"{self.path}, row {row + 1}: column {brief(self.column)} contains no bytes; write the content of the "
                "image file, or remove the row"
            )
        return content

    def _image_column(self) -> int:
        fields = list(self.table.schema)
        places = [k for k, field in enumerate(fields) if _contains_images(field.type)]
        if len(places) == 1:
            return places[0]
        found = [fields[k].name for k in places]
        kinds = listed(f"{brief(field.name)} ({field.type})" for field in fields)
        raise DataError(
            f"{self.path}: expected one column of images, found {listed(map(brief, found)) if found else 'none'}; the "
            f"columns are {kinds}. Write the content of the image files to one column of type binary or "
            "struct<bytes: binary, path: string>"
        )

    def _names(self, images: Any) -> Any:
        if pa.types.is_struct(images.type) and images.type.get_field_index("path") >= 0:
            try:
                paths = pc.struct_field(images, "path").cast(pa.string())
            except pa.ArrowException as error:
                raise DataError(
                    f"{self.path}: the paths in column {brief(self.column)} are not text ({error}); write the name of "
                    "each image file as a string"
                ) from error
            if not paths.null_count:
                return paths
        else:
            paths = pa.chunked_array([pa.nulls(len(images), pa.string())])
        return pc.coalesce(paths, pa.array(map(str, range(len(images))), pa.string()))

    def _refuse_compressed(self, content: Any) -> None:
        """Rejects compressed shards, because opening one decompresses it and keeps its content in memory."""
        for chunk in self._bytes.chunks:
            data = chunk.buffers()[2]
            if data is not None and data.size and not 0 <= data.address - content.address < content.size:
                raise DataError(
                    f"{self.path}: the shard is compressed; write it without compression (docs/reference/data.md)"
                )


def open_image(path: str | os.PathLike[str]) -> BufferedReader | BytesIO:
    """Opens the file of an image, or an image in a shard, for reading bytes.

    Raises:
        DataError: If the path is not a regular file, or the shard is damaged or contains no bytes of the image.
        OSError: If the file cannot be opened, or the shard has no image with this name.
    """
    if (found := _located(path)) is None:
        return open_regular(path)
    shard, name = found
    if (row := shard.row(name)) is None:
        raise FileNotFoundError(errno.ENOENT, "the shard has no image with this name", os.fspath(path))
    return BytesIO(shard.image(row))


def file_on_disk(path: str | os.PathLike[str]) -> str:
    """Returns the shard of an image, or ``path`` if the image is not in a shard."""
    found = _located(path)
    return os.fspath(path) if found is None else found[0].path


def names_in_shard(folder: str) -> set[str] | None:
    """Returns the names of the images in a shard, or in a folder in a shard, without the folder.

    Args:
        folder: Path of a shard or of a folder in a shard, with a trailing slash.

    Returns:
        The names, or None if ``folder`` is not in a shard.
    """
    if (found := _located(folder)) is None:
        return None
    shard, prefix = found
    return {name.removeprefix(prefix) for name in shard.names.to_pylist() if name.startswith(prefix)}


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Returns a mapped shard. It is mapped again if the file has been changed.

    Raises:
        DataError: If the file is missing or ``Shard`` raises an error.
    """
    text = os.fspath(path)
    try:
        status = os.stat(text)
    except OSError as error:
        raise DataError(f"{text}: the shard cannot be read ({error.strerror}); correct the path") from error
    return _mapped(text, status.st_size, status.st_mtime_ns)


def shard_files(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the shards that match a pattern such as ``data/train-*.arrow`` in sorted order, or ``path`` itself."""
    path = Path(path)
    pattern = path.suffix.lower() == SUFFIX and any(mark in path.name for mark in "*?[")
    return sorted(path.parent.glob(path.name)) if pattern and not os.path.isfile(path) else [path]


def _located(path: str | os.PathLike[str]) -> tuple[Shard, str] | None:
    """Returns the shard of an image and the name of the image, or None if the path does not contain a shard."""
    before, mark, name = os.fspath(path).replace(os.sep, "/").partition(f"{SUFFIX}/")
    if not mark:
        return None
    file = before + SUFFIX
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return (_mapped(file, status.st_size, status.st_mtime_ns), name) if stat.S_ISREG(status.st_mode) else None


@lru_cache(_MAPPED)
def _mapped(path: str, size: int, modified: int) -> Shard:
    return Shard(path)


def _reader(content: Any) -> Any:
    return pa.ipc.open_file(content) if content[:6].to_pybytes() == b"ARROW1" else pa.ipc.open_stream(content)


def _contains_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _contains_images(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
