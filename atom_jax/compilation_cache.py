"""JAX's persistent compilation cache: keeps compiled programs on disk for the next process."""

from __future__ import annotations

from pathlib import Path

import jax

from pallas_kernels.user_cache import user_cache


def compilation_cache_folder() -> Path | None:
    """The folder that ``enable_compilation_cache`` would return. Changes no setting."""
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    configured = jax.config.values["jax_compilation_cache_dir"]
    return Path(configured) if configured else user_cache() / "xla"


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs on disk, so that the next process does not compile them again.

    It changes the global JAX configuration, so only entry points of programs should call it. A cache folder
    that is already configured (``JAX_COMPILATION_CACHE_DIR`` or ``jax.config``) is kept, with its settings;
    otherwise the folder is ``atom-jax/xla`` in the user's cache folder (``XDG_CACHE_HOME`` or ``~/.cache``).
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns the cache off.

    Returns:
      The cache folder; None if the cache is turned off.
    """
    folder = compilation_cache_folder()
    if folder is None or jax.config.values["jax_compilation_cache_dir"]:
        return folder
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX keeps only programs that take a second or more to compile. An engine has many programs,
    # each of which may take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder
