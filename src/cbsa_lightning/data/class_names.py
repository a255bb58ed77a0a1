"""Names of classes: their normal form, their prompt texts, and the class file that changes these."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, read_text

_LARGEST_FILE = 4 << 20  # bytes; a hundred thousand classes have less, and YAML takes seconds for each


def clean_name(name: str) -> str:
    """Normal form of a class name: Unicode NFC without surrounding white space. Case matters."""
    return unicodedata.normalize("NFC", name).strip()


def default_prompts(class_names: Iterable[str]) -> tuple[str, ...]:
    """Class names as put in prompts when nobody says otherwise: underscores become spaces (CoOp's habit)."""
    return tuple(name.replace("_", " ") for name in class_names)


def duplicates(items: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (first position, later position) of equal items."""
    if len(set(items)) == len(items):  # the usual case, without building a dictionary of positions
        return []
    first: dict[str, int] = {}
    return [(first[item], i) for i, item in enumerate(items) if first.setdefault(item, i) != i]


def check_class_names(class_names: Sequence[str], where: str) -> tuple[str, ...]:
    """Normalizes class names.

    Args:
        class_names: Names as found.
        where: What to call their place in a message.

    Raises:
        DataError: There is none, or one is empty, or two are equal once normalized.
    """
    names = tuple(clean_name(name) for name in class_names)
    if not names:
        raise DataError(f"{where}: no classes; at least one is needed")
    if "" in names:
        raise DataError(f"{where}: class {names.index('')} has an empty name; name it")
    if wrong := [k for k, name in enumerate(names) if any("\ud800" <= mark <= "\udfff" for mark in name)]:
        found = listed(f"{brief(names[k])} (class {k})" for k in wrong)
        raise DataError(
            f"{where}: names with half a character (a lone surrogate), which no file can hold: {found}; correct them"
        )
    if pairs := duplicates(names):
        found = listed(f"{brief(names[i])} (classes {i} and {j})" for i, j in pairs)
        raise DataError(f"{where}: the same class twice, after Unicode NFC and strip: {found}; keep one")
    return names


def check_prompt_names(class_names: Sequence[str], prompt_names: Sequence[str], where: str) -> tuple[str, ...]:
    """Normalizes prompt names and refuses two classes that the text tower could not tell apart.

    CLIP's tokenizer lower-cases and collapses white space, and prompts replace "_" by a space: texts are
    compared after that.

    Raises:
        DataError: Wrong count, an empty text, or the same text for two classes.
    """
    prompts = tuple(clean_name(prompt) for prompt in prompt_names)
    if len(prompts) != len(class_names):
        raise DataError(f"{where}: {len(prompts)} prompt names for {len(class_names)} classes; give one each")
    if "" in prompts:
        unnamed = class_names[prompts.index("")]
        raise DataError(f"{where}: class {brief(unnamed)} has an empty prompt name; write one")
    seen_by_tower = [" ".join(prompt.replace("_", " ").casefold().split()) for prompt in prompts]
    if pairs := duplicates(seen_by_tower):
        found = listed(f"{brief(class_names[i])} and {brief(class_names[j])} ({brief(prompts[j])})" for i, j in pairs)
        alike = all(class_names[i].casefold() == class_names[j].casefold() for i, j in pairs)
        remedy = "if they mean one class, write them alike; if not, give each a prompt name of its own in a class file"
        what = "classes that differ only in case" if alike else "classes with the same prompt text"
        raise DataError(f"{where}: {what}: {found}; {remedy}")
    return prompts


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or nothing."""
    by_fold = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), by_fold, n=1)
    return f" (did you mean {brief(by_fold[close[0]])}?)" if close else ""


@dataclass(frozen=True)
class ClassFile:
    """What a class file says: classes, their prompt names, and other names that mean the same class.

    Attributes:
        path: The file, for messages.
        class_names: C classes in the order of the file.
        prompt_names: C prompt names.
        synonyms: Other name -> class.
    """

    path: Path
    class_names: tuple[str, ...]
    prompt_names: tuple[str, ...]
    synonyms: Mapping[str, str]

    def index(self) -> dict[str, int]:
        """Every name that means a class, synonyms too -> position of the class in the file."""
        position = {name: k for k, name in enumerate(self.class_names)}
        return position | {other: position[name] for other, name in self.synonyms.items()}

    def prompts_for(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """Prompt names for the classes of a data set; a class that the file leaves out keeps its default.

        Raises:
            DataError: The file has a class that the data set does not have, neither by its name nor by a
                synonym, or two classes end up with the same prompt text.
        """
        position = self.index()
        in_file = [position.get(clean_name(name)) for name in class_names]
        for k in sorted(set(range(len(self.class_names))) - set(in_file)):
            name = self.class_names[k]
            raise DataError(
                f"{self.path}: class {brief(name)} is none of the {len(class_names)} classes of the data set"
                f"{did_you_mean(name, class_names)}; correct the name or take it out of the file"
            )
        prompts = [
            default if k is None else self.prompt_names[k]
            for k, default in zip(in_file, default_prompts(class_names), strict=True)
        ]
        return check_prompt_names(class_names, prompts, str(self.path))


def prompts_from(class_file: str | None, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Prompt names of ``class_names``: from a class file where there is one, else the default."""
    if class_file is None:
        return default_prompts(class_names)
    return read_class_file(class_file).prompts_for(class_names)


def read_class_file(path: str | Path) -> ClassFile:
    """Reads a class file: a mapping from class to prompt name, in YAML, or in JSON if it ends in ".json".

    A value is a prompt name, nothing (then the class name with "_" as a space), or a mapping with
    ``prompt`` and ``synonyms``, both optional::

        diningtable: dining table
        person:
        tvmonitor: {prompt: tv monitor, synonyms: [tv, television]}

    Every scalar is text: ``no`` and ``7`` are names like others.

    Raises:
        DataError: The file is missing, has more than 4 MiB, or is no such mapping; it has aliases or tags of YAML; a
            class, synonym or prompt text occurs twice.
    """
    path = Path(path)
    entries = _read_pairs(path)
    names = check_class_names([name for name, _ in entries], str(path))
    prompts: list[str] = []
    synonyms: list[tuple[str, str]] = []
    for name, (_, value) in zip(names, entries, strict=True):
        prompt, others = _entry(value, f"{path}: class {brief(name)}")
        prompts.append(prompt or name.replace("_", " "))
        synonyms += [(clean_name(other), name) for other in others]
    check_class_names([*names, *(other for other, _ in synonyms)], f"{path}, classes and synonyms")
    return ClassFile(path, names, check_prompt_names(names, prompts, str(path)), dict(synonyms))


class _Pairs(list[tuple[str, Any]]):
    """A mapping as it was written, so that a key that stands there twice is seen."""


def _entry(value: Any, where: str) -> tuple[str, list[str]]:
    """Prompt ("" for the default) and synonyms of one class."""
    pairs = value if isinstance(value, _Pairs) else _Pairs([("prompt", value)])
    keys = [key for key, _ in pairs]
    if wrong := [key for k, key in enumerate(keys) if key not in ("prompt", "synonyms") or key in keys[:k]]:
        raise DataError(f"{where} has {listed(map(brief, wrong))}; only one prompt and one synonyms are understood")
    fields = dict(pairs)
    prompt, others = fields.get("prompt") or "", fields.get("synonyms") or []
    texts = isinstance(others, list) and all(isinstance(text, str) for text in (prompt, *others))
    if not texts:
        raise DataError(f"{where}: prompt must be a text and synonyms a list of texts")
    return prompt, others


def _read_pairs(path: Path) -> _Pairs:
    try:
        text = read_text(path, _LARGEST_FILE)
        if path.suffix.lower() == ".json":
            content = json.loads(text, object_pairs_hook=_Pairs)
        else:
            content = _plain(yaml.compose(text, Loader=yaml.SafeLoader), path, set())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no class file here; correct the path") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML or JSON ({error}); correct the file") from error
    if not isinstance(content, _Pairs) or not all(isinstance(key, str) for key, _ in content):
        raise DataError(f"{path}: a class file maps class names to prompt names, as in 'sofa: couch'")
    return content


def _plain(node: Any, path: Path, seen: set[int]) -> Any:
    """A YAML node as text, list or pairs; null is "".

    ``seen`` are the nodes so far: one that comes again is an alias, and a few lines of aliases stand for billions of
    values.
    """
    if node is None:
        return ""
    where = f"{path}, line {node.start_mark.line + 1}"
    if id(node) in seen:
        raise DataError(f"{where}: what stands here is used again by an alias (*); write it out where it is meant")
    seen.add(id(node))
    if node.tag not in _TAGS:
        raise DataError(f"{where}: the tag {brief(node.tag)} means nothing here; a class file holds texts: take it out")
    if isinstance(node, yaml.MappingNode):
        return _Pairs([(_plain(key, path, seen), _plain(value, path, seen)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, seen) for item in node.value]
    return "" if node.tag == f"{_CORE}null" else node.value


_CORE = "tag:yaml.org,2002:"
# What plain texts, lists and mappings resolve to.
_TAGS = {
    f"{_CORE}{kind}" for kind in ("null", "bool", "int", "float", "timestamp", "merge", "value", "str", "seq", "map")
}
