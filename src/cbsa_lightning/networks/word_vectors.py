"""Word vectors of the class names, either GloVe vectors from a file or CLIP text features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.errors import WeightsError, listed
from cbsa_lightning.io.reading import open_regular

ENTRY = 0.35  # root mean square of the entries of GloVe's 300-dimensional vectors for common words


class WordVectors:
    """Base class of word vectors, with one vector per class.

    Attributes:
        vectors: ``(C, d)`` float32.
    """

    vectors: Tensor


WordVectorsCallable = Callable[[Sequence[str]], WordVectors]
"""Type of a function that creates the vectors from the class names."""


class GloVe(WordVectors):
    """Reads vectors from a GloVe text file. If a name consists of several words, their vectors are averaged.

    Words are looked up first as they are written, then in lower case.

    Args:
        class_names: The C class names.
        file: A text file with a word and its vector on each line, such as ``glove.840B.300d.txt``.

    Raises:
        WeightsError: If the file does not exist, is not a GloVe file, or lacks words. The message names the words.
    """

    def __init__(self, class_names: Sequence[str], file: str) -> None:
        words = {name: name.replace("_", " ").replace("-", " ").split() for name in class_names}
        needed = {form for parts in words.values() for word in parts for form in (word, word.lower())}
        found = _read(Path(file).expanduser(), needed)
        vectors, missing = [], []
        for name, parts in words.items():
            absent = [word for word in parts if word not in found and word.lower() not in found]
            if absent or not parts:
                missing.append(f"{listed(map(repr, absent)) or 'no word'} of class {name!r}")
                continue
            vectors.append(torch.stack([found[word if word in found else word.lower()] for word in parts]).mean(0))
        if missing:
            raise WeightsError(
                f"{file} has no vector for {listed(missing)}. Use other class names in prompts (prompt_names), a file "
                "that contains these words, or ClipWords, which does not need a file."
            )
        self.vectors = torch.stack(vectors)


class ClipWords(WordVectors):
    """CLIP text features of "a photo of a ..." as word vectors.

    They are a substitute if no GloVe file is available. None of the original systems uses them. The features are scaled
    to the magnitude of GloVe's entries, for which the following layers were designed.

    Args:
        class_names: The C class names.
        clip: open_clip model name, folder or configuration file, or "embedded" for the small model in this package.
        pretrained: Weights tag of open_clip, a weights file, or "random". Omit it for folders, which contain weights.

    Raises:
        ConfigError: If the model does not exist.
        WeightsError: If its weights are not available.
    """

    def __init__(
        self, class_names: Sequence[str], clip: str = "RN50-quickgelu", pretrained: str | None = "openai"
    ) -> None:
        text = FrozenCLIP.load(clip, pretrained).encode_texts([f"a photo of a {name}." for name in class_names])
        unit = nn.functional.normalize(text.float(), dim=-1)
        self.vectors = unit * ENTRY * unit.shape[1] ** 0.5


def _read(file: Path, needed: set[str]) -> dict[str, Tensor]:
    """Reads the required vectors line by line, since the file may be larger than memory."""
    found: dict[str, Tensor] = {}
    wanted, size = {word.encode() for word in needed}, 0
    try:
        with open_regular(file) as lines:
            for number, line in enumerate(lines, 1):
                word, _, rest = line.partition(b" ")
                size = size or len(rest.split())
                if word not in wanted:
                    continue
                numbers = rest.split()
                # Larger files contain some words with spaces. Their lines have more fields, so they are skipped.
                if len(numbers) == size:
                    found[word.decode()] = _vector(numbers, f"{file}, line {number}")
    except OSError as error:
        raise WeightsError(
            f"{file}: GloVe vectors cannot be read ({error.strerror}). Download glove.840B.300d from "
            "nlp.stanford.edu/projects/glove and give its text file, or use ClipWords."
        ) from error
    return found


def _vector(numbers: list[bytes], where: str) -> Tensor:
    try:
        vector = torch.tensor([float(x) for x in numbers], dtype=torch.float32)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}; each line must contain a word and its vector.") from error
    if not len(vector) or not bool(vector.isfinite().all()):
        raise WeightsError(f"{where}: the vector is empty or not finite; download the file again.")
    return vector
