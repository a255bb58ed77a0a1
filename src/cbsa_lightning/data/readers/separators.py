"""Detection of the form in which the cells of a labels column list names."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cbsa_lightning.data.class_names import clean_name
from cbsa_lightning.data.readers.words import begins_a_list
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief

MARKS = (";", "|", ",")
_TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PYTHON_LIST = re.compile(rf"[\[{{]\s*(?:{_TEXT}\s*(?:,\s*{_TEXT}\s*)*(?:,\s*)?)?[\]}}]")
# Minimum number of cells per word, and of different lengths, for blanks to separate names; see `_blanks`.
_CELLS_A_WORD, _LENGTHS = 2, 3

Where = Callable[[str], str]


@dataclass(frozen=True)
class Form:
    """The form in which a cell lists its names.

    Attributes:
        separator: Separator of names. White space means any blanks, and "" means one name per cell.
        lists: Whether cells are lists in the syntax of JSON or Python.
    """

    separator: str = ""
    lists: bool = False

    def __str__(self) -> str:
        if self.lists:
            return "lists of names"
        if not self.separator:
            return "one name per cell"
        return f"names separated by {self.separator!r}" if self.separator.strip() else "names separated by blanks"

    def split(self, cell: str) -> list[str]:
        """Returns the names in a cell.

        Raises:
            ValueError: If cells are lists, but this cell is not a list of strings. The message states what it is.
        """
        if self.lists:
            names = _listed(cell)
        elif not self.separator:
            names = [cell]
        else:
            names = cell.split(self.separator) if self.separator.strip() else cell.split()
        return [clean_name(name) for name in names]


def detect(cells: Sequence[str], where: Where, known: Collection[str] | None = None) -> Form:
    """Detects the form of a column.

    If the classes are known, it is the first form in which each name is a class. Otherwise, cells that begin with "["
    are lists. In other cases, the separator is ";" or "|" if one of them occurs, and "," otherwise. If another mark
    separates names, names may contain commas and blanks. If there is no mark, blanks separate names if a few words form
    many different cells.

    Args:
        cells: The distinct cells that contain names. None of them is empty.
        where: Function that describes the file and the row of a cell, for error messages.
        known: Names and synonyms of the classes, if known.

    Raises:
        DataError: If no form or several forms are possible.
    """
    if known is not None:
        for form in (Form(), *map(Form, (*MARKS, " "))):
            if all(name in known for cell in cells for name in form.split(cell)):
                return form
    if found := [cell for cell in cells if begins_a_list(cell)]:
        return _lists(cells, found, where)
    marks = [mark for mark in MARKS if any(mark in cell for cell in cells)]
    if not marks:
        return _blanks(cells, where)
    if {";", "|"} <= set(marks):
        cell = next(cell for cell in cells if "|" in cell)
        raise DataError(
            f"{where(cell)}: both ';' and '|' occur in labels, such as {brief(cell)}; set separator to the one that "
            "separates names"
        )
    if len(marks) > 1:
        _refuse_mixture(cells, marks[0], where)
    return Form(marks[0])


def _lists(cells: Sequence[str], found: list[str], where: Where) -> Form:
    form = Form(lists=True)
    for cell in found:
        try:
            form.split(cell)
        except ValueError as error:
            raise DataError(
                f"{where(cell)}: labels {brief(cell)} {error}; write a list of names in quotes, or write names with "
                "';' between them"
            ) from None
    if len(found) < len(cells):
        other = next(cell for cell in cells if not begins_a_list(cell))
        raise DataError(
            f"{where(other)}: labels are a list in some rows ({brief(found[0])}), but not here: {brief(other)}; write "
            "all of them in the same form"
        )
    return form


def _listed(cell: str) -> list[str]:
    try:
        names = json.loads(cell)
    except (ValueError, RecursionError):
        # Python's parser is not sufficient, because it reads ['cat' 'dog'], as written by numpy, as one string.
        if not _PYTHON_LIST.fullmatch(cell):
            raise ValueError("are not a list of JSON or Python") from None
        try:
            names = list(ast.literal_eval(cell)) if cell[1:-1].strip() else []
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError("are not a list of JSON or Python") from None
    if isinstance(names, dict):
        raise ValueError("are a JSON object, as in tables of Label Studio, which omit answers (export them as JSON)")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("are a list of something other than strings")
    return names


def _refuse_mixture(cells: Sequence[str], mark: str, where: Where) -> None:
    """Rejects cells in which commas may separate names in addition to ``mark``.

    A name may contain a comma if it occurs together with another name at least once, and its parts are not names
    themselves.
    """
    cell_of: dict[str, str] = {}
    beside: set[str] = set()
    users: defaultdict[str, set[str]] = defaultdict(set)
    for cell in cells:
        names = Form(mark).split(cell)
        for name in names:
            cell_of.setdefault(name, cell)
            for piece in Form(",").split(name):
                users[piece].add(name)
        if len(names) > 1:
            beside.update(names)
    for name, cell in cell_of.items():
        pieces = Form(",").split(name)
        if len(pieces) > 1 and (name not in beside or all(len(users[piece]) > 1 for piece in pieces)):
            raise DataError(
                f"{where(cell)}: {mark!r} separates names in other rows, but {brief(name)} may be {len(pieces)} names "
                f"with ',' between them; use {mark!r} in all rows, or, if it is one name, give separator: {mark!r}"
            )


def _blanks(cells: Sequence[str], where: Where) -> Form:
    """Detects whether a cell is one name, which may contain blanks, or several names that are separated by blanks.

    A cell contains several names only if this is clear: all words of cells with several words also occur in other
    cells, and no word occurs twice in a cell; the number of words per cell takes at least three different values; and
    there are at least twice as many distinct cells as distinct words. For names such as "dining table" and "traffic
    light", some words occur only once.
    """
    words = {" ".join(cell.split()): cell.split() for cell in cells}
    cell_of = {" ".join(cell.split()): cell for cell in cells}
    users: defaultdict[str, int] = defaultdict(int)
    for found in words.values():
        for word in set(found):
            users[word] += 1
    several = {cell: found for cell, found in words.items() if len(found) > 1}
    unclear = [cell for cell, found in several.items() if all(users[word] > 1 for word in found)]
    if not unclear:
        return Form()
    if (
        len(unclear) == len(several)
        and all(len(set(found)) == len(found) for found in several.values())
        and len({len(found) for found in words.values()}) >= _LENGTHS
        and len(words) >= _CELLS_A_WORD * len(users)
    ):
        return Form(" ")
    cell = cell_of[unclear[0]]
    raise DataError(
        f"{where(cell)}: labels {brief(cell)} may be one name or several names separated by blanks, since each of its "
        "words also occurs in other rows; set separator: ' ' for several names or separator: ';' for one name, or list "
        "the classes in a class file"
    )
