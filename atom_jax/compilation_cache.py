"""Compiled programs that outlive the process."""

from __future__ import annotations

from pathlib import Path

import jax

from pallas_kernels.user_cache import user_cache


def compilation_cache_folder() -> Path | None:
    """What ``enable_compilation_cache`` returns; nothing is changed."""
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    configured = jax.config.values["jax_compilation_cache_dir"]
    return Path(configured) if configured else user_cache() / "xla"


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs on disk, so that the next process need not compile them. For entry points.

    A folder that was configured already (``JAX_COMPILATION_CACHE_DIR`` or ``jax.config``) is kept as it is;
    otherwise it is ``atom-jax/xla`` in the cache folder of the user (``XDG_CACHE_HOME`` or ``~/.cache``).
    Setting ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off.

    Returns:
      The folder; None if the cache is turned off.
    """
    folder = compilation_cache_folder()
    if folder is None or jax.config.values["jax_compilation_cache_dir"]:
        return folder
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default only what takes a second to compile is kept; an engine's many programs may each take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder
