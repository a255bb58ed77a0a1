"""Custom tables: both forms, both file formats, and errors that name the row."""

from __future__ import annotations

import os
import resource
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbsa_lightning.data.readers import Source, Table, columns, unlabeled
from cbsa_lightning.data.readers.table import read_table
from cbsa_lightning.data.readers.table_reading import TableForm
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.errors import ConfigError, DataError
from layouts import make_table, write_image, write_rows


def text(path: Path, content: str, encoding: str = "utf-8") -> str:
    path.write_bytes(content.encode(encoding))
    return str(path)


def refused(words, call):
    with pytest.raises(DataError) as error:
        call()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("form", ["names", "columns"])
def test_round_trip_of_files(tmp_path, form, suffix):
    train, test = make_table(tmp_path, form=form, suffix=suffix, unlabeled=4)
    source = Table(str(tmp_path / f"train{suffix}"), str(tmp_path / f"test{suffix}"))
    source.prepare()
    t, s = source.train(), source.test()
    assert (t.labels == train).all()
    assert (t.labels[-4:] == -1).all()
    assert (s.labels == test).all()
    assert t.class_names == s.class_names == source.class_names == source.prompt_names == ("cat", "dog", "zebra")
    assert t.missing_files() == s.missing_files() == []
    assert isinstance(source, Source)


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0/\\", exclude_categories=["Cs"]), min_size=1)
PATHS = CELL.map(str.strip).filter(lambda s: s.strip(".") and s[1:2] != ":")
# Unambiguous names; test_label_cells.py covers other cells.
WORDS = {"none", "nothing", "nan", "na", "n/a", "null", "unlabeled", "image", "labels", "<na>", "#n/a"}
NAMES = CELL.map(lambda s: unicodedata.normalize("NFC", s).strip()).filter(
    lambda s: (
        any(mark.isalnum() for mark in s)
        and s.casefold() not in WORDS
        and ";" not in s
        and not s.startswith(tuple("[{'\""))
    )
)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_table_survives_a_round_trip(tmp_path, suffix, data):
    names = data.draw(
        st.lists(NAMES, min_size=1, max_size=4, unique_by=lambda s: " ".join(s.replace("_", " ").casefold().split()))
    )
    paths = data.draw(st.lists(PATHS, min_size=1, max_size=5, unique=True))
    labels = data.draw(hnp.arrays(np.int8, (len(paths), len(names)), elements=st.integers(-1, 1)))
    by_column = write_rows(
        tmp_path / f"columns{suffix}",
        ["image", *(f"c_{name}" for name in names)],
        [[path, *map(str, row)] for path, row in zip(paths, labels.tolist(), strict=True)],
    )
    back = read_table(by_column)
    assert back.paths.tolist() == paths
    assert back.labels.tolist() == labels.tolist()
    known = (labels != -1).all(axis=1)
    cells = [
        ";".join(n for n, v in zip(names, row, strict=True) if v == 1) or "none" if ok else ""
        for row, ok in zip(labels.tolist(), known, strict=True)
    ]
    by_name = write_rows(tmp_path / f"names{suffix}", ["labels", "image"], list(zip(cells, paths, strict=True)))
    form = TableForm(separator=";", labels_column="labels")
    if not (labels[known] == 1).any():
        refused(["no classes"], lambda: read_table(by_name, form=form))
        return
    back = read_table(by_name, form=form)
    assert (back.labels[~known] == -1).all()
    assert back.class_names == tuple(sorted(n for n, seen in zip(names, _seen(labels, known), strict=True) if seen))
    for name, column in zip(back.class_names, back.labels.T, strict=True):
        assert column[known].tolist() == labels[known, names.index(name)].tolist()


def _seen(labels, known):
    return (labels[known] == 1).any(axis=0)


def test_names_form(tmp_path):
    path = text(
        tmp_path / "t.csv",
        "\ufeffid,filename,labels\r\n"
        '1,a.jpg,"dog; cat"\r\n'
        "2,b.jpg,\r\n"
        "\r\n"
        "3,c.jpg,none\r\n"
        "4,sub\\d.jpg, dog \r\n"
        "5,./x/../e.jpg,cat;cat\r\n",
    )
    t = Table(path).train()
    assert t.class_names == ("cat", "dog")
    assert t.paths.tolist() == ["a.jpg", "b.jpg", "c.jpg", "sub/d.jpg", "e.jpg"]
    assert t.labels.tolist() == [[1, 1], [-1, -1], [0, 0], [0, 1], [1, 0]]
    assert t.root == tmp_path


@pytest.mark.parametrize("separator", ["|", ",", " / "])
def test_other_separators(tmp_path, separator):
    path = text(tmp_path / "t.csv", f'image,labels\na.jpg,"dog{separator}cat"\n')
    assert Table(path, separator=separator).train().labels.tolist() == [[1, 1]]


def test_separator_must_not_be_empty():
    with pytest.raises(ConfigError, match="separator must be a nonempty string"):
        Table("t.csv", separator="")


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_delimiters(tmp_path, delimiter):
    rows = [["image", "cat", "dog"], ["a.jpg", "1", ""], ["b.jpg", "0", "-1"]]
    path = text(tmp_path / "t.csv", "".join(delimiter.join(row) + "\n" for row in rows))
    assert Table(path).train().labels.tolist() == [[1, -1], [0, -1]]


def test_columns_form(tmp_path):
    path = text(tmp_path / "t.csv", "zebra,path,ant\n1,a.jpg,0\n1.0,b.jpg,\nTrue,c.jpg,-1\nfalse,d.jpg, 0.0 \n")
    t = Table(path).train()
    assert t.class_names == ("zebra", "ant")
    assert t.labels.tolist() == [[1, 0], [1, -1], [1, -1], [0, 0]]


def test_parquet_types(tmp_path):
    columns = {
        "image": pa.array(["a.jpg", "b.jpg", "c.jpg"]).dictionary_encode(),
        "whole": pa.array([1, 0, None], pa.int8()),
        "gaps": pa.array([1.0, float("nan"), 0.0]),
        "truth": pa.array([True, None, False]),
        "words": pa.array(["1", "", "0"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    t = Table(str(tmp_path / "t.parquet")).train()
    assert t.labels.tolist() == [[1, 1, 1, 1], [0, -1, -1, -1], [-1, 0, 0, 0]]


def test_parquet_list_of_names(tmp_path):
    columns = {"image": ["a.jpg", "b.jpg", "c.jpg"], "labels": [["dog", "cat"], None, []]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert Table(str(tmp_path / "t.parquet")).train().labels.tolist() == [[1, 1], [-1, -1], [0, 0]]


def test_image_column_is_the_first_of_the_known_names(tmp_path):
    t = read_images(text(tmp_path / "t.csv", "file,image\nno.jpg,yes.jpg\n"), ["cat"])
    assert t.paths.tolist() == ["yes.jpg"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is not a header"]),
        ("image,labels\n", ["no rows"]),
        ("picture,labels\na.jpg,cat\n", ["no image column", "'picture'", "image or path or file or filename"]),
        ("image\na.jpg\n", ["no labels"]),
        ("image,cat,dog,cat\na.jpg,1,0,1\n", ["'cat' (columns 2 and 4)"]),
        ("image,caf\u00e9,cafe\u0301\na.jpg,1,0\n", ["columns that occur twice"]),
        ("image,labels\na.jpg,cat\nb.jpg,cat,dog\n", ["row 3", "3 cells, but the header has 2", "b.jpg,cat,dog"]),
        ("image,cat,dog\na.jpg,1,0\nb.jpg,1\n", ["row 3", "2 cells, but the header has 3"]),
        ("image,cat\na.jpg,1\nb.jpg,yes\n", ["class 'cat'", "'yes' (row 3)", "unknown"]),
        ("image,cat\na.jpg,1\nb.jpg,2\n", ["'2' (row 3)"]),
        ("image,cat\na.jpg,1\n,0\n", ["row 3", "empty"]),
        ("image,cat\na.jpg,1\nb.jpg,0\n./a.jpg,0\n", ["'a.jpg' (rows 2 and 4)"]),
        ("image,labels\na.jpg,cat;\n", ["row 2", "is empty", "'none'"]),
        ("image,labels\na.jpg,cat\nb.jpg,none;cat\n", ["row 3", "'none' occurs together with"]),
        ("image,labels\na.jpg,\nb.jpg,none\n", ["no classes"]),
        ("image,cat\n../a.jpg,1\n", ["row 2", "outside", "allow_outside"]),
        ("image,cat\n/etc/a.jpg,1\n", ["row 2", "outside"]),
        ("image,cat\n..\\a.jpg,1\n", ["row 2", "outside"]),
        ("image,cat\nfolder/,1\n", ["row 2", "is a folder"]),
        ("image,cat\n.,1\n", ["row 2", "is a folder"]),
        ("image,big_cat,Big Cat\na.jpg,1,0\n", ["same prompt text"]),
    ],
)
def test_refused(tmp_path, content, words):
    path = text(tmp_path / "t.csv", content)
    refused([path, *words], lambda: Table(path).train())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # A quote that is not closed would silently swallow the following rows.
        ('image,labels\na.jpg,"cat\nb.jpg,dog\n', ["row 2", "quote is not closed", "cat\\nb.jpg"]),
        ('image,labels,caption\na.jpg,cat,"two\nb.jpg,dog,x\n', ["row 2", "quote is not closed"]),
        ('image,labels\na.jpg,"cat\nb.jpg,x\nc.jpg,dog"\n', ["row 2", "line break", "close the quotes"]),
        ('image,cat\n"a\n.jpg",1\n', ["row 2", "line break"]),
        ('"ima\nge",cat\na.jpg,1\n', ["row 1", "column names contain line breaks"]),
        ('"image"x,cat\na.jpg,1\n', ["no image column", "'imagex'"]),
        ("image,cat\na.jpg,1\n" + "x" * 3_000_000 + ",1\nb.jpg,1\n", ["a row has more than 1,048,576 bytes"]),
        ("image,cat" + "x" * 2_000_000 + "\na.jpg,1\n", ["row 1", "1,048,576 bytes or more", "not a header"]),
        ("image,cat" + "x" * 200_000 + "\na.jpg,1\n", ["field limit"]),
        ("image,cat\na\0.jpg,1\n", ["row 2", "NUL"]),
        ("image,cat\n" + "../" * 30_000 + "a,1\n", ["row 2", "outside", "(90,001 characters)"]),
        ("image,cat\nC:\\..\\..\\a.jpg,1\n", ["row 2", "outside"]),
        ("image,cat\n\\\\server\\share\\a.jpg,1\n", ["row 2", "outside"]),
        ("image,cat\na/../../b.jpg,1\n", ["row 2", "outside"]),
        ("image,cat\na.jpg," + "y" * 100_000 + "\n", ["class 'cat'", "(100,000 characters) (row 2)"]),
        ("i" * 100_000 + ",cat\na.jpg,1\n", ["no image column", "(100,000 characters)"]),
    ],
)
def test_csv_that_would_be_misread(tmp_path, content, words):
    path = text(tmp_path / "t.csv", content)
    refused([path, *words], lambda: Table(path).train())
    with pytest.raises(DataError) as error:
        Table(path).train()
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    path = text(tmp_path / "t.csv", f"image,cat{end}a.jpg,1{end}b.jpg,0{end}")
    assert Table(path).train().labels.tolist() == [[1], [0]]
    if end != "\r":  # Arrow allows line breaks in quoted cells, and captions contain them
        path = text(tmp_path / "t.csv", f'image,labels,caption{end}a.jpg,cat,"two{end}lines"{end}b.jpg,dog,"x"{end}')
        assert Table(path).train().labels.tolist() == [[1, 0], [0, 1]]


def test_quoted_line_breaks_at_the_ends_of_arrows_blocks(tmp_path):
    """Arrow must not split rows if a block of a megabyte ends inside quotes."""
    rows = "".join(f'{i:07d}.jpg,cat,"two\nlines, {i}"\n' for i in range(100_000))
    path = text(tmp_path / "t.csv", "image,labels,caption\n" + rows)
    t = Table(path).train()
    assert len(t) == 100_000
    assert t.class_names == ("cat",)
    assert t.paths[-1] == "0099999.jpg"


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"image,labels\na.jpg,cat\nb.jpg,caf\xe9\n")
    refused([str(path), "line 3", "UTF-8"], lambda: Table(str(path)).train())


@pytest.mark.parametrize("name", ["..%2fa.jpg", "%2e%2e/a.jpg", "~/a.jpg", "file:///a.jpg", "$HOME/a.jpg"])
def test_paths_are_taken_literally(tmp_path, name):
    path = text(tmp_path / "t.csv", f"image,cat\n{name},1\n")
    t = Table(path).train()
    assert (tmp_path / t.paths[0]).resolve().is_relative_to(tmp_path)
    with pytest.raises(DataError, match="1 of 1 images are not under"):
        t.require_files()


def test_links_inside_the_root_are_followed(tmp_path):
    """Data folders often link to another disk; only paths in the table must not leave the root."""
    write_image(tmp_path / "disk" / "a.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "disk")
    path = text(tmp_path / "data" / "t.csv", "image,cat\nimages/a.jpg,1\n")
    Table(path).train().require_files()


def test_invalid_text_in_parquet(tmp_path):
    """Arrow does not validate text columns on reading, so the reader must."""
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    for name in ("image", "cat", "labels"):
        columns = {"image": pa.array(["a.jpg", "b.jpg"]), "cat": pa.array(["1", "0"]), name: bad}
        path = tmp_path / "t.parquet"
        pq.write_table(pa.table(columns), path)
        refused([str(path), f"column {name!r}", "is not text"], lambda path=path: Table(str(path)).train())


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([[{"a": "cat"}]]),
        pa.array([[["cat"]]]),
        pa.array([{"a": "cat"}]),
        pa.array([b"\xff\xfe"], pa.binary()),
        pa.array([[b"\xff"]], pa.list_(pa.binary())),
    ],
    ids=lambda labels: str(labels.type),
)
def test_parquet_labels_of_other_types(tmp_path, labels):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"], "labels": labels}), path)
    refused([str(path), "column 'labels'", "is not text"], lambda: Table(str(path)).train())


def test_parquet_in_a_folder_with_an_equals_sign(tmp_path):
    write_rows(tmp_path / "split=train" / "t.parquet", ["image", "cat"], [["a.jpg", 1]])
    assert Table(str(tmp_path / "split=train" / "t.parquet")).train().class_names == ("cat",)


@pytest.mark.parametrize("column", ["image", "caption"])
def test_a_parquet_file_that_expands_to_gigabytes(tmp_path, monkeypatch, column):
    """Kilobytes on disk and eight gigabytes of text in memory are refused while reading."""
    monkeypatch.setattr(columns, "memory_of_machine", lambda: 400 << 20)
    n = 400_000
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x" * 20_000]))
    path = tmp_path / "t.parquet"
    names = {"image": pa.array(["a.jpg"] * n).dictionary_encode(), column: text}
    pq.write_table(pa.table(names), path, store_schema=False)
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused([str(path), "a quarter of the memory", "of 400,000 rows"], lambda: read_table(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kilobytes


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("content", ["image,caf\u00e9\na.jpg,1\n", "image,labels\na.jpg,caf\u00e9\n"])
def test_other_encodings(tmp_path, content, encoding):
    path = text(tmp_path / "t.csv", content, encoding)
    refused([path, "UTF-8"], lambda: Table(path).train())


def test_no_table(tmp_path):
    refused(["the table does not exist"], lambda: Table(str(tmp_path / "t.csv")).train())
    refused(["(train)", "(test)", "(class_file)"], Table("a.csv", "b.csv", class_file="c.yaml").prepare)
    broken = text(tmp_path / "t.parquet", "image,cat\n")
    refused([broken, "cannot be read as a table"], lambda: Table(broken).train())


def test_root_and_outside(tmp_path):
    write_image(tmp_path / "images" / "a.jpg")
    write_image(tmp_path / "b.jpg")
    inside = tmp_path / "images" / "a.jpg"
    path = text(tmp_path / "lists.csv", f"image,cat\n{inside},1\n../b.jpg,0\n")
    refused(["row 3", "'../b.jpg'"], lambda: Table(path, root=str(tmp_path / "images")).train())
    t = Table(path, root=str(tmp_path / "images"), allow_outside=True).train()
    assert t.paths.tolist() == ["a.jpg", (tmp_path / "b.jpg").as_posix()]
    t.require_files()


def test_class_file_with_names(tmp_path):
    classes = text(tmp_path / "c.yaml", "zebra:\nfeline: {prompt: cat, synonyms: [cat, kitty]}\nunused:\n")
    path = text(tmp_path / "t.csv", "image,labels\na.jpg,cat;zebra\nb.jpg,kitty\nc.jpg,feline\n")
    t = Table(path, class_file=classes).train()
    assert t.class_names == ("zebra", "feline", "unused")
    assert t.prompt_names == ("zebra", "cat", "unused")
    assert t.labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    path = text(tmp_path / "t.csv", "image,labels\na.jpg,zebra\nb.jpg,Zebra;felin\n")
    refused(
        [path, "row 3: 'Zebra' (did you mean 'zebra'?)", "row 3: 'felin' (did you mean 'feline'?)", "synonyms"],
        lambda: Table(path, class_file=classes).train(),
    )
    reserved = text(tmp_path / "n.yaml", "zebra:\nnone:\n")
    refused([reserved, "'none'"], lambda: Table(path, class_file=reserved).train())


def test_class_file_with_columns(tmp_path):
    classes = text(tmp_path / "c.yaml", "dog:\nfeline: {synonyms: [cat]}\n")
    path = text(tmp_path / "t.csv", "image,width,cat,dog\na.jpg,640,1,0\n")
    t = Table(path, class_file=classes).train()
    assert (t.class_names, t.labels.tolist()) == (("dog", "feline"), [[0, 1]])
    refused(["class 'width'", "'640' (row 2)", "class file"], lambda: Table(path).train())
    path = text(tmp_path / "t.csv", "image,dogs,cat\na.jpg,0,1\n")
    refused(["no column for class 'dog'", "'dogs'"], lambda: Table(path, class_file=classes).train())
    path = text(tmp_path / "t.csv", "image,dog,cat,feline\na.jpg,0,1,1\n")
    refused(["'feline', 'cat' belong to the same class"], lambda: Table(path, class_file=classes).train())


def test_test_table_must_have_the_classes_of_the_training_table(tmp_path):
    train = text(tmp_path / "a.csv", "image,dog,cat\na.jpg,0,1\n")
    test = text(tmp_path / "b.csv", "cat,dog,image\n1,0,b.jpg\n")
    assert Table(train, test).test().labels.tolist() == [[0, 1]]
    assert Table(train).test() is None
    more = text(tmp_path / "c.csv", "image,dog,cat,cow\nc.jpg,0,1,1\n")
    refused([more, "'cow'", train], Table(train, more).test)
    less = text(tmp_path / "d.csv", "image,dog\nc.jpg,0\n")
    refused([less, "no column for class 'cat'"], Table(train, less).test)
    named = text(tmp_path / "e.csv", "image,labels\nc.jpg,dog;cow\n")
    refused([named, "row 2: 'cow'"], Table(train, named).test)


def test_many_offenders_are_counted(tmp_path):
    path = text(tmp_path / "t.csv", "image,cat\n" + "".join(f"{i}.jpg,?\n" for i in range(30)))
    refused(["'?' (row 21) ... and 10 more"], lambda: Table(path).train())


def test_images_below_a_folder(tmp_path):
    for name in ("b.JPG", "a/z.png", "a/y.webp", "c.tif", "d.bmp", "e.jpeg", ".hidden.jpg", ".cache/x.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    t = read_images(tmp_path, ["cat", "dog"], ["pet", "dog"])
    assert t.paths.tolist() == ["a/y.webp", "a/z.png", "b.JPG", "c.tif", "d.bmp", "e.jpeg"]
    assert t.labels.tolist() == [[-1, -1]] * 6
    assert t.prompt_names == ("pet", "dog")
    t.require_files()
    one = read_images(tmp_path / "a" / "z.png", ["cat"])
    assert one.paths.tolist() == ["z.png"]
    one.require_files()


def test_images_of_a_list(tmp_path):
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b c.jpg")
    for name, content in {
        "t.txt": "a.jpg\nb c.jpg\n\n",
        "t.csv": "labels,path\nx;y,a.jpg\n,b c.jpg\n",
        "one.csv": "image\na.jpg\nb c.jpg\n",
    }.items():
        t = read_images(text(tmp_path / name, content), ["cat"])
        assert t.paths.tolist() == ["a.jpg", "b c.jpg"], name
        assert t.labels.tolist() == [[-1], [-1]]
        t.require_files()
    write_rows(tmp_path / "t.parquet", ["file"], [["a.jpg"], ["b c.jpg"]])
    assert read_images(tmp_path / "t.parquet", ["cat"]).paths.tolist() == ["a.jpg", "b c.jpg"]


def test_every_format_that_is_decoded_is_found(tmp_path):
    """All suffixes of the supported formats, such as those of JPEG 2000."""
    for suffix in ("jp2", "j2k", "jfif", "jpe", "pbm", "pnm", "pgm"):
        (tmp_path / f"a.{suffix}").write_bytes(b"x")
    assert len(read_images(tmp_path, ["cat"])) == 7


def test_linked_folders_are_searched(tmp_path):
    """Linked folders must not be skipped silently."""
    write_image(tmp_path / "disk" / "a.jpg")
    write_image(tmp_path / "photos" / "b.jpg")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "disk")
    t = read_images(tmp_path / "photos", ["cat"])
    assert t.paths.tolist() == ["b.jpg", "more/a.jpg"]
    t.require_files()


@pytest.mark.parametrize("target", [".", "sub"])
def test_folders_that_are_reached_twice_are_refused(tmp_path, target):
    write_image(tmp_path / "photos" / "sub" / "a.jpg")
    (tmp_path / "photos" / "zzz").symlink_to(tmp_path / "photos" / target)
    refused(
        [str(tmp_path / "photos"), "zzz", "would be counted twice; remove the link"],
        lambda: read_images(tmp_path / "photos", ["cat"]),
    )


def test_broken_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused([str(tmp_path / "loop"), "cannot be followed"], lambda: read_images(tmp_path, ["cat"]))
    (tmp_path / "loop").unlink()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "none.jpg")
    t = read_images(tmp_path, ["cat"])  # it has the name of an image, so it is not skipped
    with pytest.raises(DataError, match=r"gone\.jpg \(row 0\)"):
        t.require_files()


def test_a_folder_without_permission_is_not_skipped(tmp_path, monkeypatch):
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "secret" / "b.jpg")
    scandir = os.scandir

    def forbid(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(unlabeled.os, "scandir", forbid)
    refused([str(tmp_path / "secret"), "Permission denied", "permissions"], lambda: read_images(tmp_path, ["cat"]))


def test_file_names_that_are_not_utf8(tmp_path):
    write_image(tmp_path / "a.jpg")
    os.rename(tmp_path / "a.jpg", os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    refused([str(tmp_path), "b'caf\\xe9.jpg'", "not UTF-8", "rename"], lambda: read_images(tmp_path, ["cat"]))


def test_unusual_file_names(tmp_path):
    names = [
        "a\nb.jpg",
        " c.jpg",
        'd"e.jpg',
        "f\u2028g.jpg",
        "%2e%2e.jpg",
        "-h.jpg",
        "\x1b[31m.jpg",
        "caf\u00e9.jpg",
        "cafe\u0301.jpg",
    ]
    for name in names:
        write_image(tmp_path / name)
    t = read_images(tmp_path, ["cat"])
    assert t.paths.tolist() == sorted(names)
    t.require_files()


@pytest.mark.parametrize("name", ["t.txt", "t.csv"])
def test_malicious_lists(tmp_path, name):
    head = "" if name == "t.txt" else "path\n"
    first = 1 if name == "t.txt" else 2
    for line, words in {
        "a\0.jpg": ["NUL"],
        "/etc/passwd": ["outside"],
        "..\\..\\a.jpg": ["outside"],
        "\\\\server\\a.jpg": ["outside"],
        "a/../../b.jpg": ["outside"],
    }.items():
        path = text(tmp_path / name, f"{head}ok.jpg\n{line}\n")
        refused([path, f"row {first + 1}", *words], lambda path=path: read_images(path, ["cat"]))


def test_images_refused(tmp_path):
    refused(["no image in this folder"], lambda: read_images(tmp_path, ["cat"]))
    refused(["t.txt, row 2", "empty"], lambda: read_images(text(tmp_path / "t.txt", "a\n\nb\n"), ["cat"]))
    refused(["(rows 1 and 2)"], lambda: read_images(text(tmp_path / "t.txt", "a\na\n"), ["cat"]))
    refused(["the file contains no paths"], lambda: read_images(text(tmp_path / "t.txt", "\n"), ["cat"]))
    refused(["row 1", "outside"], lambda: read_images(text(tmp_path / "t.txt", "../a\n"), ["cat"]))
    refused(["the table does not exist"], lambda: read_images(tmp_path / "none", ["cat"]))
    outside = read_images(text(tmp_path / "t.txt", "../a\n"), ["cat"], allow_outside=True)
    assert outside.file(0) == tmp_path.parent / "a"


@pytest.mark.parametrize("form", ["names", "columns"])
def test_large_table(tmp_path, form):
    """100,000 rows."""
    n = 100_000
    rows = np.arange(n)
    cat, dog = rows % 2 == 0, rows % 3 == 0
    if form == "names":
        cells = np.select([cat & dog, cat, dog], ["cat;dog", "cat", "dog"], "none")
        table = pa.table({"image": [f"{i // 1000}/{i}.jpg" for i in rows], "labels": cells})
    else:
        columns = {"cat": cat.astype(np.int8), "dog": dog.astype(np.int8)}
        table = pa.table({"image": [f"{i // 1000}/{i}.jpg" for i in rows], **columns})
    pq.write_table(table, tmp_path / "t.parquet")
    t = Table(str(tmp_path / "t.parquet")).train()
    assert (t.labels == np.stack([cat, dog], axis=1)).all()
    assert t.paths[-1] == "99/99999.jpg"
