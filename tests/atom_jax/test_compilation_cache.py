"""Where compiled programs are kept, and that they are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import jax
import atom_jax.engine
assert jax.config.jax_compilation_cache_dir == {before!r}
from atom_jax.compilation_cache import enable_compilation_cache
print(enable_compilation_cache())
jax.jit(lambda x: jax.numpy.sort(x @ x) @ x)(jax.numpy.ones((64, 64)))
"""


def run(before: str | None = None, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)],
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_default_is_the_users_cache_folder_and_only_once_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "atom-jax" / "xla"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == str(folder)
    assert any(folder.iterdir())


def test_the_users_own_choice_is_kept(tmp_path: Path) -> None:
    mine = str(tmp_path / "mine")
    assert run(mine, JAX_COMPILATION_CACHE_DIR=mine, XDG_CACHE_HOME=str(tmp_path)) == mine
    assert not (tmp_path / "atom-jax").exists()
