"""Finds checkpoints on the Hugging Face Hub and downloads them into its usual cache."""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atom_jax.errors import AtomError, one_line
from convert.sources.folder import CONFIG_FILES, placed
from convert.sources.layout import find_weights, reject_adapter
from convert.sources.tokenizer_files import TOKENIZER_FILES

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_TIMEOUT = 10.0  # seconds for the one small request that lists the files


@dataclasses.dataclass(frozen=True)
class Address:
    """The model that a URL of the Hub points to.

    Attributes:
      url: the URL as the user gave it, for error messages.
      repo_id: id of the model, ``org/name``.
      revision: branch, tag or commit in the URL; None if it has none.
    """

    url: str
    repo_id: str
    revision: str | None

    def revision_or(self, revision: str | None) -> str | None:
        """The revision in the URL, or ``revision`` if it has none; AtomError if both are given and differ."""
        if None not in (revision, self.revision) and revision != self.revision:
            raise AtomError(f"{self.url}: names another revision than the one asked for, {revision}")
        return self.revision or revision


def parse_url(text: str) -> Address | None:
    """The model that a URL of the Hub points to: ``https://huggingface.co/org/name``, ``.../tree/revision``.

    Returns:
      The model; None if ``text`` is not a URL.

    Raises:
      AtomError: ``text`` is a URL, but not of a model on the Hub.
    """
    scheme, colon, rest = text.partition("://")
    if not colon:
        host = text.partition("/")[0]
        if host not in _HOSTS:
            return None
        scheme, rest = "https", text
    if scheme == "hf":
        rest = f"{_HOSTS[0]}/{rest}"
    path = rest.partition("?")[0].partition("#")[0]
    host, *parts = [urllib.parse.unquote(part) for part in path.rstrip("/").split("/")]
    if scheme not in ("http", "https", "hf") or host.lower() not in _HOSTS:
        raise AtomError(f"{text}: is no URL of the Hugging Face Hub; give a folder, or org/name")
    repo_id, where = "/".join(parts[:2]), parts[2:]
    if not is_repo_id(repo_id) or parts[0] in ("datasets", "spaces"):
        raise AtomError(f"{text}: is not the URL of a model, https://{_HOSTS[0]}/org/name")
    if not where or (where[0] == "tree" and len(where) == 2):
        return Address(text, repo_id, where[1] if where else None)
    raise AtomError(
        f"{text}: points into the model; give https://{_HOSTS[0]}/{repo_id}, with /tree/REVISION if need be"
    )


def is_repo_id(text: str) -> bool:
    """Whether ``text`` has the form ``organisation/name``."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def download(repo_id: str, revision: str | None) -> Path:
    """The folder in the Hub's cache that holds ``repo_id``: weights in one format, configuration, tokenizer.

    If the Hub cannot be reached, a copy that is already in the cache is used.

    Args:
      repo_id: id of the model, ``org/name``.
      revision: branch, tag or commit; None for the default branch.

    Raises:
      AtomError: the Hub has no such model, the model has no usable weights, or the Hub cannot be reached and
        there is no copy in the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, timeout=_TIMEOUT)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise AtomError(f"{where}: the Hub does not give this model: {one_line(error)}") from error
    except Exception as error:  # offline mode, and any error of the HTTP library
        return _cached(huggingface_hub, repo_id, revision, where, error)
    commit = info.sha or revision

    def fetch(files: list[str]) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(repo_id, revision=commit, allow_patterns=files))
        except Exception as error:
            raise AtomError(f"{where}: the download from the Hub failed: {one_line(error)}") from error

    return fetch(wanted_files([sibling.rfilename for sibling in info.siblings or []], where, fetch))


def _cached(hub: Any, repo_id: str, revision: str | None, where: str, reason: Exception) -> Path:
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception as error:
        raise AtomError(
            f"{where}: is no local file or folder, and the Hugging Face Hub cannot be reached "
            f"({one_line(reason)}); a local folder with the checkpoint can be given instead"
        ) from error


def wanted_files(files: list[str], where: str, fetch: Callable[[list[str]], Path]) -> list[str]:
    """The files of a model to download: the weights that ``find_weights`` takes, configuration, tokenizer.

    Only files of the top folder are used, because repositories have other formats and precisions in
    sub-folders.

    Args:
      files: names of all files of the model.
      where: what to call the model in error messages.
      fetch: downloads the files of the given names and returns their folder. It is used for an index, which
        must be read to know the shards.

    Raises:
      AtomError: the model has no usable weights, or its index cannot be used.
    """
    top = [name for name in files if "/" not in name]
    weights = find_weights(top, where)
    if weights is None:
        reject_adapter(top, where)
        has_gguf = any(name.endswith(".gguf") for name in files)
        hint = " (it has .gguf files: download one and give its path)" if has_gguf else ""
        raise AtomError(f"{where}: has neither model.safetensors nor pytorch_model.bin{hint}")
    wanted = set(weights.files)
    if weights.index is not None:
        wanted |= {weights.index, *placed(fetch([weights.index]) / weights.index)}
    # Only names in the list of files are returned, because the names in an index are not trusted.
    return [name for name in top if name in wanted or name in CONFIG_FILES or name in TOKENIZER_FILES]


def is_cached_repo(folder: Path) -> bool:
    """Whether ``folder`` is the folder of a model in the Hub's cache (``models--org--name``)."""
    return (folder / "snapshots").is_dir() and not (folder / "config.json").exists()


def cached_snapshot(folder: Path, revision: str | None) -> Path:
    """The snapshot of a revision in a model's folder of the Hub's cache.

    Args:
      folder: the folder of the model in the cache.
      revision: branch, tag or (start of a) commit; None for the branch ``main`` as it was last downloaded,
        or for the only snapshot if ``main`` was not downloaded.

    Raises:
      AtomError: the revision was not downloaded, or it is None and not clear which snapshot is meant.
    """
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    by_name = {path.name: path for path in snapshots}
    reference = folder / "refs" / (revision or "main")
    if reference.is_file() and folder.resolve() in reference.resolve().parents:
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
        if commit in by_name:
            return by_name[commit]
    if revision is not None:
        matching = [path for path in snapshots if path.name.startswith(revision)]
        if len(matching) == 1:
            return matching[0]
        raise AtomError(f"{folder}: revision {revision} was not downloaded into this cache")
    if len(snapshots) != 1:
        raise AtomError(f"{folder}: holds {len(snapshots)} snapshots; give one with --revision")
    return snapshots[0]
