"""The JSON that a GPU test run writes as it goes; see ``bench.gpu.progress``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import record
from bench.gpu import progress
from tests.cuda.support import SEED


class Results:
    """The document and where it is written."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        earlier = progress.interrupted(path) if resume else None
        self.document: dict[str, Any] = {"runs": [], "tests": [], progress.RUNNING: None}
        if earlier is not None:
            self.document = earlier
            if earlier[progress.RUNNING] is not None:
                why = "the process hung or died"
                self.add({"test": earlier[progress.RUNNING], "outcome": "failed", "why": why})
        self.document["runs"].append({"seed": SEED, "environment": None})

    def begin(self, test: str) -> None:
        if self.document["runs"][-1]["environment"] is None:
            self.document["runs"][-1]["environment"] = record.environment()
        self.document[progress.RUNNING] = test
        self.save()

    def add(self, entry: dict[str, Any]) -> None:
        self.document["tests"].append(entry)
        self.document[progress.RUNNING] = None
        self.save()

    def done(self) -> set[str]:
        return {entry["test"] for entry in self.document["tests"]}

    def save(self) -> None:
        record.write_json(self.path, self.document)
