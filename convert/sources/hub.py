"""Checkpoints on the Hugging Face Hub, downloaded into its usual cache."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

from atom_jax.errors import AtomError
from convert.sources import safetensors, torch_bin
from convert.sources.base import one_line
from convert.sources.folder import CONFIG_FILES, TOKENIZER_FILES

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", safetensors.INDEX)
_TORCH = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", torch_bin.INDEX)
_TIMEOUT = 10.0  # seconds for the one small request that lists the files


def is_repo_id(text: str) -> bool:
    """Whether ``text`` is spelled like ``organisation/name``."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def download(repo_id: str, revision: str | None) -> Path:
    """The folder in the Hub's cache that holds ``repo_id``: weights in one format, configuration, tokenizer.

    Without a network a copy that was downloaded before is used.

    Raises:
      AtomError: the Hub cannot be reached, or knows no such model, or the model has no usable weights.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, timeout=_TIMEOUT)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise AtomError(f"{where}: the Hub does not give this model: {one_line(error)}") from error
    except Exception as error:  # offline mode, and every error that the HTTP library of the day has
        return _cached(huggingface_hub, repo_id, revision, where, error)
    files = wanted_files([sibling.rfilename for sibling in info.siblings or []], where)
    commit = info.sha or revision
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=commit, allow_patterns=files))
    except Exception as error:
        raise AtomError(f"{where}: the download from the Hub failed: {one_line(error)}") from error


def _cached(hub: Any, repo_id: str, revision: str | None, where: str, reason: Exception) -> Path:
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception as error:
        raise AtomError(
            f"{where}: is no local file or folder, and the Hugging Face Hub cannot be reached "
            f"({one_line(reason)}); a local folder with the checkpoint can be given instead"
        ) from error


def wanted_files(files: list[str], where: str) -> list[str]:
    """The files of a model to download: safetensors or, where there are none, PyTorch weights.

    Only the top folder is read: repositories keep other formats and precisions in sub-folders.

    Raises:
      AtomError: the model has neither.
    """
    for patterns in (_SAFETENSORS, _TORCH):
        weights = [name for name in files if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if weights:
            break
    else:
        has_gguf = any(name.endswith(".gguf") for name in files)
        hint = " (it has .gguf files: download one and give its path)" if has_gguf else ""
        raise AtomError(f"{where}: has neither model.safetensors nor pytorch_model.bin{hint}")
    weights = [name for name in weights if "/" not in name]
    return weights + [name for name in files if name in CONFIG_FILES or name in TOKENIZER_FILES]
