"""What a serving benchmark asks for: lengths of prompts and answers, and when the requests come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Of prompt lengths, a shifted log-normal distribution; most prompts are short, few are long.
_MEDIAN, _SIGMA, _SHIFT = 18.0, 0.8, -1.0


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """One request of a benchmark.

    Attributes:
      prompt: token ids.
      new_tokens: of the answer, exactly.
    """

    prompt: tuple[int, ...]
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Load:
    """How requests come; one of the two.

    Attributes:
      rate: per second on average, at times of their own (a Poisson process).
      clients: so many, each of which sends its next request when it has its answer (a closed loop).
    """

    rate: float | None = None
    clients: int | None = None

    def arrivals(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Seconds [count] after the start; all 0 in a closed loop, where only answers are waited for."""
        if self.rate is None:
            return np.zeros(count)
        return np.cumsum(rng.exponential(1 / self.rate, count))

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s" if self.rate is not None else f"{self.clients} clients"


def synthetic(count: int, *, max_total: int, vocab_size: int, rng: np.random.Generator) -> list[BenchRequest]:
    """Requests with log-normal prompt lengths and totals that are uniform up to ``max_total``."""
    lengths = np.rint(rng.lognormal(np.log(_MEDIAN), _SIGMA, count) + _SHIFT)
    lengths = np.clip(lengths, 1, max_total - 1).astype(int)
    totals = rng.integers(lengths + 1, max_total + 1)
    return [
        BenchRequest(tuple(rng.integers(0, vocab_size, length).tolist()), int(total - length))
        for length, total in zip(lengths, totals, strict=True)
    ]


def sharegpt(
    path: Path, count: int, *, max_total: int, encode: Callable[[str], list[int]], rng: np.random.Generator
) -> list[BenchRequest]:
    """Questions and the lengths of their answers from conversations in ShareGPT's format.

    Each conversation that begins with a turn of a human and one of the model is one request; those that do
    not fit ``max_total`` tokens are left out. Drawn with replacement if there are too few.
    """
    found = []
    for conversation in json.loads(path.read_text(encoding="utf-8")):
        pair = _first_turns(conversation)
        if pair is None:
            continue
        prompt, answer = map(encode, pair)
        if prompt and answer and len(prompt) + len(answer) <= max_total:
            found.append(BenchRequest(tuple(prompt), len(answer)))
    if not found:
        raise SystemExit(f"{path}: no conversation of at most {max_total} tokens")
    chosen = rng.choice(len(found), count, replace=count > len(found))
    return [found[index] for index in chosen]


def _first_turns(conversation: dict[str, Any]) -> tuple[str, str] | None:
    turns = conversation.get("conversations", [])[:2]
    if [turn.get("from") for turn in turns] != ["human", "gpt"]:
        return None
    question, answer = (turn["value"] for turn in turns)
    return question, answer
