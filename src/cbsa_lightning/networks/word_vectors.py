"""Word vectors of the class names: GloVe vectors from a file, or CLIP text features as a substitute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.errors import WeightsError, listed
from cbsa_lightning.io.reading import open_regular

ENTRY = 0.35  # root mean square of the entries of GloVe's 300-dimensional vectors of common words


class WordVectors:
    """Base class: one vector per class.

    Attributes:
        vectors: ``(C, d)`` float32.
    """

    vectors: Tensor


WordVectorsCallable = Callable[[Sequence[str]], WordVectors]
"""Creates the vectors from the class names."""


class GloVe(WordVectors):
    """Reads the vectors from a GloVe text file; a name of several words gets the mean of their vectors.

    Words are looked up as written, then in lower case.

    Args:
        class_names: The C class names.
        file: A text file with a word and its numbers on each line, such as ``glove.840B.300d.txt``.

    Raises:
        WeightsError: The file does not exist, is not a GloVe file, or lacks words; names the words and their classes.
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
                f"{file} has no vector for {listed(missing)}. Use other class names for prompts (prompt_names), a file "
                "with these words, or ClipWords, which needs no file of words."
            )
        self.vectors = torch.stack(vectors)


class ClipWords(WordVectors):
    """CLIP text features of "a photo of a ..." as word vectors.

    A substitute if no GloVe file is available; none of the original systems uses it. The features are scaled to the
    size of GloVe's entries, for which the following layers were designed.

    Args:
        class_names: The C class names.
        clip: open_clip model, folder or configuration file; "embedded" is the small one inside this package.
        pretrained: open_clip weights tag or a file, or "random". Folders bring their own: leave it out.

    Raises:
        ConfigError: There is no such model.
        WeightsError: Its weights are not available.
    """

    def __init__(
        self, class_names: Sequence[str], clip: str = "RN50-quickgelu", pretrained: str | None = "openai"
    ) -> None:
        text = FrozenCLIP.load(clip, pretrained).encode_texts([f"a photo of a {name}." for name in class_names])
        unit = nn.functional.normalize(text.float(), dim=-1)
        self.vectors = unit * ENTRY * unit.shape[1] ** 0.5


def _read(file: Path, needed: set[str]) -> dict[str, Tensor]:
    """Reads the needed vectors line by line, since the file may be larger than memory."""
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
                if len(numbers) == size:  # else a word with a space in it, of which the larger files have some
                    found[word.decode()] = _vector(numbers, f"{file}, line {number}")
    except OSError as error:
        raise WeightsError(
            f"{file}: no GloVe vectors can be read ({error.strerror}). Download glove.840B.300d from "
            "nlp.stanford.edu/projects/glove and give its text file, or use ClipWords."
        ) from error
    return found


def _vector(numbers: list[bytes], where: str) -> Tensor:
    try:
        vector = torch.tensor([float(x) for x in numbers], dtype=torch.float32)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}; a line must contain a word and its numbers.") from error
    if not len(vector) or not bool(vector.isfinite().all()):
        raise WeightsError(f"{where}: the vector is empty or not finite; get the file again.")
    return vector
