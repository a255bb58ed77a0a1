"""The NUS-WIDE reader on tiny files in the official and in the list layout."""

from __future__ import annotations

import numpy as np
import pytest

from cbsa_lightning.data.readers import NUSWIDE, Source
from cbsa_lightning.data.readers.nuswide import NUSWIDE_CLASSES
from cbsa_lightning.errors import ConfigError, DataError
from layouts import make_nuswide_list, make_nuswide_official

TEXT = {
    "layout": "list",
    "train_images": "formatted_train_images.txt",
    "train_labels": "formatted_train_labels.csv",
    "val_images": "formatted_val_images.txt",
    "val_labels": "formatted_val_labels.csv",
}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_nuswide_official, {}),
        (make_nuswide_list, {"layout": "list"}),
        (lambda root: make_nuswide_list(root, text=True), TEXT),
    ],
    ids=["official", "npy", "text"],
)
def test_layouts(tmp_path, make, options):
    train, test = make(tmp_path)
    source = NUSWIDE(str(tmp_path), **options)
    source.prepare()
    t, s = source.train(), source.test()
    assert (t.labels == train).all()
    assert (s.labels == test).all()
    assert t.paths[4].startswith("Flickr/tag1/0004_train")
    assert t.missing_files() == s.missing_files() == []
    assert isinstance(source, Source)
    dropped = NUSWIDE(str(tmp_path), drop_unlabeled=True, **options)
    assert dropped.train().paths.tolist() == t.paths[: len(t) - 3].tolist()
    assert (dropped.train().labels == train[:-3]).all()
    assert len(dropped.test()) == len(s) - 3


def test_concepts(tmp_path):
    assert len(NUSWIDE_CLASSES) == 81
    assert list(NUSWIDE_CLASSES) == sorted(NUSWIDE_CLASSES)
    source = NUSWIDE(str(tmp_path))
    assert source.class_names == source.prompt_names == NUSWIDE_CLASSES


def test_concepts_match_published_matrices(realbench):
    names = np.load(realbench / "labels/cooc/nuswide_cpsd.npz")["names"].tolist()
    assert ["earthquake" if name == "earthq" else name for name in names] == list(NUSWIDE_CLASSES)


def test_missing(tmp_path):
    with pytest.raises(DataError) as error:
        NUSWIDE(str(tmp_path)).prepare()
    for word in (
        "Flickr",
        "ImageList/TrainImagelist.txt",
        "TrainTestLabels/Labels_airport_Train.txt",
        "more",
    ):
        assert word in str(error.value)
    with pytest.raises(DataError, match=r"formatted_train_labels\.npy"):
        NUSWIDE(str(tmp_path), layout="list").prepare()
    with pytest.raises(ConfigError, match="'official' or 'list'"):
        NUSWIDE(str(tmp_path), layout="npy")


def test_official_labels_of_the_wrong_length(tmp_path):
    make_nuswide_official(tmp_path, 5, 4)
    file = tmp_path / "TrainTestLabels/Labels_cat_Train.txt"
    file.write_text("0\n1\n")
    with pytest.raises(DataError, match=r"Labels_cat_Train\.txt has 2 labels.*TrainImagelist\.txt lists 5"):
        NUSWIDE(str(tmp_path)).train()
    file.write_text("0\n1\nx\n0\n0\n")
    with pytest.raises(DataError, match=r"Labels_cat_Train\.txt, line 3: 'x'"):
        NUSWIDE(str(tmp_path)).train()


@pytest.mark.parametrize("name", ["images", "labels"])
def test_pickles_are_refused(tmp_path, name):
    make_nuswide_list(tmp_path, 4, 3)
    path = tmp_path / f"formatted_train_{name}.npy"
    np.save(path, np.array(["a", None], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=f"formatted_train_{name}.*pickle"):
        NUSWIDE(str(tmp_path), layout="list").train()


def test_wrong_matrices(tmp_path):
    make_nuswide_list(tmp_path, 4, 3)
    source, path = NUSWIDE(str(tmp_path), layout="list"), tmp_path / "formatted_train_labels.npy"
    labels = np.load(path)
    np.save(path, labels[:3])
    with pytest.raises(DataError, match=r"shape \(3, 81\).*\(4, 81\)"):
        source.train()
    labels[2, 1] = -1
    np.save(path, labels)
    with pytest.raises(DataError, match=r"-1\.0 \(row 3, 'animal'\)"):
        source.train()
    np.save(tmp_path / "formatted_train_images.npy", np.arange(4))
    with pytest.raises(DataError, match="must be a list of image names"):
        source.train()


def test_text_that_is_not_numeric(tmp_path):
    make_nuswide_list(tmp_path, 4, 3, text=True)
    (tmp_path / "formatted_train_labels.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="not a table of numbers"):
        NUSWIDE(str(tmp_path), **TEXT).train()


def test_paths_must_be_below_the_root(tmp_path):
    make_nuswide_official(tmp_path, 4, 3)
    file = tmp_path / "ImageList/TrainImagelist.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "..\\..\\x.jpg", *lines[2:]]))
    with pytest.raises(DataError, match=r"TrainImagelist\.txt, image 2: .* outside"):
        NUSWIDE(str(tmp_path)).train()


@pytest.mark.parametrize("name", ["images", "labels"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\1\0\x06\0{'a':(",  # numpy's own parser raises a TokenError
        b"\x93NUMPY\1\0\x02\0\n(",
        b"PK\3\4 an archive of arrays, which numpy would open as something else",
        b"\x93NUMPY\1\0\x40\0{'descr':'<f8','fortran_order':False,'shape':(10000000000000,81)} \n",
    ],
)
def test_damaged_arrays(tmp_path, name, content):
    make_nuswide_list(tmp_path, 4, 3)
    (tmp_path / f"formatted_train_{name}.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"formatted_train_{name}\.npy cannot be read as a plain array"):
        NUSWIDE(str(tmp_path), layout="list").train()


def test_an_archive_of_arrays_is_refused(tmp_path):
    make_nuswide_list(tmp_path, 4, 3)
    np.savez(tmp_path / "a.npz", np.arange(4))
    (tmp_path / "a.npz").rename(tmp_path / "formatted_train_labels.npy")
    with pytest.raises(DataError, match="cannot be read as a plain array"):
        NUSWIDE(str(tmp_path), layout="list").train()


@pytest.mark.parametrize("point", [0xD800, 0x110000, 0xFFFFFFFF])
@pytest.mark.parametrize("order", ["<", ">"])
def test_names_with_damaged_characters(tmp_path, point, order):
    make_nuswide_list(tmp_path, 4, 3)
    path = tmp_path / "formatted_train_images.npy"
    names = np.load(path).astype(f"{order}U20")
    names.view(f"{order}u4").reshape(4, 20)[2, 3] = point
    np.save(path, names)
    with pytest.raises(DataError, match=r"formatted_train_images\.npy: the name of image 3 is not valid Unicode"):
        NUSWIDE(str(tmp_path), layout="list").train()


def test_empty_lists(tmp_path):
    make_nuswide_list(tmp_path, 4, 3, text=True)
    (tmp_path / "formatted_train_images.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"formatted_train_images\.txt: the file contains no images"):
        NUSWIDE(str(tmp_path), **TEXT).train()


def test_only_line_ends_separate_lines(tmp_path):
    """Names may contain a form feed or U+2028, at which splitlines would split them."""
    make_nuswide_list(tmp_path, 4, 3, text=True)
    path = tmp_path / "formatted_train_images.txt"
    path.write_bytes("a\x0cb.jpg\rc\u2028d.jpg\r\ne\x85f.jpg\ng.jpg".encode())
    assert NUSWIDE(str(tmp_path), **TEXT).train().paths.tolist() == [
        "Flickr/a\x0cb.jpg", "Flickr/c\u2028d.jpg", "Flickr/e\x85f.jpg", "Flickr/g.jpg"
    ]  # fmt: skip


def test_a_nul_in_a_name(tmp_path):
    make_nuswide_official(tmp_path, 4, 3)
    file = tmp_path / "ImageList/TrainImagelist.txt"
    file.write_bytes(file.read_bytes().replace(b"0002", b"00\x002"))
    with pytest.raises(DataError, match=r"TrainImagelist\.txt, image 3: .*NUL"):
        NUSWIDE(str(tmp_path)).train()


@pytest.mark.parametrize("second", ["a/1.jpg", "./a//1.jpg", "a\\1.jpg"])
def test_the_same_image_twice(tmp_path, second):
    make_nuswide_list(tmp_path, 4, 3, text=True)
    (tmp_path / "formatted_train_images.txt").write_text(f"b.jpg\na/1.jpg\n{second}\nc.jpg\n")
    with pytest.raises(DataError, match=r"'Flickr/a/1.jpg' \(.*images\.txt, image 2, and .*images\.txt, image 3\)"):
        NUSWIDE(str(tmp_path), **TEXT).train()
