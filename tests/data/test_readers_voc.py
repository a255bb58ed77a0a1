"""The PASCAL VOC reader on tiny files in the VOCdevkit layout and on real files."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path

import numpy as np
import pytest
import torchvision

from cbsa_lightning.data.readers import VOC, Source
from cbsa_lightning.errors import ConfigError, DataError
from layouts import make_voc

NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def test_labels_and_order(tmp_path):
    train, test = make_voc(tmp_path, 24, 12)
    source = VOC(str(tmp_path))
    source.prepare()
    t, s = source.train(), source.test()
    assert (t.labels == (train == 1)).all()
    assert (s.labels == (test == 1)).all()
    assert t.class_names == source.class_names == NAMES
    assert t.paths.tolist() == [f"JPEGImages/2008_{i:06d}.jpg" for i in range(24)]
    assert t.missing_files() == s.missing_files() == []
    assert isinstance(source, Source)


@pytest.mark.parametrize(("difficult", "label"), [("negative", 0), ("positive", 1), ("ignore", -1)])
def test_difficult(tmp_path, difficult, label):
    make_voc(tmp_path, 5, 2, difficult=[(0, "cow"), (3, "sheep")])
    t = VOC(str(tmp_path), difficult=difficult).train()
    assert t.labels[0, NAMES.index("cow")] == label
    assert t.labels[3, NAMES.index("sheep")] == label
    assert (t.labels == -1).sum() == (2 if difficult == "ignore" else 0)


@pytest.mark.parametrize("difficult", ["negative", "positive", "ignore"])
def test_images_without_a_clear_instance_are_not_listed(tmp_path, difficult):
    make_voc(tmp_path, 6, 2, empty=3)
    folder = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    file = folder / "cow_train.txt"
    file.write_text(file.read_text().replace("2009_000001 -1", "2009_000001  0"))
    assert len(VOC(str(tmp_path), difficult=difficult).train()) == 6


def test_year_2007(tmp_path):
    train, test = make_voc(tmp_path, 8, 4, year="2007")
    source = VOC(str(tmp_path), year="2007")
    source.prepare()
    assert (source.train().labels == (train == 1)).all()
    assert (source.test().labels == (test == 1)).all()


def test_names_before_any_file(tmp_path):
    source = VOC(str(tmp_path / "nowhere"))
    assert source.class_names == source.prompt_names == NAMES


def test_class_file(tmp_path):
    make_voc(tmp_path, 3, 2)
    file = tmp_path / "natural.yaml"
    file.write_text("diningtable: dining table\ntvmonitor: tv monitor\n")
    source = VOC(str(tmp_path), class_file=str(file))
    assert source.prompt_names == tuple(
        {"diningtable": "dining table", "tvmonitor": "tv monitor"}.get(n, n) for n in NAMES
    )
    assert source.train().prompt_names == source.prompt_names
    file.write_text("dinningtable: dining table\n")
    with pytest.raises(DataError, match=r"'dinningtable' is not one of the 20.*did you mean 'diningtable'"):
        _ = source.prompt_names


def test_shipped_class_file(tmp_path):
    file = Path(__file__).parents[2] / "configs" / "class_files" / "voc_natural.yaml"
    prompts = VOC(str(tmp_path), class_file=str(file)).prompt_names
    changed = {official: prompt for official, prompt in zip(NAMES, prompts, strict=True) if official != prompt}
    assert changed == {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "pottedplant": "potted plant",
        "tvmonitor": "tv monitor",
    }


def test_error_for_missing_files_names_archives_and_folder(tmp_path):
    with pytest.raises(DataError) as error:
        VOC(str(tmp_path)).prepare()
    for word in (
        "VOCtrainval_11-May-2012.tar",
        str(tmp_path / "VOCdevkit" / "VOC2012"),
        "aeroplane_train.txt",
    ):
        assert word in str(error.value)
    make_voc(tmp_path, 3, 2)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/cow_val.txt").unlink()
    with pytest.raises(DataError, match=r"no ImageSets/Main/cow_val\.txt\. Download"):
        VOC(str(tmp_path)).prepare()
    with pytest.raises(DataError, match=r"cow_val\.txt is missing"):
        VOC(str(tmp_path)).test()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2008_000001  2", ["line 3", "'2008_000001  2'", "1, 0 or -1"]),
        ("2008_000001", ["line 3"]),
        ("2008_000002  1", ["line 3", "listed twice"]),
        ("2008_000009  1", ["do not contain the same images", "2008_000001, 2008_000009"]),
    ],
)
def test_broken_line(tmp_path, line, words):
    make_voc(tmp_path, 4, 2)
    file = tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/cow_train.txt"
    lines = file.read_text().splitlines()
    assert lines[2].startswith("2008_000001")
    lines[2] = line
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        VOC(str(tmp_path)).train()
    for word in ["cow_train.txt", *words]:
        assert word in str(error.value)


def rename(root, old, new):
    for file in (root / "VOCdevkit/VOC2012/ImageSets/Main").glob("*_train.txt"):
        file.write_bytes(file.read_bytes().replace(old.encode(), new.encode()))


def test_paths_must_be_below_the_root(tmp_path):
    make_voc(tmp_path, 4, 2)
    rename(tmp_path, "2008_000001", "../../../2008_000001")
    with pytest.raises(DataError, match=r"aeroplane_train\.txt, image '\.\./\.\./\.\./2008_000001'.* outside"):
        VOC(str(tmp_path)).train()


def test_the_same_image_under_two_names(tmp_path):
    make_voc(tmp_path, 4, 2)
    rename(tmp_path, "2008_000001", "./2008_000002")
    with pytest.raises(DataError, match=r"paths that occur twice.*aeroplane_train\.txt, image '\./2008_000002'"):
        VOC(str(tmp_path)).train()


def test_names_with_unicode_line_ends(tmp_path):
    make_voc(tmp_path, 4, 2)
    rename(tmp_path, "2008_000001", "a\u200bb")
    assert VOC(str(tmp_path)).train().paths.tolist()[-1] == "JPEGImages/a\u200bb.jpg"
    rename(tmp_path, "a\u200bb", "a\u2028b")  # Python treats it as a space, so that the line has three words
    with pytest.raises(DataError, match=r"aeroplane_train\.txt, line 3: .* is not an image name and flag"):
        VOC(str(tmp_path)).train()


def test_no_image_with_a_flag(tmp_path):
    make_voc(tmp_path, 2, 2)
    rename(tmp_path, " 1\n", " -1\n")
    with pytest.raises(
        DataError, match=r"aeroplane_train\.txt and the files of the other classes have no image with flag 1"
    ):
        VOC(str(tmp_path)).train()


def test_very_long_names_do_not_fill_the_message(tmp_path):
    make_voc(tmp_path, 2, 2)
    file = tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/cow_train.txt"
    file.write_text(file.read_text().replace("2008_000001", "x" * 10**6))
    with pytest.raises(DataError, match="do not contain the same images") as error:
        VOC(str(tmp_path)).train()
    assert len(str(error.value)) < 1000


def test_unknown_options():
    with pytest.raises(ConfigError, match="'2011'"):
        VOC("x", year="2011")
    with pytest.raises(ConfigError, match="difficult must be 'negative' or 'positive' or 'ignore', got 'maybe'"):
        VOC("x", difficult="maybe")


@pytest.mark.parametrize(("year", "expected"), [("2012", ["train"]), ("2007", ["trainval", "test"])])
def test_download_goes_through_torchvision_once(tmp_path, monkeypatch, year, expected):
    signature, calls = inspect.signature(torchvision.datasets.VOCDetection), []

    def fetch(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        assert call["download"] is True
        assert (str(call["root"]), call["year"]) == (str(tmp_path / "new"), year)
        calls.append(call["image_set"])
        make_voc(call["root"], 3, 2, year=year)

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", fetch)
    source = VOC(str(tmp_path / "new"), year=year, download=True)
    source.prepare()
    source.prepare()
    assert calls == expected
    assert len(source.train()) == 3


def test_failed_download(tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", fetch)
    with pytest.raises(DataError, match=r"no route.*VOCtrainval_11-May-2012\.tar manually"):
        VOC(str(tmp_path), download=True).prepare()


def test_real_images(realbench):
    source = VOC(str(realbench / "voc2012-animals"))
    source.prepare()
    t, s = source.train(), source.test()
    train = [0, 3, 10, 1, 29, 0, 36, 539, 55, 151, 10, 632, 237, 3, 298, 28, 171, 41, 0, 16]
    val = [0, 4, 5, 3, 16, 2, 30, 541, 53, 152, 9, 654, 245, 5, 304, 31, 154, 44, 1, 20]
    assert (len(t), len(s)) == (1697, 1729)
    assert t.labels.sum(axis=0, dtype=int).tolist() == train
    assert s.labels.sum(axis=0, dtype=int).tolist() == val
    assert t.paths.tolist() == sorted(t.paths.tolist())
    t.require_files()
    s.require_files()


def test_official_size_of_the_lists(realbench, tmp_path):
    """Writes flags of all 11,540 images of VOC2012 trainval; the counts are those in the paper."""
    with (realbench / "labels" / "voc2012_all_labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    folder = tmp_path / "VOCdevkit/VOC2012/ImageSets/Main"
    folder.mkdir(parents=True)
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages").mkdir()
    for name in NAMES:
        for part in ("train", "val"):
            lines = [
                f"{row['image'][:-4]} {1 if name in row['labels_nondifficult'].split() else -1}"
                for row in rows
                if row["split"] == part
            ]
            (folder / f"{name}_{part}.txt").write_text("\n".join(lines))
    source = VOC(str(tmp_path))
    assert (len(source.train()), len(source.test())) == (5717, 5823)
    stored = np.load(realbench / "labels/cooc/voc2012_train_deephash.npz")
    order = [stored["names"].tolist().index(name) for name in NAMES]
    labels = dict(zip(stored["images"].tolist(), stored["Y"][:, order].tolist(), strict=True))
    table = source.train()
    names = [path.removeprefix("JPEGImages/") for path in table.paths.tolist()]
    key = (lambda n: n) if names[0] in labels else (lambda n: n.removesuffix(".jpg"))
    assert [labels[key(n)] for n in names] == table.labels.tolist()


def own_folder(root: Path, files: dict[str, str | None], sets: dict[str, list[str]]) -> VOC:
    """Writes custom XML files in VOC's layout; None writes no file."""
    folder = root / "VOCdevkit" / "VOC2012"
    for place in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / place).mkdir(parents=True)
    for image, objects in files.items():
        (folder / "JPEGImages" / f"{image}.png").touch()
        if objects is not None:
            text = f"<annotation><filename>elsewhere.bmp</filename>{objects}</annotation>"
            (folder / "Annotations" / f"{image}.xml").write_text(text)
    for name, images in sets.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in images))
    return VOC(str(root))


def thing(name: str, difficult: str = "") -> str:
    return f"<object><name>{name}</name>{difficult}<bndbox><xmin>1</xmin></bndbox></object>"


def test_custom_classes_from_xml_files(tmp_path):
    hard = "<difficult>1</difficult>"
    files = {
        "a": thing("kite") + thing("crab"), "b 1": thing("kite", hard), "c": "", "d": None, "e": thing("kite", hard) +
        thing("kite", "<difficult>0</difficult>"),
    }  # fmt: skip
    source = own_folder(tmp_path, files, {"train": ["a", "b 1", "JPEGImages/c.png", "d"], "val": ["e"]})
    source.prepare()
    assert source.class_names == source.prompt_names == ("crab", "kite")
    train, test = source.train(), source.test()
    assert train.labels.tolist() == [[1, 1], [0, 0], [0, 0], [-1, -1]]
    assert test is not None
    assert test.labels.tolist() == [[0, 1]]
    assert train.missing_files() == test.missing_files() == []
    assert VOC(str(tmp_path), difficult="ignore").train().labels[1].tolist() == [0, -1]


def test_custom_classes_without_a_test_list(tmp_path):
    assert own_folder(tmp_path, {"a": thing("kite")}, {"train": ["a"]}).test() is None


@pytest.mark.parametrize(("objects", "message"), [
    ("<object></object>", r"a\.xml: object 0 has no name"),
    ("<object>", r"a\.xml: the file is not XML"),
    ("<!ENTITY x 'y'>", r"a\.xml: the file declares a document type"),
    ("\0", r"a\.xml: the file contains NUL characters"),
    ("", r"Annotations: no XML file contains an object"),
])  # fmt: skip
def test_invalid_custom_xml_files(tmp_path, objects, message):
    source = own_folder(tmp_path, {"a": objects}, {"train": ["a"]})
    with pytest.raises(DataError, match=message):
        _ = source.class_names
