"""Sources of weights, and errors if they are missing."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.errors import ConfigError, WeightsError
from tiny_clip import MEAN, STD, tiny_clip, tiny_config

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"), "resnet")


@pytest.fixture
def builtin(tmp_path, monkeypatch):
    """Registers tiny configs with open_clip under a name, plain and with -quickgelu, for one test."""
    for name, changes in (("tiny-RN", {}), ("tiny-RN-quickgelu", {"quick_gelu": True})):
        config = tiny_config("resnet", **changes)
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    return "tiny-RN"


def statistics(clip: FrozenCLIP) -> tuple[list[float], list[float]]:
    return clip.mean.flatten().tolist(), clip.std.flatten().tolist()


def assert_statistics(clip, mean, std):
    assert statistics(clip) == (pytest.approx(mean), pytest.approx(std))


def test_folder_with_weights_and_statistics(folder):
    weights = load_file(folder / WEIGHTS)
    for model in (str(folder), f"local-dir:{folder}"):
        clip = FrozenCLIP.load(model)
        assert_statistics(clip, MEAN, STD)
        assert torch.equal(clip.pool.q_proj.weight, weights["visual.attnpool.q_proj.weight"])
        assert torch.equal(clip.tower.bn1.running_var, weights["visual.bn1.running_var"])
        assert clip.logit_scale == pytest.approx(float(weights["logit_scale"].exp()))
        assert clip.image_size == 64
        assert clip.name == f"{model}/openai"


def test_fingerprint_depends_on_the_weights(folder, tmp_path):
    clip = FrozenCLIP.load(str(folder))
    assert len(clip.fingerprint) == 64
    assert clip.fingerprint == FrozenCLIP.load(str(folder)).fingerprint
    state = load_file(folder / WEIGHTS)
    torch.save(state, tmp_path / "same.pt")
    config = folder / "open_clip_config.json"
    assert FrozenCLIP.load(str(config), str(tmp_path / "same.pt")).fingerprint == clip.fingerprint
    state["positional_embedding"][0, 0] += 1e-6
    torch.save(state, tmp_path / "other.pt")
    assert FrozenCLIP.load(str(config), str(tmp_path / "other.pt")).fingerprint != clip.fingerprint
    other_mean = FrozenCLIP.load(str(folder), image_mean=(0.1, 0.1, 0.1))
    assert other_mean.fingerprint != clip.fingerprint


def test_json_config_and_weights_file(folder, tmp_path):
    shutil.copy(folder / WEIGHTS, tmp_path / "mini.safetensors")
    (tmp_path / "mini.json").write_text(json.dumps(tiny_config("resnet")))
    model, file = str(tmp_path / "mini.json"), str(tmp_path / "mini.safetensors")
    names = open_clip.list_models()
    assert_statistics(FrozenCLIP.load(model, file), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    given = FrozenCLIP.load(model, file, image_mean=[0.5, 0.5, 0.5], image_std=[0.1, 0.2, 0.3])
    assert_statistics(given, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    # An open_clip_config.json next to it is used if its architecture is the same.
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    clip = FrozenCLIP.load(model, file)
    assert_statistics(clip, MEAN, STD)
    assert clip.fingerprint == FrozenCLIP.load(str(folder)).fingerprint
    other = {"model_cfg": tiny_config("vit"), "preprocess_cfg": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(other))
    assert_statistics(FrozenCLIP.load(model, file), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert open_clip.list_models() == names, "open_clip's registry was changed"


@pytest.mark.parametrize("model", ["folder", "RN50-quickgelu", "embedded"])
def test_pretrained_none_is_refused(folder, model):
    with pytest.raises(ConfigError, match=r"pretrained of CLIP .* is null.*'random' for random weights"):
        FrozenCLIP.load(str(folder) if model == "folder" else model, None)


def test_origin_of_the_weights_is_described(folder):
    assert FrozenCLIP.load(str(folder)).weights == str(folder)
    assert FrozenCLIP.load(str(folder), str(folder / WEIGHTS)).weights == str(folder / WEIGHTS)
    assert FrozenCLIP.load(str(folder), "random").weights == "random"


def test_random_weights_only_on_request(folder, tmp_path):
    torch.manual_seed(0)
    first = FrozenCLIP.load(str(folder), "random")
    assert first.fingerprint != FrozenCLIP.load(str(folder)).fingerprint
    torch.manual_seed(0)
    assert FrozenCLIP.load(str(folder), "random").fingerprint == first.fingerprint
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    with pytest.raises(WeightsError, match="pretrained=<file>"):
        FrozenCLIP.load(str(tmp_path))  # a folder without a weights file
    assert FrozenCLIP.load(str(tmp_path), "random").embed_dim == 24


def test_offline_error_lists_the_ways_to_get_weights(monkeypatch):
    def unreachable(*args, **kwargs):
        raise FileNotFoundError("the hub cannot be reached")

    monkeypatch.setattr("open_clip.factory.download_pretrained", unreachable)
    with pytest.raises(WeightsError) as raised:
        FrozenCLIP.load()
    message = str(raised.value)
    for part in ("RN50-quickgelu", "'openai'", "cannot be reached", "HF_HOME", "pretrained=<file>", "<folder>"):
        assert part in message


@pytest.mark.parametrize(
    ("model", "pretrained", "error", "found"),
    [
        ("RN50-quickgel", "openai", ConfigError, "RN50-quickgelu"),
        ("RN50", "opnai", WeightsError, "yfcc15m"),
        ("RN50", "/no/such/file.pt", WeightsError, "neither a file nor a tag"),
        ("RN50", "openai", ConfigError, "with '-quickgelu'"),
        ("roberta-ViT-B-32", "random", ConfigError, "Hugging Face"),
        ("coca_ViT-B-32", "random", ConfigError, "multimodal"),
    ],
)
def test_names_that_cannot_be_loaded(model, pretrained, error, found):
    with pytest.raises(error, match=found):
        FrozenCLIP.load(model, pretrained)


def test_folders_and_configs_that_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(WeightsError, match="tags exist only for open_clip's own model names"):
        FrozenCLIP.load(str(folder), "laion2b")
    with pytest.raises(WeightsError, match="tags exist only"):
        FrozenCLIP.load(str(folder / "open_clip_config.json"))
    with pytest.raises(ConfigError, match=r"must contain open_clip_config\.json"):
        FrozenCLIP.load(str(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not a readable JSON"):
        FrozenCLIP.load(str(tmp_path / "broken.json"), "random")
    (tmp_path / "foreign.json").write_text('{"vision_cfg": {}}')
    with pytest.raises(ConfigError, match="lacks embed_dim, text_cfg"):
        FrozenCLIP.load(str(tmp_path / "foreign.json"), "random")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(WeightsError, match=r"pointer\.safetensors"):
        FrozenCLIP.load(str(folder), str(tmp_path / "pointer.safetensors"))
    vit = tiny_clip(tmp_path / "vit", "vit")
    with pytest.raises(WeightsError, match=r"Missing key.*\s*.*visual\.bn1"):
        FrozenCLIP.load(str(folder), str(vit / WEIGHTS))
    with pytest.raises(ConfigError, match="image_std must be three numbers above 0"):
        FrozenCLIP.load(str(folder), image_std=(0.0, 1.0, 1.0))


def test_weights_file_with_quick_gelu(folder, tmp_path, builtin):
    file = str(shutil.copy(folder / WEIGHTS, tmp_path / "weights.safetensors"))
    with pytest.warns(UserWarning, match="tiny-RN-quickgelu"):
        plain = FrozenCLIP.load(builtin, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick = FrozenCLIP.load(f"{builtin}-quickgelu", file)
    assert plain.fingerprint == quick.fingerprint
    difference = plain.encode_texts(["cat"]) - quick.encode_texts(["cat"])
    assert difference.abs().max() > 1e-5, "the activation made no difference, so this test is void"
    content = {"model_cfg": tiny_config("resnet", quick_gelu=True)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="trained with QuickGELU"):
        FrozenCLIP.load(builtin, file)


def test_bare_file_uses_the_statistics_of_the_names_tags(folder, builtin):
    """Simulates names such as MobileCLIP-S1, whose tags all have other statistics than CLIP."""
    name, file = f"{builtin}-quickgelu", str(folder / WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        tag = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        patch.setitem(open_clip.pretrained._PRETRAINED, name, {"a": tag, "b": dict(tag)})
        assert_statistics(FrozenCLIP.load(name, file), tag["mean"], tag["std"])
        other = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        patch.setitem(open_clip.pretrained._PRETRAINED, name, {"a": tag, "b": other})
        with pytest.warns(UserWarning, match="different image means"):
            clip = FrozenCLIP.load(name, file)
        assert_statistics(clip, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FrozenCLIP.load(name, file, image_mean=other["mean"], image_std=other["std"])


def test_openai_archives(folder, tmp_path, builtin):
    """OpenAI's .pt files are TorchScript, which needs no pickled code, and use QuickGELU."""

    class Archive(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = Archive()
    for name, value in load_file(folder / WEIGHTS).items():
        *parents, leaf = name.split(".")
        place = module
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        place.register_buffer(leaf, value)
    for name in ("input_resolution", "context_length", "vocab_size"):
        module.register_buffer(name, torch.tensor(77))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(tmp_path / "RN.pt"))
    with pytest.raises(ConfigError, match="OpenAI's archive"):
        FrozenCLIP.load(builtin, str(tmp_path / "RN.pt"))
    clip = FrozenCLIP.load(f"{builtin}-quickgelu", str(tmp_path / "RN.pt"))
    weights = load_file(folder / WEIGHTS)
    assert torch.equal(clip.pool.v_proj.weight, weights["visual.attnpool.v_proj.weight"])
    assert torch.equal(clip.text.ln_final.weight, weights["ln_final.weight"])


def test_pickles_to_another_process(folder):
    clip = FrozenCLIP.load(str(folder))
    twin = pickle.loads(pickle.dumps(clip))
    assert torch.equal(twin.encode_texts(["cat"]), clip.encode_texts(["cat"]))
    assert twin.fingerprint == clip.fingerprint
