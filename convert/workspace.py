"""Where a conversion works: a folder beside the output that survives a kill and disappears at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from atom_jax.errors import AtomError, WriteError


class Workspace:
    """``OUT.partial``: the checkpoint being written, and what a later run needs to go on.

    Attributes:
      checkpoint: becomes OUT in one rename.
      resumed: whether an earlier run of the same job was found.
    """

    def __init__(self, out: Path, root: Path, resumed: bool) -> None:
        self.out = out
        self.root = root
        self.checkpoint = root / "checkpoint"
        self.resumed = resumed

    def path(self, name: str) -> Path:
        return self.root / "work" / name

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return any(path.name != "job.json" for path in self.path("").iterdir())

    def write_json(self, name: str, data: Any) -> None:
        _replace(self.path(name), lambda file: file.write(json.dumps(data).encode()))

    def read_json(self, name: str) -> Any:
        """The data, or None if it was not written."""
        path = self.path(name)
        return json.loads(path.read_bytes()) if path.exists() else None

    def write_array(self, name: str, array: np.ndarray) -> None:
        _replace(self.path(name), lambda file: _write_array(file, array))

    def read_array(self, name: str) -> np.ndarray | None:
        """The array, or None if it was not written."""
        path = self.path(name)
        return np.load(path, allow_pickle=False) if path.exists() else None

    def publish(self) -> None:
        """Makes the checkpoint appear as OUT, whole, and removes everything else."""
        for folder, _, files in os.walk(self.checkpoint):
            for name in files:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        os.rename(self.checkpoint, self.out)
        _sync(self.out.parent)
        _remove(self.root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is complete whenever it exists."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:  # a failed write does not say of which file
        temporary.unlink(missing_ok=True)  # it may be what fills the disk
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    """``np.save``, whose error on a full disk does not say that the disk is full."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


@contextlib.contextmanager
def open_workspace(out: Path, job: dict[str, Any]) -> Iterator[Workspace]:
    """The workspace of ``job``, found again if an earlier run of the same job did not end.

    A kill, an interrupt or a file that cannot be written leaves the workspace, to go on, unless nothing is
    in it yet; any other error that ends the conversion removes it.

    Args:
      out: folder to make; must not exist, or be empty.
      job: everything the result depends on, as JSON data.

    Raises:
      AtomError: OUT exists, another process works on it, there is an unfinished conversion of another job,
        or (WriteError) a file cannot be written.
    """
    root = partial_path(out)
    _check_free(out)
    with _one_error(root), _locked(root):
        _check_free(out)  # again: the process that had the lock until now may have been making it
        found = _read_job(root)
        if found is not None and found != job:
            raise AtomError(
                f"{root}: holds an unfinished conversion of another source or with other options; "
                "finish it with the same command or remove it"
            )
        workspace = Workspace(out, root, resumed=found is not None)
        try:
            if found is None:
                for folder in (workspace.checkpoint, workspace.path("")):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                workspace.write_json("job.json", job)
            yield workspace
        except (WriteError, OSError) as error:
            if not workspace.begun:
                _remove(root)
                raise
            raise WriteError(
                f"{_reason(error, root)}; what is done is kept in {root}: the same command goes on"
            ) from error
        except AtomError:
            _remove(root)
            raise


def remove_workspace(out: Path) -> None:
    """Removes what a run killed after it published OUT may have left."""
    _remove(partial_path(out))


def partial_path(out: Path) -> Path:
    """Where ``convert`` works until the checkpoint is whole."""
    return out.with_name(out.name + ".partial")


def _check_free(out: Path) -> None:
    """AtomError where OUT could not appear by one rename. An empty folder can be replaced, unless mounted."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or any(out.iterdir()):
        raise AtomError(f"{out}: exists already; remove it or choose another output folder")
    if os.path.ismount(out):
        raise AtomError(f"{out}: is where a file system is mounted; choose a folder inside it")


@contextlib.contextmanager
def _one_error(root: Path) -> Iterator[None]:
    """Whatever the file system refuses is a WriteError that names the file, or else ``root``."""
    try:
        yield
    except OSError as error:
        raise WriteError(_reason(error, root)) from error


def _reason(error: OSError | WriteError, root: Path) -> str:
    if isinstance(error, WriteError):
        return str(error)
    return f"{error.filename or root}: {error.strerror or error}"


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Makes the folder ``root`` and keeps other processes out of it; the lock ends with the process."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise AtomError(f"{root}: another process is converting into it") from error
            # A file system without locks, as some network ones are.
        yield
    finally:
        os.close(descriptor)


def _read_job(root: Path) -> dict[str, Any] | None:
    """The job that can be continued in ``root``.

    Without a job file the folder is the debris of a run killed in its first moments, or while it removed
    it; without a checkpoint, of one killed just after it published OUT.
    """
    path = root / "work" / "job.json"
    if not (root / "checkpoint").is_dir():
        return None
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AtomError(f"{path}: not readable: {error}") from error


def _remove(root: Path) -> None:
    """Removes a workspace: its job first, so that a run killed meanwhile leaves nothing to go on with."""
    with contextlib.suppress(OSError):
        (root / "work" / "job.json").unlink()
    shutil.rmtree(root, ignore_errors=True)
