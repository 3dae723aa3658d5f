"""Turns the files of packages into plain text without markup: the forms of convert/texts/SOURCES.toml.

Each form takes the files of one part, by their names in the package, and returns its text. Paragraphs are
separated by an empty line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from xml.etree import ElementTree as ET

import yaml

Files = Mapping[str, str]

_SPEAKERS = {"CDR": "Armstrong", "CMP": "Collins", "LMP": "Aldrin", "CC": "Houston"}
# Words of paragraphs that nobody has translated to French.
_ENGLISH = re.compile(r"\b(the|and|with)\b")
_XHTML = "{http://www.w3.org/1999/xhtml}"
_MALLARD = "{http://projectmallard.org/1.0/}"


def plain(files: Files) -> str:
    """The files as they are, without the empty lines at their ends."""
    return "\n\n".join(text.strip("\n") for text in files.values())


def unwrapped(files: Files) -> str:
    """Paragraphs of prose, each on one line; those that are only decoration or headings are left out."""
    paragraphs = []
    for text in files.values():
        for paragraph in re.split(r"\n\s*\n", text.replace("\r", "")):
            line = " ".join(paragraph.split())
            if len(line) > 80 and "+++" not in line and line[-1] in '.:?!")':
                paragraphs.append(line)
    return "\n\n".join(paragraphs)


def conversations(files: Files) -> str:
    """Conversations of ChatterBot's YAML files, between a user and an assistant; each is taken once."""
    found: dict[str, None] = {}
    for text in files.values():
        for turns in yaml.load(text, Loader=yaml.BaseLoader)["conversations"]:
            said = [" ".join(turn.split()) for turn in turns]
            names = ("User", "Assistant") * len(said)
            found["\n".join(f"{name}: {turn}" for name, turn in zip(names, said, strict=False))] = None
    return "\n\n".join(found)


def transcript(files: Files) -> str:
    """A transcript of radio calls: who speaks and what, without the times and what nobody understood."""
    lines = []
    for text in files.values():
        calls = re.findall(r"^(?:\d\d ){4}([A-Z]+)\n((?:.+\n)+)", text.replace("\r", ""), re.MULTILINE)
        for name, words in calls:
            said = " ".join(words.split())
            if name in _SPEAKERS and re.search("[a-z]", said):
                lines.append(f"{_SPEAKERS[name]}: {said}")
    return "\n".join(lines)


def profiles(files: Files) -> str:
    """Nested lists of facts from the JSON files of the World Factbook, one for each country, and a table."""

    def lists(value: Mapping[str, object], depth: int) -> Iterator[str]:
        for name, entry in value.items():
            if not isinstance(entry, dict):
                continue
            inner = list(lists(entry, depth + 1))
            if fact := " ".join((entry.get("text") or "").split()):
                yield f"{'  ' * depth}- {name}: {fact}"
            elif inner:
                yield f"{'  ' * depth}- {name}:"
            yield from inner

    blocks = []
    for text in files.values():
        country = json.loads(text)
        name = country["Government"]["Country name"]["conventional short form"]["text"]
        for title in ("Geography", "People and Society", "Economy"):
            facts = country[title]
            blocks.append(f"{name}: {title.lower()}\n\n" + "\n".join(lists(facts, 0)))
    return "\n\n".join(blocks)


def countries(files: Files) -> str:
    """A Markdown table of countries from the JSON files of the World Factbook."""
    rows = [("Country", "Capital", "Area (total)", "Coastline", "Highest point", "Population")]
    for text in files.values():
        country = json.loads(text)
        try:
            facts = (
                country["Government"]["Country name"]["conventional short form"],
                country["Government"]["Capital"]["name"],
                country["Geography"]["Area"]["total"],
                country["Geography"]["Coastline"],
                country["Geography"]["Elevation extremes"]["highest point"],
                country["People and Society"]["Population"],
            )
            rows.append(tuple(fact["text"].split(";")[0].split(" (")[0] for fact in facts))
        except (KeyError, AttributeError):  # not a country, or one of these facts is missing
            continue
    return _markdown(rows)


def comma_separated(files: Files) -> str:
    """The records of CSV or JSON files as comma-separated values, each table under its name."""
    return "\n\n".join(
        f"{PurePath(name).stem}\n\n" + "\n".join(",".join(row) for row in _records(name, text))
        for name, text in files.items()
    )


def markdown_tables(files: Files) -> str:
    """The records of CSV or JSON files as Markdown tables, each under its name."""
    return "\n\n".join(
        f"{PurePath(name).stem}\n\n" + _markdown(_records(name, text)) for name, text in files.items()
    )


def _records(name: str, text: str) -> list[tuple[str, ...]]:
    if name.endswith(".csv"):
        return [tuple(row) for row in csv.reader(io.StringIO(text))]
    records = json.loads(text)
    return [tuple(records[0]), *(tuple(str(value) for value in record.values()) for record in records)]


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def handbook(files: Files) -> str:
    """Headings and French paragraphs of pages in XHTML, without navigation, contents and programs."""

    def blocks(element: ET.Element) -> Iterator[str]:
        kind = element.get("class", "")
        if element.tag == f"{_XHTML}pre" or kind in ("toc", "docnav", "docnav top", "docnav bottom"):
            return
        if kind in ("title", "para"):
            yield " ".join("".join(element.itertext()).split())
            return
        for child in element:
            yield from blocks(child)

    return "\n\n".join(
        block
        for text in files.values()
        for block in blocks(ET.fromstring(text))
        if block and not _ENGLISH.search(block)
    )


def mallard(files: Files) -> str:
    """Title and paragraphs of pages in Mallard, without what is no prose: lists of steps, tables, notes."""
    found = []
    for text in files.values():
        page = ET.fromstring(text)
        for block in page.iter():
            if block.tag != f"{_MALLARD}page" and block.tag != f"{_MALLARD}section":
                continue
            for child in block:
                if child.tag in (f"{_MALLARD}title", f"{_MALLARD}p"):
                    found.append(" ".join("".join(child.itertext()).split()))
    return "\n\n".join(block for block in found if block)


FORMS: dict[str, Callable[[Files], str]] = {
    form.__name__: form
    for form in (
        plain,
        unwrapped,
        conversations,
        transcript,
        profiles,
        countries,
        comma_separated,
        markdown_tables,
        handbook,
        mallard,
    )
}
