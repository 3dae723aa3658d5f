"""Where weights come from: safetensors, PyTorch pickles and GGUF, local or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from atom_jax.errors import AtomError
from convert.sources import hub, safetensors, torch_bin
from convert.sources.base import Source

__all__ = ["Source", "open_source"]

_LOOKED_FOR = "*.safetensors, pytorch_model.bin or one *.gguf file"


def open_source(path_or_id: str | Path, *, revision: str | None = None) -> Source:
    """Opens a checkpoint and checks everything about it that can be checked without reading the weights.

    Args:
      path_or_id: a folder with safetensors or PyTorch weights (single or sharded) and a config.json, or
        with one GGUF file; a ``.gguf`` file; or the id ``org/name`` of a model on the Hugging Face Hub.
      revision: branch, tag or commit, for a model on the Hub.

    Raises:
      AtomError: nothing usable is there, the model is of a kind that is not supported, or a tensor is
        missing or has an unexpected shape or type. The message is one line that names the culprit.
    """
    path = Path(path_or_id)
    if path.exists():
        if revision is not None:
            raise AtomError(f"{path}: a revision ({revision}) can only be given for a model on the Hub")
        return _open_folder(path) if path.is_dir() else _open_file(path)
    if hub.is_repo_id(str(path_or_id)):
        return _open_folder(hub.download(str(path_or_id), revision))
    raise AtomError(f"{path_or_id}: there is no such file or folder (nor is this a Hub id, org/name)")


def _open_file(path: Path) -> Source:
    from convert.sources.gguf import GGUFSource

    if path.suffix.lower() == ".gguf":
        return GGUFSource(path)
    raise AtomError(f"{path}: is not a .gguf file; for other formats give the folder of the checkpoint")


def _open_folder(folder: Path) -> Source:
    # The order of transformers, then files whose names it does not look for.
    if any((folder / name).is_file() for name in (safetensors.SINGLE, safetensors.INDEX)):
        return safetensors.SafetensorsSource(folder)
    if any((folder / name).is_file() for name in (torch_bin.SINGLE, torch_bin.INDEX)):
        return torch_bin.TorchSource(folder)
    if any(folder.glob("*.safetensors")):
        return safetensors.SafetensorsSource(folder)
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise AtomError(f"{folder}: holds {len(files)} .gguf files; give one of them ({files[0].name}, ...)")
    if files:
        return _open_file(files[0])
    raise AtomError(f"{folder}: holds no checkpoint; looked for {_LOOKED_FOR}")
