"""A small multi-label data set of digits that is generated from a seed and stored as PNG files.

Each image shows one to four handwritten digits in a cluttered scene. The labels of an image are its digits. The digits
are divided into three groups. Digits of a group often occur together, as knife, fork and plate do in photos. Some
digits are rarer than others.
"""

from __future__ import annotations

import csv
import errno
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cbsa_lightning.arguments import check_number, check_paths
from cbsa_lightning.data.annotations import AnnotationTable, StringArray
from cbsa_lightning.data.canvases import Canvas, draw_canvas, exemplars
from cbsa_lightning.data.readers.source import Source
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.files import writing

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# In each group, the digits are listed in descending order of frequency.
GROUPS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"meadow": (3, 0, 8, 5), "harbour": (1, 7, 4), "dusk": (6, 2, 9)}
)
GROUP_SHARES = (0.48, 0.32, 0.2)
DECAY = 0.55  # ratio of the frequencies of successive digits of a group
COUNT_SHARES = (0.25, 0.35, 0.27, 0.13)  # fractions of images with 1, 2, 3 and 4 digits
STRAY = 0.12  # probability that an additional digit belongs to another group
# Probability that the scene is that of the group, which makes it weakly correlated with the digits.
SAME_SCENE = 0.5
Part: TypeAlias = Literal["train", "test"]
DRAWING = 2  # increment it when the same settings result in other images, so that old images are not reused


def draw_labels(rng: np.random.Generator) -> tuple[str, list[int]]:
    """Draws the scene and the digits of one image. Each digit occurs at most once."""
    names = list(GROUPS)
    group = names[rng.choice(len(names), p=GROUP_SHARES)]
    digits: list[int] = []
    for position in range(1 + rng.choice(len(COUNT_SHARES), p=COUNT_SHARES)):
        left = [digit for digit in GROUPS[group] if digit not in digits]
        if not left or (position > 0 and rng.random() < STRAY):
            others = [names[k] for k in np.argsort(rng.random(len(names))) if names[k] != group]
            left = [digit for digit in GROUPS[others[0]] if digit not in digits]
            left = left or [digit for digit in GROUPS[others[1]] if digit not in digits]
        weights = DECAY ** np.arange(len(left))
        digits.append(left[rng.choice(len(left), p=weights / weights.sum())])
    scene = group if rng.random() < SAME_SCENE else names[rng.integers(len(names))]
    return scene, digits


@dataclass(frozen=True)
class Digits(Source):
    """Generated images of handwritten digits.

    They are stored below ``root`` in a folder named after the settings, so images with different settings are never
    mixed. Training and test images use different handwritten exemplars. Image i depends only on the seed and i, so a
    larger data set begins with the images of a smaller one.

    Args:
        root: Folder of the generated data sets.
        num_train: Number of training images.
        num_test: Number of test images.
        image_size: Height and width of the images in pixels.
        seed: Seed of the labels and the images.

    Raises:
        ConfigError: If a count is below 1, the seed is negative, or the images are smaller than 64 pixels.
    """

    root: str = "data/digits"
    num_train: int = 1800
    num_test: int = 600
    image_size: int = 160
    seed: int = 0

    class_names: ClassVar[tuple[str, ...]] = NAMES
    prompt_names: ClassVar[tuple[str, ...]] = NAMES
    contexts: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {group: tuple(NAMES[digit] for digit in sorted(digits)) for group, digits in GROUPS.items()}
    )

    def __post_init__(self) -> None:
        floors = {"num_train": 1, "num_test": 1, "image_size": 64, "seed": 0}
        for name, floor in floors.items():
            check_number(f"Digits: {name}", getattr(self, name), floor, whole=True)
        check_paths(**{"Digits: root": self.root})

    @property
    def folder(self) -> Path:
        """Folder that contains the images and annotations with these settings."""
        name = f"v{DRAWING}-train{self.num_train}-test{self.num_test}-{self.image_size}px-seed{self.seed}"
        return Path(self.root) / name

    def prepare(self) -> None:
        """Generates the data set unless it exists. An interruption does not leave an incomplete data set.

        Raises:
            DataError: If the folder exists, but images or annotations are missing.
            OutputError: If the disk is full or the folder is not writable.
        """
        if self.folder.exists():
            for part in ("train", "test"):
                self._table(part).require_files()
            return
        with writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".drawing-", dir=self.folder.parent))
            try:
                self._draw(draft, "train")
                self._draw(draft, "test")
                draft.chmod(0o755)  # mkdtemp grants access only to the owner
                try:
                    draft.rename(self.folder)
                except OSError as error:  # another process may have created the same folder
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def train(self) -> AnnotationTable:
        """Returns the training images.

        Raises:
            DataError: If `prepare` has not been called, or the annotation file was changed.
        """
        return self._table("train")

    def test(self) -> AnnotationTable:
        """Returns the test images. Their exemplars do not occur in the training images.

        Raises:
            DataError: If `prepare` has not been called, or the annotation file was changed.
        """
        return self._table("test")

    def boxes(self, part: Part) -> list[dict[int, tuple[float, float, float, float]]]:
        """Returns the positions of the digits of each image, as ``{digit: (left, top, right, bottom)}`` in pixels.

        They are not used for training. To compute them, the images are drawn again.
        """
        return [self._canvas(part, index).boxes for index in range(self._count(part))]

    def _count(self, part: Part) -> int:
        return {"train": self.num_train, "test": self.num_test}[part]

    def _draw(self, draft: Path, part: Part) -> None:
        (draft / part).mkdir()
        with open(draft / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("path", *NAMES))
            for index in tqdm(range(self._count(part)), desc=f"Drawing {part} digits", leave=False):
                canvas = self._canvas(part, index)
                path = f"{part}/{index:06d}.png"
                canvas.image.save(draft / path, compress_level=2)
                writer.writerow((path, *(int(digit in canvas.boxes) for digit in range(10))))

    def _canvas(self, part: Part, index: int) -> Canvas:
        rng = np.random.default_rng((self.seed, ("train", "test").index(part), index))
        scene, digits = draw_labels(rng)
        return draw_canvas(rng, self.image_size, scene, digits, exemplars(part))

    def _table(self, part: Part) -> AnnotationTable:
        file = self.folder / f"{part}.csv"
        count = self._count(part)
        again = f"delete {self.folder} and call prepare() to draw it again"
        if not self.folder.exists():
            raise DataError(f"{self.folder} does not exist; call prepare() to draw the images")
        try:
            with open(file, newline="", encoding="utf-8") as lines:
                header, *rows = csv.reader(lines)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}); {again}") from error
        if header != ["path", *NAMES] or len(rows) != count or any(len(row) != 11 for row in rows):
            raise DataError(f"{file} does not contain the generated table of {count} images; {again}")
        labels: NDArray[np.int8] = np.array([row[1:] for row in rows]).astype(np.int8)
        paths: StringArray = np.array([row[0] for row in rows], dtype=np.dtypes.StringDType())
        return AnnotationTable(self.folder, paths, labels, NAMES, NAMES)
