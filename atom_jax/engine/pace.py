"""How long programs take, by measurement, and how much of a prompt a step may compute beside decoding."""

from __future__ import annotations

import math
import time
from typing import Any

from atom_jax.engine.buckets import Buckets, Shape
from atom_jax.engine.runner import Dispatched

# The share of the newest measurement in an estimate.
_NEWEST = 0.5


class Pace:
    """Estimates the durations of programs from those that were measured.

    Args:
      buckets: the shapes of all programs.
      max_decode_delay: as in ``EngineConfig``.
    """

    def __init__(self, buckets: Buckets, max_decode_delay: float) -> None:
        self._buckets = buckets
        self._max_decode_delay = max_decode_delay
        self._decode: dict[int, float] = {}  # by number of rows
        self._prefill: dict[int, float] = {}  # by number of tokens
        self._program_ended, self._seen_ending = 0.0, False

    def wait(self, step: Dispatched) -> None:
        """Waits for the programs of a step and records the durations of those it saw begin and end."""
        for shape, array in step.programs:
            before, before_seen = self._program_ended, self._seen_ending
            self._await(array)
            idle = step.began >= before  # the device waited for this step
            if self._seen_ending and (idle or before_seen):
                self.record(shape, self._program_ended - max(before, step.began))
        for _, array in step.scores[-1:]:
            self._await(array)

    def _await(self, array: Any) -> None:
        """Waits for what the device computes next."""
        self._seen_ending = not array.is_ready()
        array.block_until_ready()
        self._program_ended = time.perf_counter()

    def record(self, shape: Shape, seconds: float) -> None:
        """Takes the measured duration of a program."""
        times, size = (
            (self._decode, shape.rows) if shape.width == 1 else (self._prefill, shape.rows * shape.width)
        )
        times[size] = _NEWEST * seconds + (1 - _NEWEST) * times.get(size, seconds)

    def prefill_limit(self, decode_rows: int) -> int:
        """The most tokens of prompts in a step that decodes ``decode_rows`` sequences: one of the widths.

        The smallest width, if the step would take too long with any other or nothing was measured yet.
        """
        if math.isinf(self._max_decode_delay):
            return self._buckets.chunk
        smallest, *others = self._buckets.prefill_widths
        decode = self._decode.get(self._buckets.decode(decode_rows, 1).rows)
        if decode is None:
            return smallest
        room = (self._max_decode_delay - 1) * decode
        return max((width for width in others if self._estimate(width) <= room), default=smallest)

    def _estimate(self, tokens: int) -> float:
        """Seconds for ``tokens`` of prompts: as measured, or in proportion to the measured time of fewer.

        More tokens at once take less time each. So the lower of both is right, and an estimate that was too
        high once does not stay for ever.
        """
        times = (seconds * tokens / size for size, seconds in self._prefill.items() if size <= tokens)
        return min(times, default=float("inf"))
