"""Labels images with the model in this folder. Requires only Pillow, NumPy and ONNX Runtime.

    python predict.py PHOTO_OR_FOLDER ...        prints a CSV table: image, labels, and the probability of each class
    python predict.py --check                    tests that the model computes the same scores as during the export
    python predict.py --model model_int8.onnx ...    uses a variant of the model (see variants.json)

In Python, ``Model("FOLDER")(["photo.jpg"])`` returns the probabilities and labels of images.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnxruntime
from PIL import Image

HERE = Path(__file__).resolve().parent
BATCH = 32
TOLERANCE = 1e-4  # maximum accepted difference between probabilities; processors differ by about 1e-6 in float32
Image.init()
FORMATS = [*{"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"}.intersection(Image.OPEN)]
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
UPRIGHT |= {7: "TRANSVERSE", 8: "ROTATE_90"}


class BundleError(Exception):
    """A file of the exported model is missing or damaged, or does not belong to the other files."""


class ImageError(Exception):
    """An image cannot be read."""


class Model:
    """The exported model.

    Args:
        folder: Folder of the exported model.
        threads: Number of CPU threads. With 0, ONNX Runtime chooses the number.
        file: Name of the model file, such as model_int8.onnx for a variant.
        checksums: Whether to compare the files with SHA256SUMS, which `cbsa export` writes last.

    Raises:
        BundleError: If a file is missing or damaged, or was changed.
    """

    def __init__(
        self, folder: str | Path = HERE, threads: int = 0, file: str = "model.onnx", checksums: bool = True
    ) -> None:
        self.folder, self.file = Path(folder), file
        if checksums:
            verify(self.folder, [file, "preprocess.json"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = str(self.folder / file)
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has an exception class for each of its status codes
            reason = str(error).partition("\n")[0]
            raise BundleError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load the model ({reason}). If the opset is not "
                "supported, install the version of ONNX Runtime that README.md specifies, or a later one."
            ) from error
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.class_names: list[str] = json.loads(self.metadata["class_names"])
        self.thresholds: list[float | None] = json.loads(self.metadata["thresholds"])
        self.size = int(self.metadata["image_size"])
        self._compare_labels()

    def __call__(self, images: Sequence[str | Path | Image.Image | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns probabilities ``(n, C)`` float32 and labels ``(n, C)`` bool of files, Pillow images or RGB arrays.

        Raises:
            ImageError: If an image cannot be read.
        """
        empty = np.zeros((0, len(self.class_names)), np.float32)
        parts = [self.run([self.view(image) for image in images[i : i + BATCH]]) for i in range(0, len(images), BATCH)]
        probabilities, labels = zip(*parts, strict=True) if parts else ([empty], [empty.astype(bool)])
        return np.concatenate(probabilities), np.concatenate(labels)

    def run(self, views: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns probabilities and labels of resized images, each ``(S, S, 3)`` uint8 RGB."""
        batch = np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2))
        probabilities, labels = self.session.run(["probabilities", "labels"], {"images": batch})
        if not np.isfinite(probabilities).all():
            raise BundleError(f"{self.folder / self.file}: the scores are not finite.")
        return probabilities, labels

    def view(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """Converts an image to the input of the model, ``(S, S, 3)`` uint8 RGB."""
        if isinstance(image, Image.Image):
            image = np.asarray(rgb(image))
        return resize(image if isinstance(image, np.ndarray) else read(image), self.size)

    def _compare_labels(self) -> None:
        file = self.folder / "labels.json"
        try:
            classes = json.loads(file.read_text(encoding="utf-8"))["classes"]
            found = [(entry["name"], entry["threshold"]) for entry in classes]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{file}: cannot be read ({error}). Export the model again.") from error
        if len(found) != len(self.class_names):
            raise BundleError(f"{file} has {len(found)} classes, but {self.file} has {len(self.class_names)}.")
        for (name, threshold), own_name, own in zip(found, self.class_names, self.thresholds, strict=True):
            if (name, threshold) != (own_name, own):
                raise BundleError(
                    f"{file} has the threshold {threshold} for class {name!r}, but {self.file} has {own} for class "
                    f"{own_name!r}. Thresholds are part of the model. To use others, apply them to the probabilities, "
                    "or export the model again."
                )


def verify(folder: Path, names: Sequence[str]) -> None:
    """Compares files with the checksums in SHA256SUMS.

    Raises:
        BundleError: If a file is missing or was changed.
    """
    for name in ["SHA256SUMS", *names]:
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name} is missing. Copy the whole folder, or export the model again.")
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines()
    for name in names:
        with (folder / name).open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if f"{digest}  {name}" not in lines:
            raise BundleError(
                f"{folder / name} is damaged or was changed (its SHA-256 is not in SHA256SUMS). Copy the whole folder "
                "again, or export the model again."
            )


def read(source: str | Path | BinaryIO) -> np.ndarray:
    """Reads an image file or an open binary file as an upright RGB array ``(H, W, 3)`` uint8.

    Raises:
        ImageError: If the image cannot be read.
    """
    try:
        # The file is not opened by path, because Pillow 13 misapplies the orientation of some TIFF files in this case.
        file = BytesIO(Path(source).read_bytes()) if isinstance(source, (str, Path)) else source
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            return np.asarray(rgb(image))
    except Exception as error:  # for damaged files, Pillow's plugins can raise nearly any error
        raise ImageError(f"{source} cannot be read as an image ({error}).") from error


def rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation, and converts to 8-bit RGB with a white background for transparent parts."""
    try:
        turned = UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data is ignored
        turned = None
    if turned is not None:
        image = image.transpose(Image.Transpose[turned])
    if image.mode.startswith("I"):  # 16-bit gray
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ImageError("the gray values do not fit in 16 bits")
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes ``(H, W, 3)`` uint8 to ``(size, size, 3)`` as in training, without keeping the aspect ratio.

    The filter is bilinear and antialiased, with fixed-point weights. For uint8, its values are exactly those of
    ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)``. The values of Pillow's filter differ by at
    most one.
    """
    columns = _resize_rows(image.transpose(1, 0, 2), size)  # resize the width first
    return _resize_rows(columns.transpose(1, 0, 2), size)


def _resize_rows(image: np.ndarray, size: int) -> np.ndarray:
    length = image.shape[0]
    if length == size:
        return image
    scale = length / size
    support = max(scale, 1.0)
    centers = scale * (np.arange(size) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(int), 0)
    end = np.minimum((centers + support + 0.5).astype(int), length)
    places = first[:, None] + np.arange((end - first).max())  # (size, taps)
    weights = np.maximum(1 - np.abs((places - centers[:, None] + 0.5) / support), 0) * (places < end[:, None])
    weights /= weights.sum(1, keepdims=True)
    bits = next(bits for bits in range(23) if bits == 22 or int(0.5 + weights.max() * 2 ** (bits + 1)) >= 2**15)
    fixed = np.floor(weights * 2**bits + 0.5).astype(np.int32)
    rows = np.ascontiguousarray(image).reshape(length, -1)
    total = np.full((size, rows.shape[1]), 2 ** (bits - 1), np.int32)
    for weight, place in zip(fixed.T, places.T, strict=True):
        total += weight[:, None] * rows[np.minimum(place, length - 1)]
    result: np.ndarray = np.minimum(total >> bits, 255).astype(np.uint8).reshape(size, *image.shape[1:])
    return result


def check(model: Model) -> float:
    """Runs the model on the images in check.npz.

    Returns:
        The largest difference between a probability and its value during the export.

    Raises:
        BundleError: If a file was changed, or a resized image or a score differs.
    """
    verify(model.folder, ["check.npz", "labels.json"])
    file = model.folder / "check.npz"
    variant = model.metadata.get("variant")
    tolerance = float(model.metadata.get("tolerance", TOLERANCE))
    with np.load(file, allow_pickle=False) as data:
        images = [data[f"image_{i}"] for i in range(len(data["probabilities"]))]
        views, expected = data["views"], data[f"probabilities_{variant}" if variant else "probabilities"]
    if any(not np.array_equal(model.view(image), view) for image, view in zip(images, views, strict=True)):
        raise BundleError(f"{file}: the resized images differ from those of the export.")
    probabilities, labels = model(images)
    difference = float(np.abs(probabilities - expected).max())
    thresholds = np.array([np.inf if value is None else value for value in model.thresholds], np.float32)
    if difference > tolerance or not np.array_equal(labels, probabilities >= thresholds):
        raise BundleError(f"{file}: the scores of {model.file} differ from those of the export by {difference:.1e}.")
    return difference


def files_of(places: Sequence[str]) -> Iterator[Path]:
    """Yields the given image files and the image files in folders and their subfolders, in order."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    for place in map(Path, places):
        if place.is_dir():
            yield from sorted(path for path in place.rglob("*") if path.suffix.lower() in suffixes)
        else:
            yield place


def write_table(model: Model, files: Sequence[Path]) -> None:
    """Prints a CSV table of predictions."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["image", "labels", *model.class_names])
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        for file, row, given in zip(batch, *model(batch), strict=True):
            names = [name for name, has in zip(model.class_names, given, strict=True) if has]
            table.writerow([file, ";".join(names) or "none", *(f"{value:.6g}" for value in row)])


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Labels images with the model in this folder.")
    parser.add_argument("images", nargs="*", help="image files or folders of images")
    parser.add_argument("--check", action="store_true", help="test the model on the images in check.npz")
    parser.add_argument("--model", default="model.onnx", help="model file in this folder (default: model.onnx)")
    parser.add_argument(
        "--threads", type=int, default=0, help="number of CPU threads (default: chosen by ONNX Runtime)"
    )
    args = parser.parse_args()
    try:
        model = Model(HERE, args.threads, args.model)
        if args.check:
            print(f"The check passed: the probabilities differ by at most {check(model):.1e}.")
        elif not (files := list(files_of(args.images))):
            parser.error("no images; pass image files or folders, or --check")
        else:
            write_table(model, files)
    except (BundleError, ImageError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
