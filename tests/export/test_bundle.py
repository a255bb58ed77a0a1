"""`cbsa export`: every format gives the scores of the classifier, and a modified bundle is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from cbsa_lightning import Classifier
from cbsa_lightning.__main__ import main
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.labeled_images import LabeledImages
from cbsa_lightning.data.plain_view import squash
from cbsa_lightning.data.splits import Split
from cbsa_lightning.errors import CheckpointError, ConfigError, DataError
from cbsa_lightning.inference.export import bundle, onnx_model, variants
from cbsa_lightning.inference.export.program_file import read_program
from cbsa_lightning.io import checksums
from cbsa_lightning.io.runs import LABELED
from tiny_data import SIZE, Squares
from tiny_export import checkpoint_of

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'cbsa-lightning[export]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'cbsa-lightning[export]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip_folder):
    folder = tmp_path_factory.mktemp("run")
    checkpoint_of(clip_folder, folder / "checkpoints" / "last.ckpt")
    table = Squares(tmp_path_factory.mktemp("squares")).train()
    LabeledImages.of(table, Split(np.arange(12), np.arange(20, 22), np.arange(12, 20))).write(folder / LABELED)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    words = ["export", str(run), "--to", str(folder), "--extra", "attention,context", "--image_size", str(SIZE)]
    assert main(words) == folder
    return folder


@pytest.fixture(scope="module")
def with_variants(run, tmp_path_factory):
    """Exports both variants. Those of a network with random weights can differ more than the limits allow."""
    folder = tmp_path_factory.mktemp("variants") / "model"
    options = ["--format", "onnx", "--variants", "fp16,int8", "--image_size", str(SIZE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "MAX_CHANGED", 1.0)
        patch.setattr(variants, "MAX_LOSS", 1.0)
        main(["export", str(run), "--to", str(folder), *options])
    return folder


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(run / "checkpoints" / "last.ckpt", image_size=SIZE)


@pytest.fixture(scope="module")
def predict(exported):
    """Imports the script of the bundle as a module."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("predict", exported / "predict.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(folder, *words):
    return subprocess.run([sys.executable, folder / "predict.py", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def session(exported):
    return onnxruntime.InferenceSession(exported / "model.onnx")


@pytest.fixture(scope="module")
def program(exported):
    return read_program(exported / "model.pt2")


@pytest.mark.parametrize("number", [1, 2, 7])
def test_both_graphs_accept_any_batch_size(session, program, classifier, number):
    images = torch.randint(0, 256, (number, 3, SIZE, SIZE), dtype=torch.uint8)
    expected = classifier.scores(images)
    names = ["logits", "probabilities", "labels", "attention", "context"]
    assert [output.name for output in session.get_outputs()] == names
    results = dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))
    np.testing.assert_allclose(results["probabilities"], expected, atol=1e-6)
    np.testing.assert_array_equal(results["labels"], expected >= classifier.thresholds)
    np.testing.assert_allclose(results["attention"], classifier.attention(images), atol=1e-5)
    np.testing.assert_allclose(results["context"].sum(1), 1, atol=1e-6)
    module, metadata = program
    torch.testing.assert_close(module(images)[1], expected, atol=1e-6, rtol=0)
    assert metadata == session.get_modelmeta().custom_metadata_map


def test_the_bundle_contains_its_metadata(exported, session, classifier):
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(classifier.class_names)
    assert json.loads(metadata["thresholds"])[1:3] == [0.5, None]  # JSON has no infinity
    assert metadata["image_size"] == str(SIZE)
    assert len(metadata["frozen_fingerprint"]) == 64
    entries = json.loads((exported / "labels.json").read_text())["classes"]
    assert entries[2] == {"name": "blue", "prompt": "blue", "threshold": None}
    assert json.loads((exported / "preprocess.json").read_text())["size"] == [SIZE, SIZE]
    assert "| blue | never predicted |  |  |" in (exported / "README.md").read_text()
    assert not any(path.name.startswith(".") for path in exported.parent.iterdir())


def test_the_classifier_loads_the_bundle(exported, classifier):
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    loaded = Classifier.load(exported)
    assert torch.equal(loaded.scores(images), classifier.scores(images))
    assert torch.equal(loaded.thresholds, classifier.thresholds)
    assert loaded.class_names == classifier.class_names


def test_the_script_gives_the_labels_of_the_classifier(exported, classifier, squares_folder):
    Squares(squares_folder)
    files = sorted(squares_folder.rglob("*.png"))[:5]
    result = script(exported, *map(str, files))
    assert result.returncode == 0, result.stderr
    header, *rows = [line.split(",") for line in result.stdout.splitlines()]
    assert header == ["image", "labels", *classifier.class_names]
    predictions = classifier(files)
    assert [row[0] for row in rows] == [str(file) for file in files]
    assert [row[1] for row in rows] == [";".join(p.labels) or "none" for p in predictions]
    np.testing.assert_allclose([float(value) for value in rows[0][2:]], list(predictions[0].scores.values()), atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (31, 200), (300, 64), (517, 389), (5, 1), (1000, 90)])
def test_the_script_resizes_exactly_like_the_library(predict, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(predict.resize(image, SIZE), squash(image, SIZE))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1"])
def test_the_script_reads_images_like_the_library(predict, tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 200)
    else:
        image = Image.fromarray(values if mode in ("RGBA", "LA") else values[..., :3]).convert(mode)
    file = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, exif=exif)
    np.testing.assert_array_equal(predict.read(file), decode(file))


def copied(folder, place):
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def edited(content):
    return content[: len(content) // 2] + b"?" + content[len(content) // 2 + 1 :]


DAMAGES = {"edited": edited, "truncated": lambda content: content[:-1], "empty": lambda _: b"", "missing": None}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model_int8.onnx", "preprocess.json", "check.npz", "labels.json"])
def test_errors_name_the_damaged_file(with_variants, tmp_path, name, damage, predict):
    folder = copied(with_variants, tmp_path / "copy")
    if DAMAGES[damage] is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    with pytest.raises(predict.BundleError, match=name.replace(".", r"\.")):
        predict.check(predict.Model(folder, file="model_int8.onnx"))


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_damaged_checksums_are_refused(exported, tmp_path, predict, content):
    folder = copied(exported, tmp_path / "copy")
    (folder / "SHA256SUMS").unlink()
    if content is not None:
        (folder / "SHA256SUMS").write_bytes(content)
    with pytest.raises(predict.BundleError, match="SHA256SUMS"):
        predict.Model(folder)


def test_the_command_line_prints_errors_without_a_traceback(exported, tmp_path):
    folder = copied(exported, tmp_path / "copy")
    (folder / "model.onnx").write_bytes(b"")
    result = script(folder, "--check")
    assert result.returncode == 1
    assert result.stderr.startswith("BundleError: ")
    assert "model.onnx is damaged or was changed" in result.stderr


def test_the_script_needs_none_of_the_other_files_and_the_model_card_may_be_edited(exported, tmp_path, predict):
    folder = copied(exported, tmp_path / "copy")
    for name in ("model.pt2", "model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "README.md").write_text("My birds.")
    assert predict.check(predict.Model(folder)) < 1e-5


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_program_is_refused(exported, tmp_path, damage):
    file = tmp_path / "model.pt2"
    if DAMAGES[damage] is not None:
        file.write_bytes(DAMAGES[damage]((exported / "model.pt2").read_bytes()[:1000]))
    with pytest.raises(CheckpointError, match=r"model\.pt2: cannot be read"):
        read_program(file)


def test_modified_thresholds_are_refused(exported, tmp_path):
    folder = copied(exported, tmp_path / "copy")
    content = json.loads((folder / "labels.json").read_text())
    content["classes"][1]["threshold"] = 0.25
    (folder / "labels.json").write_text(json.dumps(content))
    for words in ([str(folder)], ["--check"]):
        message = script(folder, *words).stderr
        assert "the threshold 0.25 for class 'green', but model.onnx has 0.5" in message
    with pytest.raises(CheckpointError, match=r"labels\.json: the file is damaged or was changed"):
        Classifier.load(folder)


def test_the_comparison_of_a_variant(with_variants, run):
    images = LabeledImages.read(run / LABELED)
    views = np.stack([np.asarray(Image.open(file)) for file in np.array(images.files)[images.held_out]])
    batch = {"images": np.ascontiguousarray(views.transpose(0, 3, 1, 2))}

    def outputs(name):
        session = onnxruntime.InferenceSession(with_variants / name)
        return session.run(["probabilities", "labels"], batch)

    (probabilities, labels), size = outputs("model.onnx"), (with_variants / "model.onnx").stat().st_size
    found = json.loads((with_variants / "variants.json").read_text())
    assert [row["file"] for row in found] == ["model_fp16.onnx", "model_int8.onnx"]
    for row in found:
        others, other_labels = outputs(row["file"])
        assert row["kept"]
        assert (row["images"], row["kind"]) == (8, "held-out")
        assert row["difference"] == pytest.approx(np.abs(others - probabilities).max(), abs=1e-6)
        assert row["changed"] == pytest.approx((other_labels != labels).mean())
        for name, scores in (("mean_ap", others), ("mean_ap_float32", probabilities)):
            truth = images.labels[images.held_out]
            used = truth.any(0) & ~truth.all(0)
            expected = average_precision_score(truth[:, used], scores[:, used], average="macro")
            assert row[name] == pytest.approx(expected)
        assert (with_variants / row["file"]).stat().st_size < 0.7 * size
        assert f"| `{row['file']}` | {row['megabytes']} |" in (with_variants / "README.md").read_text()
    assert 0 < found[0]["difference"] < 1e-3
    assert found[1]["difference"] > found[0]["difference"]


@pytest.mark.parametrize("name", ["model_fp16.onnx", "model_int8.onnx"])
def test_the_script_runs_a_variant(with_variants, name, squares_folder, predict):
    Squares(squares_folder)
    assert "The check passed" in script(with_variants, "--check", "--model", name).stdout
    file = next(squares_folder.rglob("*.png"))
    row = script(with_variants, str(file), "--model", name).stdout.splitlines()[1].split(",")
    probabilities, _ = predict.Model(with_variants, file=name)([file])
    np.testing.assert_allclose([float(value) for value in row[2:]], probabilities[0], rtol=1e-5)
    assert not np.array_equal(probabilities, predict.Model(with_variants)([file])[0])


def test_a_variant_that_differs_too_much_is_reported_and_removed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variants, "MAX_CHANGED", -1.0)
    folder = tmp_path / "model"
    options = ["--format", "onnx", "--variants", "fp16", "--image_size", str(SIZE)]
    main(["export", str(run), "--to", str(folder), *options])
    assert "The file was removed, because" in capsys.readouterr().out
    assert not (folder / "model_fp16.onnx").exists()
    assert "model_fp16.onnx" not in (folder / "SHA256SUMS").read_text()
    assert not json.loads((folder / "variants.json").read_text())[0]["kept"]
    assert "removed, because it differs too much" in (folder / "README.md").read_text()


def test_checksums_are_written_once_after_all_other_files(run, tmp_path, monkeypatch):
    hashed, sha256 = [], checksums._sha256
    monkeypatch.setattr(checksums, "_sha256", lambda file: hashed.append(file.name) or sha256(file))
    options = ["--format", "onnx", "--variants", "fp16,int8", "--image_size", str(SIZE)]
    folder = main(["export", str(run), "--to", str(tmp_path / "model"), *options])
    files = [file.name for file in folder.iterdir() if file.name != checksums.SUMS]
    assert sorted(hashed) == sorted(files)
    checksums.check_checksums(folder, files)


def test_variants_need_labeled_images(run, tmp_path):
    checkpoint = run / "checkpoints" / "last.ckpt"
    options = {"formats": ["onnx"], "variants": ["int8"], "image_size": SIZE}
    with pytest.raises(ConfigError, match="Export the folder of a run"):
        bundle.export(checkpoint, tmp_path / "model", **options)
    with pytest.raises(DataError, match=r"labeled\.parquet"):
        bundle.export(checkpoint, tmp_path / "model", run=tmp_path, **options)
    images = LabeledImages.read(run / LABELED)
    moved = replace(images, files=[f"{file}.moved" for file in images.files])
    moved.write(tmp_path / LABELED)
    with pytest.raises(ConfigError, match=r"images listed in .*labeled\.parquet do not exist"):
        bundle.export(checkpoint, tmp_path / "model", run=tmp_path, **options)
    assert not (tmp_path / "model").exists()


def test_an_opset_that_the_runtime_does_not_support_is_refused(exported, tmp_path, predict, monkeypatch):
    import onnx

    folder = copied(exported, tmp_path / "copy")
    model = onnx.load(folder / "model.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, folder / "model.onnx")
    monkeypatch.setattr(predict, "verify", lambda *_: None)
    with pytest.raises(predict.BundleError, match=r"model\.onnx: ONNX Runtime .* cannot load the model .*opset"):
        predict.Model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_errors_of_the_classifier_name_the_damaged_file(exported, tmp_path, name):
    folder = copied(exported, tmp_path / "copy")
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{name}: the file is damaged"):
        Classifier.load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: the file is missing"):
        Classifier.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["onnx", "coreml"]}, "Unknown format: coreml"),
        ({"formats": []}, "No export format"),
        ({"extra": ["heat"]}, "Unknown extra output: heat"),
        ({"variants": ["int4"]}, "Unknown variant: int4"),
        ({"formats": ["pt2"], "variants": ["int8"]}, "Add onnx to the formats"),
    ],
)
def test_unknown_names_are_refused(run, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        bundle.export(run / "checkpoints" / "last.ckpt", tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(run, exported):
    with pytest.raises(ConfigError, match="exists already"):
        bundle.export(run / "checkpoints" / "last.ckpt", exported)


def test_a_failed_test_leaves_no_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors failed its test"):
        bundle.export(run / "checkpoints" / "last.ckpt", tmp_path / "model", ["safetensors"], image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_missing_packages(run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_model, "PACKAGES", ("onnx", "package_that_is_not_there"))
    with pytest.raises(ConfigError, match=r"needs package_that_is_not_there: pip install 'cbsa-lightning\[export\]'"):
        bundle.export(run / "checkpoints" / "last.ckpt", tmp_path / "model")


def test_outputs_that_a_network_does_not_have_are_refused(clip_folder, tmp_path):
    file = checkpoint_of(clip_folder, tmp_path / "a.ckpt", num_contexts=0, semantic_alignment=False)
    for name, message in (("context", "no context head"), ("attention", "no attention maps")):
        with pytest.raises(ConfigError, match=message):
            bundle.export(file, tmp_path / "model", ["pt2"], [name], image_size=SIZE)


def test_the_server_of_the_documentation_answers(exported, classifier, squares_folder, tmp_path):
    Squares(squares_folder)
    photo = next(squares_folder.rglob("*.png"))
    text = (Path(__file__).parents[2] / "docs" / "how_to" / "export.md").read_text(encoding="utf-8")
    (tmp_path / "serve.py").write_text(re.search(r"```python\n(\"\"\"HTTP server.*?)```", text, re.DOTALL)[1])
    command = [sys.executable, tmp_path / "serve.py", exported, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            with urllib.request.urlopen(address, photo.read_bytes(), timeout=60) as reply:
                answer = json.load(reply)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(address, b"no image", timeout=60)
        finally:
            server.kill()
    prediction = classifier([photo])[0]
    assert tuple(answer["labels"]) == prediction.labels
    assert answer["probabilities"] == pytest.approx(prediction.scores, abs=1e-5)
