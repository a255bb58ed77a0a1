"""Uploads exported models to the Hugging Face Hub and downloads them."""

from __future__ import annotations

import os
from pathlib import Path

from cbsa_lightning.checkpoints.portable import CONFIG, WEIGHTS
from cbsa_lightning.errors import CheckpointError, ConfigError, DataError
from cbsa_lightning.io.checksums import SUMS, check_checksums, write_checksums

CARD = "README.md"


def push_to_hub(folder: str | os.PathLike[str], repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Uploads a folder written by `cbsa export` to a model repository, which is created if it does not exist.

    You may edit the model card `README.md` before the upload, but the other files must be unchanged.

    Args:
        folder: The folder. It must contain the safetensors format, so that ``Classifier.from_pretrained`` can load it.
        repo_id: Name of the repository, such as "user/model".
        private: Whether a new repository is private.
        token: Access token. The default is the token that `hf auth login` has stored.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: If the folder is not an exported model, one of its files was changed, or the upload fails.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS, SUMS) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {', '.join(missing)}. Create it with `cbsa export`, including the safetensors format."
        )
    try:
        check_checksums(folder, [name for name in os.listdir(folder) if name not in (SUMS, CARD)])
    except DataError as error:
        raise ConfigError(f"{folder} is not uploaded: {error}") from error
    write_checksums(folder)  # the card may have been edited
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Upload model")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} cannot be uploaded to {repo_id}: {error} The folder itself is complete. Log in with `hf auth "
            "login`, or correct the name, and upload it with cbsa_lightning.inference.hub.push_to_hub."
        ) from error
    return str(commit.commit_url)


def download(
    repo_id: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Path:
    """Downloads the files that ``Classifier.load`` needs, or finds them in the local cache.

    Args:
        repo_id: Name of the repository, such as "user/model".
        revision: Branch, tag or commit. If None, the default branch is used.
        cache_dir: Folder of the cache. The default is that of huggingface_hub.
        token: Access token for private repositories. The default is the token that `hf auth login` has stored.

    Returns:
        The folder with the files.

    Raises:
        CheckpointError: If the repository is not available or does not contain an exported model.
    """
    from huggingface_hub import snapshot_download

    files = [CONFIG, WEIGHTS, SUMS]
    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=files)
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{repo_id} cannot be downloaded from the Hugging Face Hub: {error} Use the name USER/MODEL of a "
            "repository that `cbsa export --push_to` created, or load an exported folder with Classifier.load."
        ) from error
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{repo_id} lacks {', '.join(missing)}. It is not a model that cbsa_lightning exported with safetensors."
        )
    return folder
