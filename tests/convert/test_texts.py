"""The evaluation texts: what SOURCES.toml says, nothing shared with calibration or between the sets."""

from __future__ import annotations

import inspect
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from atom_jax.errors import AtomError
from convert import texts
from convert.calibrate.help_topics import help_topics
from convert.texts import REPORTED, SELECTION, evaluation_texts, load_texts, read_texts, text_digests
from tests.convert.tiny import fails, save_tiny

KINDS = ["prose", "code", "dialogue", "lists", "french"]
# A run of so many characters in two texts is no accident.
LONGEST_COMMON = 200
SOURCES = tomllib.loads(texts.SOURCES_FILE.read_text(encoding="utf-8"))


def pieces(text: str, step: int) -> Iterator[str]:
    """Pieces of half ``LONGEST_COMMON`` characters, white space made equal, one every ``step`` characters."""
    text = " ".join(text.split())
    half = LONGEST_COMMON // 2
    for start in range(0, len(text) - half + 1, step):
        yield text[start : start + half]


def in_common(text: str, other: str) -> list[str]:
    """Pieces of both texts. Any ``LONGEST_COMMON`` characters in common hold a whole piece of ``other``."""
    known = set(pieces(other, LONGEST_COMMON // 2))
    return [piece for piece in pieces(text, 1) if piece in known]


@pytest.mark.parametrize("which", [REPORTED, SELECTION])
def test_five_long_texts(which: str) -> None:
    found = evaluation_texts(which)
    assert list(found) == KINDS == list(text_digests(which))
    for name, text in found.items():
        assert 10_000 < len(text) < 60_000, name
        assert text[0].strip() and text.endswith("\n") and not text.endswith("\n\n"), name
        assert "\r" not in text and "\ufffd" not in text, name
    assert "def " in found["code"] and "function" in found["code"]
    assert found["french"].count(" les ") > 50 > found["french"].count(" the ")


def test_no_source_is_in_both_sets() -> None:
    used = {
        which: {part["package"] for entry in SOURCES["texts"][which].values() for part in entry["parts"]}
        for which in (REPORTED, SELECTION)
    }
    assert not used[REPORTED] & used[SELECTION]
    assert all(used[REPORTED]) and used[REPORTED] | used[SELECTION] <= SOURCES["packages"].keys()


def test_every_source_has_a_licence_to_redistribute() -> None:
    for name, package in SOURCES["packages"].items():
        assert package["copyright"], name
        licence = package["licence"]
        allowed = ("public domain (", "MIT", "BSD-3-Clause", "CC-BY-SA-3.0", "CC-BY-4.0")
        assert licence.startswith(allowed), name
        if licence in ("MIT", "BSD-3-Clause"):
            text = (texts.FOLDER / "licences" / f"{name}.txt").read_text(encoding="utf-8")
            assert "copyright notice" in " ".join(text.split()), name
            assert package["copyright"].split()[-1] in text, name


def test_what_is_in_common_is_found() -> None:
    text = evaluation_texts()["prose"]
    assert in_common(text[:5000], "x " * 77 + text[1234 : 1234 + LONGEST_COMMON + 10])
    assert not in_common(text[:5000], text[6000:9000])


def test_the_sets_share_no_text() -> None:
    reported, selection = (" ".join(evaluation_texts(which).values()) for which in (REPORTED, SELECTION))
    assert not in_common(reported, selection)


@pytest.mark.parametrize("which", [REPORTED, SELECTION])
def test_no_text_is_calibrated_on(which: str) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    library = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.py"))
    assert inspect.getsource(tomllib.load) not in library and len(library) > 1_000_000
    own = " ".join(evaluation_texts(which).values())
    assert not in_common(own, "\n".join(help_topics()))
    assert not in_common(own, library)


def test_damaged_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "FOLDER", tmp_path)
    with fails(tmp_path / REPORTED / "prose.txt", "No such file", "install"):
        evaluation_texts()
    (tmp_path / REPORTED).mkdir()
    (tmp_path / REPORTED / "prose.txt").write_text("changed")
    with fails(tmp_path / REPORTED / "prose.txt", "damaged", text_digests()["prose"]):
        evaluation_texts()


def test_files_in_place_of_the_texts(tmp_path: Path) -> None:
    for name in ("a/one.txt", "b/one.txt", "two.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = [tmp_path / "a" / "one.txt", tmp_path / "two.txt"]
    assert read_texts(files) == {"one.txt": "a/one.txt", "two.txt": "two.txt"}
    assert read_texts([]) == evaluation_texts()
    with fails(tmp_path / "b" / "one.txt", "rename one of them"):
        read_texts([*files, tmp_path / "b" / "one.txt"])
    with pytest.raises(AtomError, match=r"no\.txt"):
        read_texts([tmp_path / "no.txt"])


def test_tokens(tmp_path: Path) -> None:
    """The first tokens of each text: as many as asked for, the same as those of the whole text."""
    model = save_tiny(tmp_path)
    short, long = (load_texts([], model, number) for number in (100, 300))
    assert list(short) == KINDS
    for name in KINDS:
        assert (short[name].size, long[name].size) == (100, 300)
        assert short[name].tolist() == long[name][:100].tolist()
