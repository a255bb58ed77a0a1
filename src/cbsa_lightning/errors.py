"""Errors raised by this library. Each message states the problem, its location and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_LONGEST = 5000


class CBSAError(Exception):
    """Base class of all errors that this library raises on purpose. Very long messages are shortened."""

    def __str__(self) -> str:
        text = super().__str__()
        # A message starts with the location and ends with the remedy, so both ends are kept.
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 3 // 5]} ... {text[-_LONGEST // 5 :]}"


class DataError(CBSAError, ValueError):
    """An image, annotation file, table or split that cannot be used."""


class ConfigError(CBSAError, ValueError):
    """Settings that contradict each other or are not compatible with the data."""


class WeightsError(CBSAError, RuntimeError):
    """Pretrained weights that are missing or do not match the settings."""


class CheckpointError(CBSAError, RuntimeError):
    """A checkpoint that does not match the model or cannot be read."""


class NotFiniteError(CBSAError, ArithmeticError):
    """A loss, score or weight that is NaN or infinite, because training has diverged."""


class OutputError(CBSAError, OSError):
    """A file that cannot be written, for example because the disk is full or the folder is read-only.

    The arguments are those of ``OSError``: the error number of the operating system or None, its error message, and the
    file. The previous content of the file is unchanged.
    """

    def __str__(self) -> str:
        return (
            f"{self.filename}: cannot be written ({self.strerror}). The previous content is unchanged. Free some space "
            "or choose a writable folder, then start again; `cbsa fit --resume` resumes a run."
        )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, its cause, the cause of that error, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def listed(items: Iterable[object], limit: int = 20) -> str:
    """Joins ``items`` for a message. At most ``limit`` of them are shown, followed by the number of omitted items."""
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:limit])
    return shown if len(texts) <= limit else f"{shown} ... and {len(texts) - limit} more"
