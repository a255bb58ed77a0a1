"""The errors that this library raises: each says what was found, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_LONGEST = 5000


class CBSAError(Exception):
    """Base of all errors that this library raises on purpose; a long text from a file is cut out of the message."""

    def __str__(self) -> str:
        text = super().__str__()
        # The beginning has the place, the end the remedy.
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 3 // 5]} ... {text[-_LONGEST // 5 :]}"


class DataError(CBSAError, ValueError):
    """An image, annotation file, table or split that cannot be used as it is."""


class ConfigError(CBSAError, ValueError):
    """Settings that do not fit each other or the data."""


class WeightsError(CBSAError, RuntimeError):
    """Pretrained weights that are missing, or not what the settings expect."""


class CheckpointError(CBSAError, RuntimeError):
    """A checkpoint that does not belong to this model, or cannot be read."""


class NotFiniteError(CBSAError, ArithmeticError):
    """A loss, score or weight that is NaN or infinite: training has diverged."""


class OutputError(CBSAError, OSError):
    """A file that the system refuses to write: a full disk, or a folder that is read-only.

    Args:
        errno: The system's number of the reason, or None.
        strerror: The system's words for it.
        filename: The file; what it was before, it still is.
    """

    def __str__(self) -> str:
        return (
            f"{self.filename}: cannot be written ({self.strerror}). What was there before is untouched. Make room, or "
            "choose a folder that can be written to, then start again; `cbsa fit --resume` resumes a run."
        )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, the one that it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def listed(items: Iterable[object], limit: int = 20) -> str:
    """Joins ``items`` for a message: at most ``limit`` of them, then how many more there are."""
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:limit])
    return shown if len(texts) <= limit else f"{shown} ... and {len(texts) - limit} more"
