"""Reading of Arrow files that contain images (:mod:`cbsa_lightning.data.shards`) as a table of paths and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cbsa_lightning.data.annotations import as_strings, repeated_rows
from cbsa_lightning.data.readers.source import ODD_PATH
from cbsa_lightning.data.shards import open_shard, shard_files
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief


def read_shards(path: Path) -> tuple[Any, list[tuple[str, int]]]:
    """Reads all columns of shards except the bytes of the images. The column of images is replaced with their paths.

    Args:
        path: An Arrow file, or a pattern such as ``data/train-*.arrow``. All files must have the same columns.

    Returns:
        The columns, and the name of each file with the number of its first row in the table.

    Raises:
        DataError: If no file matches, a shard is damaged, the columns differ, a name is repeated or is not a relative
            path, or a label is not a valid class number.
    """
    files = shard_files(path)
    if not files:
        raise DataError(f"{path}: no file matches this pattern; correct the path")
    tables: list[Any] = []
    starts: list[tuple[str, int]] = []
    start = 0
    for file in files:
        shard = open_shard(file)
        _check_names(file, shard.names)
        starts.append((file.name, start))
        start += shard.table.num_rows
        paths = pc.binary_join_element_wise(file.name, shard.names, "/")
        table = _with_class_names(file, shard.table.set_column(shard.place, shard.column, paths))
        tables.append(table.replace_schema_metadata())
        if not tables[-1].schema.equals(tables[0].schema):
            raise DataError(
                f"{file}: the columns {brief(str(tables[-1].schema))} differ from {brief(str(tables[0].schema))} in "
                f"{files[0]}; write all shards with the same columns"
            )
    return pa.concat_tables(tables), starts


def _check_names(file: Path, names: Any) -> None:
    """Checks that the names of the images in a shard can be parts of paths, and that no name occurs twice."""
    if (row := pc.index(pc.match_substring_regex(names, ODD_PATH), True).as_py()) >= 0:
        raise DataError(
            f"{file}, row {row + 1}: the path {brief(names[row].as_py())} of the image is not a relative path with '/' "
            "between folders; write the name of the image file"
        )
    if pc.count_distinct(names).as_py() < len(names):
        i, j = repeated_rows(as_strings(names.to_pylist()))[0]
        raise DataError(
            f"{file}: rows {i + 1} and {j + 1} have the same path {brief(names[i].as_py())}; give each image a "
            "unique path"
        )


def _with_class_names(file: Path, table: Any) -> Any:
    """Replaces numbers with class names in the columns that Hugging Face datasets stores with the type ClassLabel."""
    for column, (classes, lists) in _class_labels(file, table).items():
        place = table.column_names.index(column)
        names: dict[int, str | None] = dict(enumerate(classes))
        if not lists:
            names[-1] = None  # -1 denotes an unknown class
        try:
            cells = [
                cell if cell is None else [names[code] for code in cell] if lists else names[cell]
                for cell in table.column(place).to_pylist()
            ]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{file}: column {brief(column)} contains {error}, but its classes have the numbers 0 to "
                f"{len(classes) - 1}; correct the labels"
            ) from error
        table = table.set_column(place, column, pa.array(cells, pa.list_(pa.string()) if lists else pa.string()))
    return table


def _class_labels(file: Path, table: Any) -> dict[str, tuple[list[str], bool]]:
    """Maps each column of the type ClassLabel to its class names, and to True if its values are lists."""
    found: dict[str, tuple[list[str], bool]] = {}
    try:
        features = (
            json.loads((table.schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
        )
        for column in table.column_names:
            feature = features.get(column, {})
            item = feature.get("feature", feature) if isinstance(feature, dict) else {}
            if isinstance(item, dict) and item.get("_type") == "ClassLabel":
                found[column] = [str(name) for name in item["names"]], item is not feature
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: the metadata of Hugging Face datasets is damaged ({error}); write the shard again"
        ) from error
    return found
