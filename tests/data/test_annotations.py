"""AnnotationTable and class files: contents and errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbsa_lightning.data import annotations
from cbsa_lightning.data.annotations import AnnotationTable, as_strings, read_class_file, repeated_rows
from cbsa_lightning.data.class_names import duplicates
from cbsa_lightning.errors import DataError
from layouts import write_image


def table(paths=("a.jpg", "b/c.png"), labels=((1, 0), (-1, 1)), names=("cat", "tv_monitor"), **more):
    return AnnotationTable(Path("/images"), np.array(paths), np.array(labels), names, **more)


def test_types_of_columns():
    t = table()
    assert isinstance(t.paths.dtype, np.dtypes.StringDType)
    assert t.labels.dtype == np.int8
    assert (len(t), t.num_classes) == (2, 2)
    assert t.prompt_names == ("cat", "tv monitor")
    assert t.file(1) == Path("/images/b/c.png")


def test_absolute_path_is_kept():
    assert table(paths=("a.jpg", "/else/b.jpg")).file(1) == Path("/else/b.jpg")


def test_class_names_are_normalized():
    t = table(names=("  cafe\u0301 ", "cat"))
    assert t.class_names == ("caf\u00e9", "cat")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [[1, 0]]}, ["(1, 2)", "(2, 2)"]),
        ({"labels": [[1, 0], [2, 0]]}, ["2", "row 1", "'cat'", "-1 (unknown)"]),
        ({"labels": [[1, 0], [0, 256]]}, ["256", "row 1", "tv_monitor"]),
        ({"labels": [[1, 0], [0, 0.5]]}, ["0.5", "row 1"]),
        ({"labels": [[1, 0], [0, np.nan]]}, ["nan", "row 1"]),
        ({"labels": np.array([[1, 0], [0, 3]], dtype=np.int8)}, ["3", "row 1"]),
        ({"paths": ["a.jpg", "a.jpg"]}, ["'a.jpg'", "rows 0 and 1"]),
        ({"paths": ["a.jpg", ""]}, ["row 1", "empty path"]),
        ({"paths": [["a.jpg", "b.jpg"]]}, ["(1, 2)"]),
        ({"names": ("caf\u00e9", " cafe\u0301")}, ["classes 0 and 1"]),
        ({"names": ("cat", " ")}, ["class 1", "empty name"]),
        ({"names": (), "labels": np.zeros((2, 0))}, ["no classes"]),
        ({"names": ("tv_set", "TV  set")}, ["'tv_set'", "same prompt text"]),
        ({"prompt_names": ("pet", "Pet")}, ["'cat' and 'tv_monitor'", "same prompt text"]),
        ({"prompt_names": ("pet",)}, ["1 prompt names for 2 classes"]),
        ({"prompt_names": ("pet", "")}, ["'tv_monitor'", "empty prompt"]),
    ],
)
def test_refused(change, words):
    with pytest.raises(DataError) as error:
        table(**change)
    for word in words:
        assert word in str(error.value)


def test_at_most_twenty_offenders_are_listed():
    with pytest.raises(DataError, match=r"row 19, class 'cat'\) \.\.\. and 5 more"):
        table(paths=[f"{i}.jpg" for i in range(25)], labels=[[7, 0]] * 25)


def test_select():
    t = table().select([1])
    assert t.paths.tolist() == ["b/c.png"]
    assert t.labels.tolist() == [[-1, 1]]
    assert len(t.select([])) == 0
    with pytest.raises(DataError, match="rows 0 and 1"):
        table().select([0, 0])


def test_digest_depends_on_content_and_not_on_root():
    a = table()
    assert AnnotationTable(Path("/other"), a.paths, a.labels, a.class_names).digest() == a.digest()
    others = [
        table(labels=((1, 0), (0, 1))),
        table(paths=("a.jpg", "b/d.png")),
        table(names=("dog", "tv_monitor")),
        table(paths=("b/c.png", "a.jpg")),
    ]
    assert len({a.digest(), *(t.digest() for t in others)}) == 5


@given(st.lists(st.text(min_size=1).filter(lambda s: "\0" not in s), min_size=1, max_size=6, unique=True))
def test_any_text_can_be_a_path_and_has_a_digest(paths):
    t = AnnotationTable(Path(), np.array(paths, dtype=np.dtypes.StringDType()), np.zeros((len(paths), 1)), ("a",))
    assert t.paths.tolist() == paths
    assert t.digest() == t.select(np.arange(len(paths))).digest()


@pytest.fixture
def small_blocks(monkeypatch):
    """Uses blocks of two rows, so that a few rows suffice to test block boundaries."""
    monkeypatch.setattr(annotations, "_ROWS", 2)


def any_paths(alphabet=None, **sizes):
    characters = st.characters(exclude_characters="\0", exclude_categories=("Cs",)) if alphabet is None else alphabet
    return st.lists(st.text(characters, min_size=1), **sizes)


def test_a_column_of_strings_is_not_copied():
    # Ten million paths need 0.6 GB, and numpy would copy for another instance of the type.
    paths = np.array(["a.jpg", "b.jpg"], dtype=np.dtypes.StringDType())
    assert AnnotationTable(Path("/images"), paths, np.zeros((2, 1)), ("a",)).paths is paths
    assert as_strings(["a", "\U0001f600"]).tolist() == ["a", "\U0001f600"]


@given(st.data())
def test_repeated_rows_equal_those_of_a_plain_search(data):
    # Texts that look equal differ: composed and decomposed letters, an embedded NUL, a trailing space.
    texts = st.sampled_from(["a", "A", "caf\u00e9", "cafe\u0301", "\U0001f600", "a\0", "a\0b", "a ", "x" * 40])
    paths = data.draw(st.lists(texts | st.text(st.characters(exclude_categories=("Cs",))), max_size=12))
    assert repeated_rows(as_strings(paths)) == duplicates(paths)


def test_paths_with_equal_hashes_are_distinguished(monkeypatch):
    monkeypatch.setattr(annotations, "hash", lambda text: 7, raising=False)
    assert repeated_rows(as_strings(["a", "b", "c"])) == []
    assert repeated_rows(as_strings(["a", "b", "c", "b", "a", "b"])) == [(1, 3), (0, 4), (1, 5)]


def test_digest_is_pinned(small_blocks):
    # Computed by the first release; a change here would refuse every saved split.
    paths = ["a.jpg", 'b/c "quoted".png', "\u00e9t\u00e9/\u732b\U0001f600.jpg", "back\\slash\t.jpg"]
    t = table(paths=paths, labels=((1, 0), (-1, 1), (0, 0), (-1, -1)))
    assert t.digest() == "d24b238a1990e9947bc454042ffe54beeabc054147f83475a67d7d2a59c35bba"
    assert t.select([]).digest() == "cb0df4d6d61705ffd77d057d6626a1719bda4e3c5846f04d5ed3565eddbbd49d"


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None)
@given(any_paths(max_size=7, unique=True), st.booleans())
def test_digest_does_not_depend_on_blocks(paths, by_column):
    labels = np.arange(3 * len(paths)).reshape(len(paths), 3).astype(np.int8) % 3 - 1
    t = table(paths=as_strings(paths), labels=np.asfortranarray(labels) if by_column else labels, names=("a", "b", "c"))
    plain = hashlib.sha256()
    for part in (("a", "b", "c"), paths):
        plain.update(json.dumps(part, ensure_ascii=False).encode())
    plain.update(labels.tobytes())
    assert t.digest() == plain.hexdigest()


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None)
@given(
    any_paths("ab./\\:", max_size=6, unique=True),
    any_paths("ab./\\:", max_size=6, unique=True),
    *[st.sampled_from(["", ".", "/", "//a", "a", "/a", "/a/b/", "/a/./b", "a/../b"])] * 2,
)
def test_shared_files_have_equal_full_paths(ours, theirs, our_root, their_root):
    def one(root, paths):
        return AnnotationTable(Path(root), as_strings(paths), np.zeros((len(paths), 1)), ("a",))

    a, b = one(our_root, ours), one(their_root, theirs)
    seen = {str(a.file(i)) for i in range(len(a))}
    assert a.shared_files(b) == [str(b.file(i)) for i in range(len(b)) if str(b.file(i)) in seen]
    assert a.shared_files(a) == [str(a.file(i)) for i in range(len(a))]


def test_shared_files_across_roots():
    ours = AnnotationTable(Path("/data"), ["train/a.jpg", "train/b.jpg", "/else/c.jpg"], np.zeros((3, 1)), ("a",))
    theirs = AnnotationTable(
        Path("/data/train"), ["b.jpg", "d.jpg", "../../else/c.jpg", "./a.jpg"], np.zeros((4, 1)), ("a",)
    )
    assert ours.shared_files(theirs) == ["/data/train/b.jpg", "/data/train/a.jpg"]
    assert theirs.shared_files(ours) == ["/data/train/a.jpg", "/data/train/b.jpg"]


@pytest.mark.usefixtures("small_blocks")
def test_missing_files_in_interleaved_folders(tmp_path):
    rng = np.random.default_rng(0)
    paths = [f"{folder}{i}.jpg" for folder in ("", "a/", "a/b/", "a//") for i in range(12)]
    paths = [paths[i] for i in rng.permutation(len(paths))]
    (tmp_path / "a" / "b").mkdir(parents=True)
    for path in paths[::2]:
        (tmp_path / path).touch()
    t = AnnotationTable(tmp_path, paths, np.zeros((len(paths), 1)), ("cat",))
    assert t.missing_files() == [f"{p} (row {i})" for i, p in enumerate(paths) if not (tmp_path / p).is_file()]
    assert t.select([]).missing_files() == []


def test_missing_files(tmp_path):
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b" / "c.png")
    (tmp_path / "b" / "folder.png").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}_outside.jpg"
    write_image(outside)
    paths = ["a.jpg", "x.jpg", "b/c.png", "b/folder.png", "no/d.png", str(outside), "/no/e.jpg"]
    t = AnnotationTable(tmp_path, np.array(paths), np.zeros((7, 1)), ("cat",))
    assert t.missing_files() == [
        "x.jpg (row 1)",
        "b/folder.png (row 3)",
        "no/d.png (row 4)",
        "/no/e.jpg (row 6)",
    ]
    with pytest.raises(DataError, match=r"4 of 7 images .* x\.jpg \(row 1\)"):
        t.require_files()
    t.select([0, 2, 5]).require_files()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_class_file(tmp_path):
    f = read_class_file(
        write(
            tmp_path / "c.yaml",
            "\ufeffdiningtable: dining table\nno:\n7: seven\nnull_class: null\n"
            "tvmonitor: {prompt: tv monitor, synonyms: [tv, television]}\nbig_cat: {synonyms: [lion]}\n",
        )
    )
    assert f.class_names == ("diningtable", "no", "7", "null_class", "tvmonitor", "big_cat")
    assert f.prompt_names == ("dining table", "no", "seven", "null class", "tv monitor", "big cat")
    assert f.index()["television"] == 4
    assert f.index()["lion"] == 5


def test_class_file_json(tmp_path):
    content = {"sofa": "couch", "tv": {"synonyms": ["screen"]}, "smile": "\U0001f600", "cow": None}
    f = read_class_file(write(tmp_path / "c.json", json.dumps(content, indent="\t")))
    assert f.prompt_names == ("couch", "tv", "\U0001f600", "cow")
    assert f.synonyms == {"screen": "tv"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("cat: a\ncat: b\n", "'cat' (classes 0 and 1)"),
        ("cat: pet\ndog: Pet\n", "same prompt text"),
        ("cat: {synonyms: [dog]}\ndog:\n", "'dog'"),
        ("cat: {synonyms: [pet]}\ndog: {synonyms: [pet]}\n", "'pet'"),
        ("cat: {promt: pet}\n", "promt"),
        ("cat: {prompt: a, prompt: b}\n", "prompt"),
        ("cat: [a, b]\n", "prompt must be a string"),
        ("cat: {synonyms: kitty}\n", "synonyms a list"),
        ("- cat\n- dog\n", "maps class names"),
        ("cat: {a: b\n", "cannot be read"),
        ("", "maps class names"),
        ("{}", "no classes"),
        ("? [a, b]\n: c\n", "maps class names"),
    ],
)
def test_class_file_refused(tmp_path, text, word):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(DataError) as error:
        read_class_file(path)
    assert word in str(error.value)
    assert str(path) in str(error.value)


def test_class_file_json_with_a_repeated_key(tmp_path):
    with pytest.raises(DataError, match="classes 0 and 1"):
        read_class_file(write(tmp_path / "c.json", '{"cat": "a", "cat": "b"}'))


def test_class_file_missing(tmp_path):
    with pytest.raises(DataError, match="the class file does not exist"):
        read_class_file(tmp_path / "none.yaml")


def test_prompts_for_a_data_set(tmp_path):
    f = read_class_file(write(tmp_path / "c.yaml", "sofa: couch\ntv: {prompt: television, synonyms: [tvmonitor]}\n"))
    assert f.prompts_for(["tvmonitor", "dining_table", "sofa"]) == ("television", "dining table", "couch")
    with pytest.raises(DataError, match=r"'sofa' is not one of the 2 classes.*did you mean 'sofas'"):
        f.prompts_for(["sofas", "tv"])
    with pytest.raises(DataError, match="same prompt text"):
        f.prompts_for(["tv", "tvmonitor", "sofa"])


def laughs(depth, form):
    """Returns aliases of aliases: the last of ``depth`` lines expands to 9 ** depth names."""
    lines = ["a0: &a0 lol"]
    for i in range(1, depth):
        names = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} " + form.replace("#", names))
    return "\n".join(lines)


@pytest.mark.parametrize("form", ["[#]", "{prompt: x, synonyms: [#]}"])
def test_class_file_with_a_billion_laughs_is_refused_at_once(tmp_path, form):
    file = tmp_path / "c.yaml"
    file.write_text(laughs(12, form))
    with pytest.raises(DataError, match=r"c\.yaml, line \d+: .*alias"):
        read_class_file(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [*x]", "line 1: .*alias"),
        ("sofa:\na: &x {prompt: b}\nc: *x", "line 2: .*alias"),
        ("a: *x", "undefined alias"),
        (
            "sofa:\na: !!python/object/apply:os.system ['touch ran']",
            "line 2: the tag 'tag:yaml.org,2002:python/object/apply",
        ),
        ("a: !!python/name:os.system", "line 1: the tag"),
        ("!!binary aGk=: cat", "line 1: the tag"),
        ("!!set {a, b}", "line 1: the tag"),
        ("a: !own b", "line 1: the tag '!own'"),
        ("a: b\n---\nc: d", "single document"),
        ("[" * 5_000, "recursion"),
        ("? [a, b]\n: c", "maps class names"),
        ("&a cat: *a", "alias"),
    ],
)
def test_class_file_with_values_other_than_strings(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        read_class_file(file)
    assert str(file) in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_class_file_too_large(tmp_path):
    """COCO's annotations, given as a class file, would take hours to read as YAML."""
    file = tmp_path / "instances.json"
    with file.open("wb") as stream:
        stream.truncate(330_000_000)
    with pytest.raises(
        DataError, match=r"instances\.json: the file has 330\.0 MB, but at most 4\.2 MB are allowed; correct the path"
    ):
        read_class_file(file)


def test_class_file_json_that_is_too_deep(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"c\.json: the file cannot be read .*recursion"):
        read_class_file(file)


@pytest.mark.parametrize("names", [("cat", "\ud800"), ("\udcff",)])
def test_names_that_no_file_can_store(names):
    with pytest.raises(DataError, match=r"lone surrogate.*\\ud[8c]"):
        AnnotationTable(Path("x"), as_strings([]), np.zeros((0, len(names)), np.int8), names)


def test_paths_that_no_table_can_store():
    with pytest.raises(DataError, match=r"row 1 of an annotation table: the path 'b\\udcff\.jpg' is not valid Unicode"):
        AnnotationTable(Path("x"), np.array(["a.jpg", "b\udcff.jpg"], object), np.zeros((2, 1), np.int8), ("cat",))


def test_a_path_with_a_nul_is_a_missing_file(tmp_path):
    table = AnnotationTable(tmp_path, as_strings(["a\0b/c.jpg", "d\0.jpg"]), np.zeros((2, 1), np.int8), ("cat",))
    assert len(table.missing_files()) == 2


def test_long_names_do_not_fill_a_message():
    long = "x" * 10**6
    for names, paths in (((long, long), ["a"]), (("cat",), [long, long]), (("cat", "dog"), ["a"])):
        prompts = (long, long) if names == ("cat", "dog") else ()
        with pytest.raises(DataError) as error:
            AnnotationTable(Path("x"), as_strings(paths), np.zeros((len(paths), len(names)), np.int8), names, prompts)
        assert len(str(error.value)) < 1500
