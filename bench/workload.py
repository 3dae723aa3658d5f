"""The requests of a serving benchmark: lengths of prompts and answers, and when the requests arrive."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Prompt lengths have a log-normal distribution, shifted by _SHIFT tokens: most are short, few are long.
_MEDIAN, _SIGMA, _SHIFT = 18.0, 0.8, -1.0


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """One request of a benchmark.

    Attributes:
      prompt: token ids.
      new_tokens: number of tokens of the answer; it never ends earlier.
    """

    prompt: tuple[int, ...]
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Load:
    """When requests arrive. Exactly one attribute is given.

    Attributes:
      rate: requests per second on average, at random times (a Poisson process).
      clients: number of clients, each of which sends a request as soon as it has the answer to the one before
        (a closed loop).
    """

    rate: float | None = None
    clients: int | None = None

    def arrivals(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Arrival time of each request, in seconds after the start: float64 [count].

        All are 0 in a closed loop, in which the answers decide when a request is sent.
        """
        if self.rate is None:
            return np.zeros(count)
        return np.cumsum(rng.exponential(1 / self.rate, count))

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s" if self.rate is not None else f"{self.clients} clients"


def synthetic(count: int, *, max_total: int, vocab_size: int, rng: np.random.Generator) -> list[BenchRequest]:
    """Random requests: prompt lengths are log-normal, prompt plus answer is uniform up to ``max_total``."""
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
    """Requests with the questions, and the lengths of the answers, of conversations in ShareGPT's format.

    A conversation that begins with a turn of a human and one of a model is one request. Requests of more than
    ``max_total`` tokens are left out. ``count`` of the others are drawn, with replacement if there are fewer.
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
