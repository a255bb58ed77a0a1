"""Upload to and download from the Hugging Face Hub, without a network."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch

from cbsa_lightning import Classifier
from cbsa_lightning.__main__ import main
from cbsa_lightning.errors import CheckpointError, ConfigError
from cbsa_lightning.inference.hub import push_to_hub
from cbsa_lightning.io.checksums import check_checksums
from tiny_data import SIZE
from tiny_export import checkpoint_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, clip_folder):
    return checkpoint_of(clip_folder, tmp_path_factory.mktemp("run") / "last.ckpt")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    main(["export", str(checkpoint), "--to", str(folder), "--format", "safetensors", "--image_size", str(SIZE)])
    return folder


@pytest.fixture
def api(monkeypatch):
    """Replaces the connection to the Hub; the signatures of its methods are still checked."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.return_value = SimpleNamespace(repo_id="me/birds")
    api.upload_folder.return_value = SimpleNamespace(commit_url="https://hub/me/birds/commit/1")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: api)
    return api


def in_cache(exported, folder, *names):
    """Stores files as huggingface_hub does after a download."""
    commit = "0" * 40
    snapshot = folder / "models--me--birds" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in names:
        shutil.copy(exported / name, snapshot)
    (folder / "models--me--birds" / "refs").mkdir()
    (folder / "models--me--birds" / "refs" / "main").write_text(commit)
    return folder


def test_a_downloaded_model_has_the_scores_of_the_checkpoint(checkpoint, exported, tmp_path):
    cache = in_cache(exported, tmp_path, "config.json", "model.safetensors", "SHA256SUMS")
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Classifier.from_pretrained("me/birds", cache_dir=cache)
    expected = Classifier.load(checkpoint, image_size=SIZE)
    assert torch.equal(found.scores(images), expected.scores(images))
    assert torch.equal(found.thresholds, expected.thresholds)


def test_a_repository_that_is_not_available_or_not_a_model(exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"me/other cannot be downloaded .*USER/MODEL"):
        Classifier.from_pretrained("me/other", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="a//b cannot be downloaded"):
        Classifier.from_pretrained("a//b", cache_dir=tmp_path)
    cache = in_cache(exported, tmp_path / "other", "config.json")
    with pytest.raises(CheckpointError, match=r"me/birds lacks model.safetensors, SHA256SUMS"):
        Classifier.from_pretrained("me/birds", cache_dir=cache)


def test_an_upload_creates_a_private_repository(exported, api):
    assert push_to_hub(exported, "me/birds") == "https://hub/me/birds/commit/1"
    assert api.create_repo.call_args.args == ("me/birds",)
    assert api.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
    assert api.upload_folder.call_args.kwargs["folder_path"] == exported
    assert api.upload_folder.call_args.kwargs["repo_id"] == "me/birds"


def test_export_and_upload_in_one_command(checkpoint, tmp_path, api, capsys):
    words = ["--format", "safetensors", "--image_size", str(SIZE), "--push_to", "me/birds", "--public"]
    main(["export", str(checkpoint), "--to", str(tmp_path / "model"), *words])
    assert "Uploaded: https://hub/me/birds/commit/1" in capsys.readouterr().out
    assert api.create_repo.call_args.kwargs["private"] is False


def test_only_the_model_card_may_be_edited_before_an_upload(exported, tmp_path, api):
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "README.md").write_text("My birds.")
    push_to_hub(folder, "me/birds")
    check_checksums(folder, ["README.md"])
    (folder / "labels.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"labels.json: the file is damaged or was changed"):
        push_to_hub(folder, "me/birds")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model.safetensors"):
        push_to_hub(folder, "me/birds")
    assert api.upload_folder.call_count == 1


def test_a_failed_upload_names_the_repository(exported, api):
    api.create_repo.side_effect = OSError("401 Unauthorized")
    with pytest.raises(ConfigError, match=r"cannot be uploaded to me/birds: 401 Unauthorized"):
        push_to_hub(exported, "me/birds")
