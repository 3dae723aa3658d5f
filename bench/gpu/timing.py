"""How long a GPU works on one call, at the speed of its memory and not of its cache.

Two clocks:

* "kernels": the sum of the durations of the kernels that ran, from CUPTI (the interface behind NVIDIA's
  profilers), the median over several launches. Gaps between kernels and the host's time do not count, so
  that calls of a few microseconds can be compared whoever launches them. Copies by the driver (memcpy) do
  not count either: a wall time far above the kernels' time of a long call gives them away.
* "wall": the time between launching many programs of several calls and the end of the last, divided by the
  calls. An upper bound; calls shorter than about ten microseconds show the host's speed. It is always
  recorded, and is the result where CUPTI cannot be used.

CUPTI is reached through the extension module of jax's own Mosaic profiler. That is no public interface:
where it is missing or fails, or where it disagrees with the wall clock on one long matmul, ``Clock`` says
so and uses the wall.

The 60 MB L2 cache would hold the weights of one layer. A program therefore makes its calls on as many sets
of inputs as it takes to stream ``COLD_BYTES`` in between two uses of the same one (at most ``MAX_SETS``: what
is that small comes from the cache in a real step too).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

COLD_BYTES = 240_000_000
MAX_SETS = 16
# What the two clocks may differ by on a matmul of a millisecond: under load the GPU's own clock falls by a
# tenth and more from one measurement to the next.
_AGREEMENT = 0.3


def num_sets(bytes_per_call: int) -> int:
    """Sets of inputs, two or more, after whose use none is left in the L2 cache; two without a GPU."""
    if jax.default_backend() != "gpu":
        return 2
    return min(MAX_SETS, max(2, math.ceil(COLD_BYTES / bytes_per_call)))


@dataclasses.dataclass(frozen=True)
class Program:
    """Something that can be launched again and again.

    Attributes:
      launch: starts the work and returns without waiting for it.
      wait: returns when everything that was launched is done; takes what ``launch`` returned.
      calls: that one launch makes.
    """

    launch: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int

    def repeat(self, launches: int) -> None:
        """Launches and waits; a device works in order, so the last result is the last to be ready."""
        result = None
        for _ in range(launches):
            result = self.launch()
        self.wait(result)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one call.

    Attributes:
      seconds: by ``clock``, "kernels" or "wall".
      wall_seconds: by the wall clock, whatever ``clock`` is.
      launches: that were measured.
      kernels: names of the kernels of one call and how often each ran; None without CUPTI.
    """

    seconds: float
    clock: str
    wall_seconds: float
    launches: int
    kernels: dict[str, float] | None


class Clock:
    """Measures programs; ``reason`` says why it does not use CUPTI, None if it does."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def measure(self, program: Program, seconds: float = 0.02) -> Timing:
        """The time of one call, from launches that take about ``seconds`` in all (3 at least, 50 at most)."""
        for _ in range(2):  # the first may load code
            started = time.perf_counter()
            program.wait(program.launch())
            once = time.perf_counter() - started
        launches = min(50, max(3, round(seconds / once)))

        started = time.perf_counter()
        program.repeat(launches)
        wall = (time.perf_counter() - started) / launches / program.calls
        if self.reason is not None:
            return Timing(wall, "wall", wall, launches, None)

        records = kernel_records(lambda: program.repeat(launches))
        per_launch = _per_launch([seconds for _, seconds in records], launches)
        names = Counter(name for name, _ in records)
        kernels = {name: count / launches / program.calls for name, count in names.items()}
        return Timing(per_launch / program.calls, "kernels", wall, launches, kernels)


def make_clock() -> Clock:
    """A clock on CUPTI if that works here and agrees with the wall."""
    if jax.default_backend() != "gpu":
        return Clock(f"the device is no GPU but {jax.default_backend()}")
    if _cupti() is None:
        return Clock("this jax has no CUPTI interface")
    key = jax.random.key(0)
    x = jax.random.normal(key, (8192, 8192), jnp.bfloat16)
    program = jax_program(jnp.dot, [(x, x)])
    try:
        timing = Clock(None).measure(program, seconds=0.05)
    except Exception as error:  # whatever an unsupported CUPTI raises, the wall clock is left
        return Clock(f"CUPTI failed: {type(error).__name__}: {error}"[:300])
    if abs(timing.seconds - timing.wall_seconds) > _AGREEMENT * timing.wall_seconds:
        return Clock(
            f"CUPTI says {timing.seconds:.2e} s where the wall clock says {timing.wall_seconds:.2e} s"
        )
    return Clock(None)


def kernel_records(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and seconds of every GPU kernel that ``run``, which waits for them, started in this process.

    Raises:
      RuntimeError: CUPTI is missing, or recorded nothing.
    """
    cupti = _cupti()
    if cupti is None:
        raise RuntimeError("no CUPTI interface")
    cupti._cupti_init()
    try:
        run()
    finally:
        records = cupti._cupti_get_timings(True)  # True: leave the process as it was
    if not records:
        raise RuntimeError("CUPTI recorded no kernel")
    return [(name, milliseconds * 1e-3) for name, milliseconds in records]


def _cupti() -> Any:
    profiler = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
    extension = getattr(getattr(profiler, "mosaic_gpu_lib", None), "_mosaic_gpu_ext", None)
    return extension if hasattr(extension, "_cupti_init") else None


def _per_launch(seconds: Sequence[float], launches: int) -> float:
    """Median over the launches of the sum of their kernels; the mean if their numbers differ."""
    count, rest = divmod(len(seconds), launches)
    if rest:
        return sum(seconds) / launches
    return statistics.median(sum(seconds[i * count : (i + 1) * count]) for i in range(launches))


# Calls of one program must run one after the other: no CUDA graph, in which independent ones may overlap.
# And "cuBLAS through XLA" shall be that: otherwise XLA compiles and tries dozens of Triton kernels a shape.
_TIMING_COMPILER_OPTIONS = {"xla_gpu_graph_min_graph_size": 1_000_000, "xla_gpu_enable_triton_gemm": False}


def jax_program(
    call: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    *,
    feedback: int | None = None,
    together: bool = True,
) -> Program:
    """``call`` on each of ``sets`` of arguments, as one compiled program.

    Args:
      feedback: position of an argument that every call updates in place and returns as its last result: all
        calls work on the first set's.
      together: False makes every call a program, for those that XLA would fuse with each other.
    """
    if together:
        compiled = _compile(call, sets, feedback)
        return Program(lambda: compiled(sets), jax.block_until_ready, len(sets))
    single = _compile(call, sets[:1], feedback)
    return Program(lambda: [single([each]) for each in sets], jax.block_until_ready, len(sets))


def _compile(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], feedback: int | None) -> Any:
    # Not ``call`` itself: of what jit has traced before, ``record_choices`` would see nothing.
    step = jax.jit(lambda *arguments: call(*arguments))

    def program(sets: Sequence[tuple[Any, ...]]) -> list[Any]:
        if feedback is None:
            return [step(*arguments) for arguments in sets]
        results, carried = [], sets[0][feedback]
        for arguments in sets:
            *result, carried = step(*arguments[:feedback], carried, *arguments[feedback + 1 :])
            results.append(result)
        return [*results, carried]

    return jax.jit(program).lower(sets).compile(compiler_options=_TIMING_COMPILER_OPTIONS)


def make_sets(make: Callable[[jax.Array], tuple[Any, ...]], count: int) -> list[tuple[Any, ...]]:
    """``count`` sets of arguments, each in memory of its own: random ones and copies of them."""
    first = jax.jit(make)(jax.random.key(0, impl="rbg"))
    return [first, *(jax.tree.map(jnp.copy, first) for _ in range(count - 1))]
