"""Networks of the library are built from a checkpoint, and others are refused."""

from __future__ import annotations

import pytest
import yaml

from cbsa_lightning.checkpoints.files import MODEL, SOURCE
from cbsa_lightning.errors import CheckpointError
from cbsa_lightning.inference.stored_network import stored_network
from cbsa_lightning.networks.zero_shot import ZeroShotCLIP


def checkpoint(**network):
    return {SOURCE: "a.ckpt", MODEL: yaml.safe_dump({"class_path": "SSMLLModule", "init_args": {"network": network}})}


def test_a_network_of_the_library_is_built_with_its_settings(clip_folder):
    path = "cbsa_lightning.networks.zero_shot.ZeroShotCLIP"
    make = stored_network(checkpoint(class_path=path, init_args={"clip": "elsewhere"}), clip=str(clip_folder))
    assert isinstance(make(["cat", "dog"]), ZeroShotCLIP)


@pytest.mark.parametrize(
    "path",
    ["os.system", "my_systems.LinearProbe", "cbsa_lightning.networks.base.gone", "cbsa_lightning.networks..os", 3],
)
def test_checkpoints_cannot_choose_other_code(path):
    with pytest.raises(CheckpointError, match=r"a\.ckpt has the network .*not a network of this library"):
        stored_network(checkpoint(class_path=path))


@pytest.mark.parametrize("text", [None, "[", "3", "{init_args: {}}", "{init_args: {network: null}}", "{init_args: 3}"])
def test_checkpoints_without_a_network_are_refused(text):
    with pytest.raises(CheckpointError, match="does not name its network"):
        stored_network({SOURCE: "a.ckpt", MODEL: text})
