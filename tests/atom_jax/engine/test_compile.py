"""Programs that are compiled in the background, while others serve in their place."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
from hypothesis import given

from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, EngineConfig
from atom_jax.engine.buckets import Shape, make_buckets
from pallas_kernels.native import build
from pallas_kernels.native.instruction_sets import available
from tests.atom_jax.engine.test_engine import GREEDY, SIZES, compilations, prompts_of

__all__ = ["compilations"]  # a fixture


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_smallest_come_first(deterministic: bool) -> None:
    buckets = make_buckets(EngineConfig(deterministic=deterministic), 4096)
    shapes = list(buckets.shapes())
    assert shapes[:2] == [buckets.decode(1, 1), buckets.prefill(1, 1, 1)]
    assert len(set(shapes)) == len(shapes)


@given(number=st.integers(0, 35), ready=st.sets(st.integers(0, 35)))
def test_a_substitute_is_the_smallest_that_fits(number: int, ready: set[int]) -> None:
    buckets = make_buckets(EngineConfig(), 4096)
    shapes = list(buckets.shapes())
    shape, there = shapes[number], {shapes[each] for each in ready}
    fitting = {
        each
        for each in there
        if (each.width > 1) == (shape.width > 1)
        and each.rows >= shape.rows
        and each.width >= shape.width
        and each.blocks >= shape.blocks
    }
    found = buckets.substitute(shape, there)
    assert (found is None) == (not fitting)
    assert found is None or found in fitting
    if shape in there:
        assert found == shape
    assert make_buckets(EngineConfig(deterministic=True), 4096).substitute(shape, there) is None


def test_no_kernel_waits_for_another(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine has all kernels of its programs compiled side by side; none is left for its programs."""
    Engine(model, SIZES).generate(prompts_of(model, [3]), GREEDY)
    needed = {symbol for symbol in build._registered if f"_{available()[0]}_" in symbol}
    begun: set[str] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(build, "_registered", set())
    monkeypatch.setattr(build, "register", lambda *kernel: pytest.fail(f"{kernel} is compiled alone"))
    monkeypatch.setattr(build, "machine_code", lambda *_: b"")
    monkeypatch.setattr(build, "register_code", lambda symbol, code: begun.add(symbol))
    Engine(model, SIZES)
    assert begun and begun <= needed


def test_compiled_in_another_thread_it_is_not_compiled_again(model: Model, compilations: list[str]) -> None:
    Engine(model, SIZES).generate(prompts_of(model, [3]), GREEDY)  # what the process does for the first time
    other = Model(model.path, model.config.replace(architecture="background"), model.params)
    engine = Engine(other, SIZES)
    programs = engine.programs()
    with ThreadPoolExecutor(1) as pool:
        list(pool.map(engine.compile, programs))
    assert len(compilations) >= len(programs) == 6
    assert engine.programs() == []
    compilations.clear()
    engine.generate(prompts_of(model, [1, 40, 7, 33]), GREEDY)
    assert compilations == []


def test_larger_programs_serve_while_smaller_ones_are_not_there(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(model, [5, 9])
    expected = Engine(model, SIZES).generate(prompts, GREEDY)
    engine = Engine(model, SIZES)
    programs = engine.programs()
    largest = [max(s for s in programs if s.width == 1), max(s for s in programs if s.width == 32)]
    for program in largest:
        engine.compile(program)
    dispatched: list[Shape] = []
    dispatch = engine._runner.dispatch
    monkeypatch.setattr(
        engine._runner,
        "dispatch",
        lambda plan: (result := dispatch(plan), dispatched.extend(s for s, _ in result.programs))[0],
    )
    assert engine.generate(prompts[:1], GREEDY) == expected[:1]
    assert set(dispatched) == set(largest)
    for program in engine.programs():
        engine.compile(program)
    dispatched.clear()
    assert engine.generate(prompts[:1], GREEDY) == expected[:1]
    assert {shape.rows for shape in dispatched} == {1}
