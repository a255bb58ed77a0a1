"""Base class of the exports of labeling tools, which contain annotators' answers for each image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cbsa_lightning.arguments import check_kind, check_paths
from cbsa_lightning.data.annotations import AnnotationTable, as_strings
from cbsa_lightning.data.class_names import (
    ClassFile,
    check_class_names,
    check_prompt_names,
    clean_name,
    default_prompts,
    read_class_file,
)
from cbsa_lightning.data.readers.answers import NOTHING, Disagreement, Record, codes_of, decide
from cbsa_lightning.data.readers.source import Source, refuse_repeated, require_named, tidy_paths
from cbsa_lightning.data.readers.structured import counted
from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.io.reading import brief


@dataclass(frozen=True)
class Content:
    """Content of an export.

    Attributes:
        records: The images and their answers.
        class_names: The declared classes, or None if the export contains only the labels in use.
        prompt_names: The prompt names of the classes, or empty for the default names.
        notes: Descriptions of other content, with counts.
    """

    records: list[Record]
    class_names: Sequence[str] | None = None
    prompt_names: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


class Export(Source):
    """Base class of data sets that are exported by labeling tools. A subclass reads the files of one tool.

    The classes are those that the training file declares. If it does not declare classes, they are those of the class
    file, whose synonyms are then accepted as well. Without a class file, they are the labels in use, in sorted order.

    Args:
        train: File with the training images. Images without an answer are unlabeled.
        test: File with the test images.
        root: Folder that image paths are relative to. Defaults to the folder that contains each file.
        class_file: Class file with prompt names (see ``read_class_file``).
        nothing: Labels that mean "seen, and shows no class", such as "none". They are not classes.
        disagreement: Label of a class if the answers for an image differ: "unknown", or "majority" for the label of the
            majority (unknown if there is a tie). With None, several records of an image are an error.

    Raises:
        ConfigError: If an argument has the wrong type.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        root: str | None = None,
        class_file: str | None = None,
        nothing: Sequence[str] = (),
        disagreement: Disagreement | None = None,
    ) -> None:
        kind = type(self).__name__
        if train is None:
            raise ConfigError(f"{kind}: train is None; give the path of an export.")
        check_paths(**{f"{kind}: train": train, f"{kind}: test": test})
        check_paths(**{f"{kind}: root": root, f"{kind}: class_file": class_file})
        check_kind(f"{kind}: nothing", nothing, (list, tuple), "a list of labels")
        if wrong := [label for label in nothing or () if not isinstance(label, str)]:
            raise ConfigError(f"{kind}: nothing must be a list of strings, found {listed(map(brief, wrong))}.")
        self._train, self._test, self._root, self._class_file = train, test, root, class_file
        self._nothing, self._disagreement = frozenset(map(clean_name, nothing or ())), disagreement

    def __repr__(self) -> str:
        return f"{type(self).__name__}(train={self._train!r}, test={self._test!r}, class_file={self._class_file!r})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the training file or the class file, or the labels in use."""
        return self._classes.class_names

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The prompt names of the class file or the export, or the class names with "_" replaced by a space."""
        return self._classes.prompt_names

    def describe(self) -> list[str]:
        """Returns notes on content other than labels and on how labels were derived, with counts."""
        found = []
        for part, content in self._contents.items():
            table, notes = self._tables[part]
            if table is not None:
                found += [f"{self._file(part)}: {note}" for note in (*content.notes, *notes)]
        if self._class_file is None and self._contents["train"].class_names is None:
            found.append(f"{self._train}: the classes are the labels in use, so classes without images are missing")
        return found

    def prepare(self) -> None:
        """Checks that all files exist.

        Raises:
            DataError: If a file does not exist.
        """
        named = [("train", self._train), ("test", self._test), ("class_file", self._class_file)]
        require_named([*named, *self._other_files()])

    def train(self) -> AnnotationTable:
        """Returns images and labels of the training file, without its test images."""
        table, _ = self._tables["train"]
        if table is None:
            raise DataError(f"{self._train}: the file has no images for training; export some of them")
        return table

    def test(self) -> AnnotationTable | None:
        """Returns images and labels of the test file, or the test images of the training file."""
        return self._tables["test"][0]

    def test_under(self, classes: ClassFile) -> AnnotationTable | None:
        """Returns images and labels of the test file for the given classes, without reading the training file."""
        return None if self._test is None else self._make_table(self._read(self._test), self._test, classes)[0]

    @abstractmethod
    def _load(self, file: Path, root: Path) -> Content:
        """Reads a file.

        Raises:
            DataError: If the file is missing or malformed, or contains labels of another type.
        """

    def _other_files(self) -> list[tuple[str, str | None]]:
        """Returns additional files that a subclass reads, together with the names of their arguments."""
        return []

    @cached_property
    def _contents(self) -> dict[str, Content]:
        content = self._read(self._train)
        for_test = [record for record in content.records if record.test]
        if not for_test:
            test = Content([]) if self._test is None else self._read(self._test)
            return {"train": content, "test": test}
        if self._test is not None:
            raise DataError(
                f"{self._train}: the file marks {counted(len(for_test), 'image')} for testing "
                f"({for_test[0].where}), but there is also a test file {self._test}; keep one of the two"
            )
        rest = [record for record in content.records if not record.test]
        names, prompts = content.class_names, content.prompt_names
        return {"train": Content(rest, names, prompts, content.notes), "test": Content(for_test, names, prompts)}

    def _read(self, path: str) -> Content:
        return self._load(Path(path), self._root_of(path))

    def _root_of(self, path: str) -> Path:
        """Returns the folder that contains the images listed in a file."""
        return Path(path).parent if self._root is None else Path(self._root)

    def _file(self, part: str) -> str:
        return self._train if part == "train" or self._test is None else self._test

    @cached_property
    def _classes(self) -> ClassFile:
        file = None if self._class_file is None else read_class_file(self._class_file)
        content = self._contents["train"]
        if content.class_names is None and file is not None:
            if both := sorted(self._nothing & file.index().keys()):
                raise DataError(
                    f"{file.path}: {listed(map(brief, both))} is both a class and in the option nothing; remove "
                    "one of them"
                )
            return file
        if content.class_names is None:
            answers = [answer for record in content.records for answer in record.answers]
            found = sorted({clean_name(name) for answer in answers for name in answer} - self._nothing)
            if not found:
                raise DataError(f"{self._train}: no answer contains a label; label some images, or give class_file")
            prompts, place = default_prompts(found), f"{self._train}, labels in use"
        else:
            keep = [k for k, name in enumerate(content.class_names) if clean_name(name) not in self._nothing]
            found = [content.class_names[k] for k in keep]
            prompts = tuple((content.prompt_names or default_prompts(content.class_names))[k] for k in keep)
            place = f"{self._train}, its classes"
        names = check_class_names(found, place)
        if file is not None:
            return ClassFile(file.path, names, file.prompts_for(names), {})
        return ClassFile(Path(self._train), names, check_prompt_names(names, prompts, place), {})

    @cached_property
    def _tables(self) -> dict[str, tuple[AnnotationTable | None, list[str]]]:
        """Returns the table and the notes of each part."""
        return {
            part: self._make_table(content, self._file(part), self._classes) for part, content in self._contents.items()
        }

    def _make_table(self, content: Content, file: str, classes: ClassFile) -> tuple[AnnotationTable | None, list[str]]:
        if not content.records:
            return None, []
        root = self._root_of(file)
        names, prompts = classes.class_names, classes.prompt_names
        if content.class_names is not None:
            declared = {clean_name(name) for name in content.class_names} - self._nothing
            if differing := sorted(declared ^ set(names)):
                raise DataError(
                    f"{file}: its classes are not those of {classes.path}; they differ in "
                    f"{listed(map(brief, differing))}; use exports of one project"
                )
        records = content.records
        paths = tidy_paths(root, root, [record.image for record in records], lambda i: records[i].where)
        if self._disagreement is None:
            refuse_repeated(paths, lambda i: records[i].where)
        position = classes.index() | dict.fromkeys(self._nothing, NOTHING)
        coded = [[codes_of(answer, record, position) for answer in record.answers] for record in records]
        row = {path: i for i, path in enumerate(dict.fromkeys(paths.tolist()))}
        rows = [row[path] for path in paths.tolist()]
        labels, notes = decide(rows, coded, len(row), len(names), self._disagreement)
        return AnnotationTable(root, as_strings(row), labels, names, prompts), notes
