"""One Orbax item on disk: a tree of NumPy arrays, written as a whole or not at all, and checked when read."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from atom_jax.errors import AtomError, WriteError, one_line

# By the name of a parameter: its NumPy array, or for a quantized linear a dict of its arrays by name (see
# ``atom_jax.schemes``). ``StoredSpecs`` has a ``jax.ShapeDtypeStruct`` in the place of each array.
StoredParams = dict[str, Any]
StoredSpecs = dict[str, Any]

# After a failed save: seconds without a change after which its threads count as ended, and the largest number
# of such waits.
_QUIET_SECONDS = 0.5
_MOST_WAITS = 120


def write_tree(path: Path, tree: StoredParams) -> None:
    """Writes one Orbax item. Afterwards ``path`` is complete, or does not exist.

    Raises:
      WriteError: the item cannot be written, e.g. because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _silent_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree, force=True)
    except Exception as error:  # Orbax and TensorStore raise many types where a write fails
        _remove_unfinished(path)
        raise WriteError(f"{path}: cannot be written: {_reason(error)}") from error


def _remove_unfinished(path: Path) -> None:
    """Removes the temporary folders that a failed save of ``path`` left beside it.

    Orbax raises the error as soon as one array cannot be written. Threads of TensorStore go on writing the
    other arrays, and create the folder again if it is removed. So this function removes the folders only
    when nothing changes any more, and returns when they have not been created again.
    """
    before = None
    for _ in range(_MOST_WAITS):
        found = _stored_files(path)
        if found == before:
            if not found:
                return
            for folder in _unfinished(path):
                shutil.rmtree(folder, ignore_errors=True)
        before = found
        time.sleep(_QUIET_SECONDS)


def _unfinished(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"))


def _stored_files(path: Path) -> dict[Path, tuple[int, int]]:
    """Size and modification time of each file and folder that an unfinished save has written so far."""
    found = {}
    for unfinished in _unfinished(path):
        for folder, _, names in os.walk(unfinished):
            for file in (Path(folder), *(Path(folder) / name for name in names)):
                with contextlib.suppress(FileNotFoundError):  # a thread renamed it meanwhile
                    stat = file.stat()
                    found[file] = (stat.st_size, stat.st_mtime_ns)
    return found


def read_tree(path: Path, specs: StoredSpecs) -> StoredParams:
    """Reads one Orbax item as NumPy arrays and checks it against ``specs``.

    Raises:
      AtomError: the item is missing or unreadable, or a tensor in it has not the shape and dtype in
        ``specs``.
    """
    if not path.is_dir():
        raise AtomError(f"{path}: missing from the checkpoint")
    # Of several processes each reads its own items; Orbax would have them wait for each other.
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    try:
        with _silent_orbax(), ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            tree = checkpointer.restore(path.absolute())
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise AtomError(f"{path}: not readable: {_reason(error)}") from error
    _check_tree(path, "", tree, specs)
    return tree


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Turns off the log of Orbax in this context: its threads would print a traceback of every error.

    After an error, the threads of TensorStore print "Event loop is closed" while they end, which can be
    after this context. So after an error this message stays suppressed until the process ends.
    """
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = print_others
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """The operating system's message if the error of TensorStore contains one, else the error's message."""
    said = re.search(r"([^:\[]+) \[os_error_code=", str(error))
    return said[1].strip() if said else one_line(error)


def _check_tree(path: Path, prefix: str, tree: Any, specs: StoredSpecs) -> None:
    found = set(tree) if isinstance(tree, Mapping) else set()
    if found != set(specs):
        under = prefix.removesuffix(".") or "the root"
        raise AtomError(f"{path}: expected {sorted(specs)} under {under}, found {sorted(map(str, found))}")
    for name, spec in specs.items():
        value, label = tree[name], f"{prefix}{name}"
        if isinstance(spec, dict):
            _check_tree(path, f"{label}.", value, spec)
        elif not hasattr(value, "shape") or value.shape != spec.shape or value.dtype != spec.dtype:
            dtype, shape = getattr(value, "dtype", type(value).__name__), list(getattr(value, "shape", ()))
            raise AtomError(
                f"{path}: tensor {label}: expected {spec.dtype}{list(spec.shape)}, found {dtype}{shape}"
            )
