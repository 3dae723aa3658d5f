"""The working folder of a conversion, beside the output: it survives a kill and is removed at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from atom_jax.errors import AtomError, WriteError


class Workspace:
    """The folder ``OUT.partial``: the checkpoint being written, and what a later run needs to continue.

    Attributes:
      out: the folder OUT that the conversion creates.
      root: the folder ``OUT.partial``.
      checkpoint: folder in which the checkpoint is written; a single rename makes it OUT.
      resumed: whether the workspace of an earlier run of the same job was found.
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
        """Whether a run has already stored anything with which it could be continued."""
        return any(path.name != "job.json" for path in self.path("").iterdir())

    def write_json(self, name: str, data: Any) -> None:
        _replace(self.path(name), lambda file: file.write(json.dumps(data).encode()))

    def read_json(self, name: str) -> Any:
        """The data of a file in the workspace; None if it was not written."""
        path = self.path(name)
        return json.loads(path.read_bytes()) if path.exists() else None

    def write_array(self, name: str, array: np.ndarray) -> None:
        _replace(self.path(name), lambda file: _write_array(file, array))

    def read_array(self, name: str) -> np.ndarray | None:
        """The array in a file of the workspace; None if it was not written."""
        path = self.path(name)
        return np.load(path, allow_pickle=False) if path.exists() else None

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        _replace(self.path(name), lambda file: _write_arrays(file, arrays))

    def read_arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays in a file of the workspace, by name; None if it was not written."""
        path = self.path(name)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def publish(self) -> None:
        """Renames the complete checkpoint to OUT, once it is on the disk, and removes the workspace."""
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
    """Writes a file through a temporary one, so that ``path`` never exists with incomplete contents."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:  # the error of a failed write does not name the file
        temporary.unlink(missing_ok=True)  # it may be the file that fills the disk
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_array(file: IO[bytes], array: np.ndarray) -> None:
    """Like ``np.save``, but on a full disk the error says so; the error of ``np.save`` does not."""
    array = np.require(array, requirements="C")  # ``np.ascontiguousarray`` gives a number an axis
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).data)


def _write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Like ``np.savez``, but on a full disk the error says so."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_array(member, array)


@contextlib.contextmanager
def open_workspace(out: Path, job: dict[str, Any]) -> Iterator[Workspace]:
    """Opens the workspace for a conversion, which may be that of an unfinished run of the same job.

    After a kill, an interrupt or a file that cannot be written, the workspace is kept, so that a later run
    can continue; if nothing is stored in it yet, a file that cannot be written removes it. An AtomError that
    ends the conversion removes it, too.

    Args:
      out: folder OUT that the conversion creates; it must not exist or must be empty.
      job: everything that the result depends on, as JSON data.

    Yields:
      The workspace, which is locked against other processes.

    Raises:
      AtomError: OUT exists, another process is converting into it, or there is an unfinished conversion of
        another job.
      WriteError: a file cannot be written.
    """
    root = partial_path(out)
    _check_free(out)
    with _one_error(root), _locked(root):
        _check_free(out)  # again: the process that held the lock may have created it meanwhile
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
    """Removes the workspace that a run may have left if it was killed after it had published OUT."""
    _remove(partial_path(out))


def partial_path(out: Path) -> Path:
    """The folder in which ``convert`` works until the checkpoint is complete."""
    return out.with_name(out.name + ".partial")


def _check_free(out: Path) -> None:
    """AtomError if a rename could not create OUT. It can replace an empty folder that is no mount point."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or any(out.iterdir()):
        raise AtomError(f"{out}: exists already; remove it or choose another output folder")
    if os.path.ismount(out):
        raise AtomError(f"{out}: is where a file system is mounted; choose a folder inside it")


@contextlib.contextmanager
def _one_error(root: Path) -> Iterator[None]:
    """Turns an OSError in this context into a WriteError that names the file, or ``root`` if unknown."""
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
    """Creates the folder ``root`` and locks it against other processes; AtomError if another has the lock."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise AtomError(f"{root}: another process is converting into it") from error
            # Other errors are ignored: some network file systems have no locks.
        yield
    finally:
        os.close(descriptor)


def _read_job(root: Path) -> dict[str, Any] | None:
    """The job that can be continued in ``root``; None if there is none.

    There is no job file if a run was killed just after it created the folder, or while it removed it. There
    is no checkpoint if a run was killed just after it published OUT.
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
    """Removes a workspace, its job file first, so that a run killed meanwhile leaves no job to continue."""
    with contextlib.suppress(OSError):
        (root / "work" / "job.json").unlink()
    shutil.rmtree(root, ignore_errors=True)
