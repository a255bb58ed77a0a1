"""Measures random access to images in Arrow and Parquet files, and its growth with the number of rows.

    uv run python benchmarks/shards.py

The script writes files to a temporary folder (about 400 MB) and prints Markdown tables. Times are processor times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import markdown, where

from cbsa_lightning.data.readers import Table
from cbsa_lightning.data.shards import open_image

LARGE, SMALL = 118_000, 700  # bytes per image: the mean of loader.py, and a tiny image
ROWS, READS = 512, 100
SCHEMA = pa.schema(
    {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "labels": pa.list_(pa.string())},
)


def rows(start: int, count: int, size: int) -> pa.Table:
    """Returns rows with random bytes instead of images."""
    rng = np.random.default_rng(start)
    images = [{"bytes": rng.bytes(size), "path": f"photos/{i:08d}.jpg"} for i in range(start, start + count)]
    return pa.table({"image": images, "labels": [["cat", "dog"]] * count}, schema=SCHEMA)


def write(file: Path, table: pa.Table) -> None:
    """Writes a shard to disk. Linux counts mapped pages that are not yet on disk as memory of the process."""
    with file.open("wb") as stream:
        with pa.ipc.new_stream(stream, table.schema) as out:
            out.write_table(table)
        stream.flush()
        os.fsync(stream.fileno())


def milliseconds(read: Callable[[int], int], count: int) -> float:
    """Returns the processor time to read one of ``count`` images at random."""
    order = np.random.default_rng(1).integers(0, count, READS).tolist()
    read(order[0])
    begun = time.process_time()
    for row in order:
        read(row)
    return 1000 * (time.process_time() - begun) / READS


def private_mb() -> float:
    """Returns the memory in MB that this process has written and does not share. Pages of mapped files are excluded."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1000


def worker_mb(read: Callable[[int], int], count: int) -> float:
    """Returns the additional memory in MB of a forked process after 2,000 random reads."""
    end, start = os.pipe()
    if not os.fork():
        before = private_mb()
        for row in np.random.default_rng(2).integers(0, count, 2000).tolist():
            read(row)
        os.write(start, f"{private_mb() - before:.1f}".encode())
        os._exit(0)
    found = float(os.read(end, 100))
    os.wait()
    return found


def formats(folder: Path) -> str:
    """Compares an Arrow file, Parquet files and image files."""
    table, lines = rows(0, ROWS, LARGE), []
    write(folder / "a.arrow", table)
    for i, image in enumerate(table.column("image").to_pylist()):
        (folder / f"{i}.jpg").write_bytes(image["bytes"])
    for name, path in (("image files", "{}.jpg"), ("Arrow", "a.arrow/photos/{:08d}.jpg")):
        ms = milliseconds(lambda row, path=path: len(open_image(folder / path.format(row)).read()), ROWS)
        lines.append([name, f"{ms:.3f}", f"{LARGE / 1e6:.2f}"])
    for size in (1, 8, 64, 256):
        file = folder / "p.parquet"
        pq.write_table(table, file, row_group_size=size, compression="none")
        metadata = pq.read_metadata(file)

        def read(row: int, file: Path = file, metadata: pq.FileMetaData = metadata, size: int = size) -> int:
            with pq.ParquetFile(file, metadata=metadata) as content:
                group = content.read_row_group(row // size, columns=["image.bytes"], use_threads=False)
            return len(group.column(0)[row % size]["bytes"].as_py())

        lines.append([f"Parquet, row groups of {size}", f"{milliseconds(read, ROWS):.3f}", f"{size * LARGE / 1e6:.2f}"])
    return markdown(["format", "ms per image", "MB read per image"], lines)


def growth(folder: Path) -> str:
    """Measures tables of tiny images."""
    lines = []
    for count, per_shard in ((1_000, 1_000), (10_000, 1_000), (100_000, 1_000), (100_000, 10_000), (100_000, 100_000)):
        here = folder / f"{count}-{per_shard}"
        here.mkdir()
        for start in range(0, count, per_shard):
            write(here / f"t-{start // per_shard:05d}.arrow", rows(start, per_shard, SMALL))
        begun = time.process_time()
        table = Table(str(here / "t-*.arrow")).train()
        reading = time.process_time() - begun
        begun = time.process_time()
        table.require_files()
        checking = time.process_time() - begun

        def read(row: int, table=table) -> int:
            return len(open_image(table.file(row)).read())

        ms, memory = milliseconds(read, count), worker_mb(read, count)
        sizes = [f"{count:,}", f"{per_shard:,}"]
        lines.append([*sizes, f"{reading:.3f}", f"{checking:.3f}", f"{ms:.3f}", f"{memory:.1f}"])
    head = ["images", "images per shard", "reading the table, s", "finding missing images, s", "ms per image"]
    return markdown([*head, "additional MB of a worker"], lines)


if __name__ == "__main__":
    print(where())
    for measure in (formats, growth):
        with TemporaryDirectory() as name:
            print("\n" + measure(Path(name)), flush=True)
