"""Normalized class names, their prompt texts, and the class file that customizes both."""

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

_LARGEST_FILE = 4 << 20  # bytes; enough for 100,000 classes. Parsing YAML takes seconds per MiB.


def clean_name(name: str) -> str:
    """Normalizes a class name to Unicode NFC and strips white space. Case is preserved."""
    return unicodedata.normalize("NFC", name).strip()


def default_prompts(class_names: Iterable[str]) -> tuple[str, ...]:
    """Returns the default prompt texts, which are class names with underscores replaced by spaces, as in CoOp."""
    return tuple(name.replace("_", " ") for name in class_names)


def duplicates(items: Sequence[str]) -> list[tuple[int, int]]:
    """Returns pairs (first position, later position) of equal items."""
    if len(set(items)) == len(items):  # in the usual case, positions are not needed
        return []
    first: dict[str, int] = {}
    return [(first[item], i) for i, item in enumerate(items) if first.setdefault(item, i) != i]


def check_class_names(class_names: Sequence[str], where: str) -> tuple[str, ...]:
    """Normalizes and checks class names.

    Args:
        class_names: Original names.
        where: Name of their source for error messages.

    Raises:
        DataError: If there are no names, a name is empty, or two names are equal after normalization.
    """
    names = tuple(clean_name(name) for name in class_names)
    if not names:
        raise DataError(f"{where}: there are no classes; at least one is required")
    if "" in names:
        raise DataError(f"{where}: class {names.index('')} has an empty name; enter a name")
    if wrong := [k for k, name in enumerate(names) if any("\ud800" <= mark <= "\udfff" for mark in name)]:
        found = listed(f"{brief(names[k])} (class {k})" for k in wrong)
        raise DataError(
            f"{where}: names with a lone surrogate (half a character) cannot be stored: {found}; correct them"
        )
    if pairs := duplicates(names):
        found = listed(f"{brief(names[i])} (classes {i} and {j})" for i, j in pairs)
        raise DataError(f"{where}: classes that occur twice (after Unicode NFC and strip): {found}; keep one of each")
    return names


def check_prompt_names(class_names: Sequence[str], prompt_names: Sequence[str], where: str) -> tuple[str, ...]:
    """Normalizes prompt names, and rejects names that result in the same prompt text.

    CLIP's tokenizer converts texts to lower case and collapses white space, and prompts replace "_" with a space. Names
    are compared after these changes.

    Raises:
        DataError: If the count is wrong, a text is empty, or two classes have the same text.
    """
    prompts = tuple(clean_name(prompt) for prompt in prompt_names)
    if len(prompts) != len(class_names):
        raise DataError(f"{where}: {len(prompts)} prompt names for {len(class_names)} classes; specify one per class")
    if "" in prompts:
        unnamed = class_names[prompts.index("")]
        raise DataError(f"{where}: class {brief(unnamed)} has an empty prompt name; enter a name")
    seen_by_tower = [" ".join(prompt.replace("_", " ").casefold().split()) for prompt in prompts]
    if pairs := duplicates(seen_by_tower):
        found = listed(f"{brief(class_names[i])} and {brief(class_names[j])} ({brief(prompts[j])})" for i, j in pairs)
        alike = all(class_names[i].casefold() == class_names[j].casefold() for i, j in pairs)
        remedy = "if they are one class, use one spelling; if not, give them different prompt names in a class file"
        what = "classes that differ only in case" if alike else "classes with the same prompt text"
        raise DataError(f"{where}: {what}: {found}; {remedy}")
    return prompts


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion of the closest known name to append to an error message, or an empty string."""
    by_fold = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), by_fold, n=1)
    return f" (did you mean {brief(by_fold[close[0]])}?)" if close else ""


@dataclass(frozen=True)
class ClassFile:
    """Content of a class file, which specifies classes, their prompt names, and synonyms.

    Attributes:
        path: Path of the file, for error messages.
        class_names: The C classes, in the order of the file.
        prompt_names: The prompt names of these classes.
        synonyms: Mapping from synonym to class.
    """

    path: Path
    class_names: tuple[str, ...]
    prompt_names: tuple[str, ...]
    synonyms: Mapping[str, str]

    def index(self) -> dict[str, int]:
        """Maps every class name and synonym to the position of the class in the file."""
        position = {name: k for k, name in enumerate(self.class_names)}
        return position | {other: position[name] for other, name in self.synonyms.items()}

    def prompts_for(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """Returns the prompt names for the classes of a data set. Classes that are not in the file keep the default.

        Raises:
            DataError: If a class in the file is missing from the data set, both under its name and under its
                synonyms, or two classes have the same prompt text.
        """
        position = self.index()
        in_file = [position.get(clean_name(name)) for name in class_names]
        for k in sorted(set(range(len(self.class_names))) - set(in_file)):
            name = self.class_names[k]
            raise DataError(
                f"{self.path}: class {brief(name)} is not one of the {len(class_names)} classes of the data set"
                f"{did_you_mean(name, class_names)}; correct the name or remove it from the file"
            )
        prompts = [
            default if k is None else self.prompt_names[k]
            for k, default in zip(in_file, default_prompts(class_names), strict=True)
        ]
        return check_prompt_names(class_names, prompts, str(self.path))


def prompts_from(class_file: str | None, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the prompt names of ``class_names`` from a class file, or the defaults if there is none."""
    if class_file is None:
        return default_prompts(class_names)
    return read_class_file(class_file).prompts_for(class_names)


def read_class_file(path: str | Path) -> ClassFile:
    """Reads a class file, which maps classes to prompt names in YAML, or in JSON if its name ends with ".json".

    A value is a prompt name, empty (the prompt name is the class name with "_" replaced by a space), or a mapping with
    the optional keys ``prompt`` and ``synonyms``:

        diningtable: dining table
        person:
        tvmonitor: {prompt: tv monitor, synonyms: [tv, television]}

    All scalars are read as text, so ``no`` and ``7`` are valid names.

    Raises:
        DataError: If the file is missing, is larger than 4 MiB, does not have this format, or uses YAML aliases or
            tags; or if a class, synonym or prompt text occurs twice.
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
    """A mapping that is stored as a list of pairs, so that repeated keys can be detected."""


def _entry(value: Any, where: str) -> tuple[str, list[str]]:
    """Returns the prompt name (empty for the default) and the synonyms of a class."""
    pairs = value if isinstance(value, _Pairs) else _Pairs([("prompt", value)])
    keys = [key for key, _ in pairs]
    if wrong := [key for k, key in enumerate(keys) if key not in ("prompt", "synonyms") or key in keys[:k]]:
        raise DataError(f"{where} has {listed(map(brief, wrong))}; only one prompt and one synonyms key are allowed")
    fields = dict(pairs)
    prompt, others = fields.get("prompt") or "", fields.get("synonyms") or []
    texts = isinstance(others, list) and all(isinstance(text, str) for text in (prompt, *others))
    if not texts:
        raise DataError(f"{where}: prompt must be a string and synonyms a list of strings")
    return prompt, others


def _read_pairs(path: Path) -> _Pairs:
    try:
        text = read_text(path, _LARGEST_FILE)
        if path.suffix.lower() == ".json":
            content = json.loads(text, object_pairs_hook=_Pairs)
        else:
            content = _plain(yaml.compose(text, Loader=yaml.SafeLoader), path, set())
    except FileNotFoundError:
        raise DataError(f"{path}: the class file does not exist; correct the path") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: the file cannot be read as YAML or JSON ({error}); correct it") from error
    if not isinstance(content, _Pairs) or not all(isinstance(key, str) for key, _ in content):
        raise DataError(f"{path}: a class file maps class names to prompt names, as in 'sofa: couch'")
    return content


def _plain(node: Any, path: Path, seen: set[int]) -> Any:
    """Converts a YAML node to text, list or pairs. Null is converted to an empty string.

    ``seen`` contains the nodes that have been visited. A node that is repeated is an alias. Aliases are rejected,
    because a few lines with aliases can expand to billions of values.
    """
    if node is None:
        return ""
    where = f"{path}, line {node.start_mark.line + 1}"
    if id(node) in seen:
        raise DataError(f"{where}: this value is reused by an alias (*); repeat the value instead")
    seen.add(id(node))
    if node.tag not in _TAGS:
        raise DataError(
            f"{where}: the tag {brief(node.tag)} is not allowed in a class file, which contains only text; remove it"
        )
    if isinstance(node, yaml.MappingNode):
        return _Pairs([(_plain(key, path, seen), _plain(value, path, seen)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, seen) for item in node.value]
    return "" if node.tag == f"{_CORE}null" else node.value


_CORE = "tag:yaml.org,2002:"
# Tags of plain texts, lists and mappings, all of which are allowed.
_TAGS = {
    f"{_CORE}{kind}" for kind in ("null", "bool", "int", "float", "timestamp", "merge", "value", "str", "seq", "map")
}
