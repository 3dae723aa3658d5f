"""Opens float checkpoints in safetensors, PyTorch or GGUF files, local or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from atom_jax.errors import AtomError
from convert.sources import hub
from convert.sources.base import Source
from convert.sources.layout import WeightFiles, find_weights, reject_adapter, shard_set, weights_of_file
from convert.sources.safetensors import SafetensorsSource
from convert.sources.torch_bin import TorchSource

__all__ = ["Source", "open_source"]

_LOOKED_FOR = "*.safetensors, pytorch_model.bin or one *.gguf file"


def open_source(path_or_id: str | Path, *, revision: str | None = None) -> Source:
    """Opens a checkpoint and checks everything about it that can be checked without reading the weights.

    Args:
      path_or_id: a folder with safetensors or PyTorch weights (single or sharded) and a config.json, or
        with one GGUF file (single or split); one of these files; a model's folder in the Hub's cache; the id
        ``org/name`` of a model on the Hugging Face Hub, or its URL.
      revision: branch, tag or commit, for a model on the Hub or in its cache.

    Raises:
      AtomError: there is no checkpoint, the model is not supported, or a tensor is missing or has an
        unexpected shape or type. The message is one line that names the file or tensor.
    """
    path, name = Path(path_or_id), str(path_or_id)
    if path.exists():
        if path.is_dir() and hub.is_cached_repo(path):
            return _open_folder(hub.cached_snapshot(path, revision))
        if revision is not None:
            raise AtomError(f"{path}: a revision ({revision}) can only be given for a model on the Hub")
        return _open_folder(path) if path.is_dir() else _open_file(path)
    if (address := hub.parse_url(name)) is not None:
        name, revision = address.repo_id, address.revision_or(revision)
    if hub.is_repo_id(name):
        return _open_folder(hub.download(name, revision))
    raise AtomError(f"{path_or_id}: there is no such file or folder (nor is this a Hub id, org/name)")


def _open_file(path: Path) -> Source:
    from convert.sources.gguf import GGUFSource

    if path.suffix.lower() == ".gguf":
        return GGUFSource(path)
    reject_adapter([path.name], str(path.parent))
    weights = weights_of_file(path)
    if weights is None:
        raise AtomError(f"{path}: is no .safetensors, .bin or .gguf file; give such a file, or a folder")
    return _open_weights(path.parent, weights)


def _open_folder(folder: Path) -> Source:
    names = [path.name for path in folder.iterdir() if not path.is_dir()]
    weights = find_weights(names, str(folder))
    if weights is not None:
        return _open_weights(folder, weights)
    files = sorted(folder.glob("*.gguf"))
    if files and shard_set(files[0]) == files:
        return _open_file(files[0])
    if files:
        raise AtomError(f"{folder}: holds {len(files)} .gguf files; give one of them ({files[0].name}, ...)")
    reject_adapter(names, str(folder))
    raise AtomError(f"{folder}: holds no checkpoint; looked for {_LOOKED_FOR}")


def _open_weights(folder: Path, weights: WeightFiles) -> Source:
    return (SafetensorsSource if weights.format == "safetensors" else TorchSource)(folder, weights)
