"""A step that fails, and a call of ``generate`` that is interrupted: anywhere."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import pytest

from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, Output, device, runner
from atom_jax.engine.answer_text import AnswerText
from atom_jax.engine.pages import PagePool
from atom_jax.engine.scheduler import Scheduler
from tests.atom_jax.engine.test_engine import GREEDY, SIZES, prompts_of, run
from tests.convert.tiny import fails


@pytest.fixture
def engine(model: Model) -> Engine:
    return Engine(model, SIZES)


class Broken(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: Any) -> None:
    """Makes ``owner.name`` raise ``error`` in its call number ``call``: half of the calls after its work."""
    function, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        if number == call and call % 2:
            raise error
        result = function(*args, **kwargs)
        if number == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, interrupted)


# What a step does one after the other, and what comes between two steps.
PLACES = [
    (Scheduler, "schedule"),
    (PagePool, "allocate"),
    (device, "run_program"),
    (runner.Runner, "dispatch"),
    (jax, "device_get"),
    (Scheduler, "receive"),
    (Scheduler, "remove"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES)
@pytest.mark.parametrize("call", [1, 2])
def test_a_step_that_fails_leaves_an_engine_that_refuses(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    prompts = prompts_of(model, [5, 20, 7])
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, dataclasses.replace(GREEDY, max_new_tokens=3 + number))
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, name, call, Broken("out of memory"))
        with pytest.raises(Broken):
            run(engine)
    for refused in (
        lambda: engine.add("x", prompts[0], GREEDY),
        engine.step,
        lambda: engine.generate(prompts, GREEDY),
    ):
        with fails("has failed", "Broken: out of memory", "new engine"):
            refused()


@pytest.mark.parametrize(
    ("owner", "name"), [*PLACES, (Engine, "add"), (Engine, "step"), (Scheduler, "add"), (AnswerText, "add")]
)
@pytest.mark.parametrize("call", [1, 2])
def test_generate_can_be_interrupted_anywhere(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    prompts = prompts_of(model, [5, 20, 7])
    expected = Engine(model, SIZES).generate(prompts, GREEDY)
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, name, call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts[::-1], GREEDY)
    assert not engine.has_work and engine.stats().free_pages == 9
    assert engine.generate(prompts, GREEDY) == expected


def test_generate_ended_between_steps_by_a_signal_leaves_nothing(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a handler does that raises, for example after a time."""
    prompts = prompts_of(model, [5, 20])
    step, steps = engine.step, itertools.count()

    def interrupted() -> list[Output]:
        if next(steps) == 4:
            raise TimeoutError
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(TimeoutError):
        engine.generate(prompts, GREEDY)
    assert not engine.has_work and engine.stats().free_pages == 9
    monkeypatch.undo()
    assert engine.generate(prompts, GREEDY) == Engine(model, SIZES).generate(prompts, GREEDY)
