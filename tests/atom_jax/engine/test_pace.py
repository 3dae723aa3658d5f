"""How much of a prompt a step computes beside decoding: by measured durations."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, EngineConfig, RequestParams
from atom_jax.engine.buckets import Shape, make_buckets
from atom_jax.engine.pace import Pace
from tests.convert.tiny import fails

BUCKETS = make_buckets(EngineConfig(token_budget=1100), 4096)  # widths 64, 256, 1024


def pace(max_decode_delay: float = 8.0) -> Pace:
    return Pace(BUCKETS, max_decode_delay)


def test_nothing_measured_is_the_smallest() -> None:
    assert BUCKETS.prefill_widths == (64, 256, 1024)
    measured = pace()
    assert measured.prefill_limit(1) == 64
    assert pace(float("inf")).prefill_limit(1) == 1024  # no matter what it takes
    measured.record(Shape(1, 256, 8), 1e-6)
    assert measured.prefill_limit(1) == 64  # nothing of decoding yet
    measured.record(Shape(1, 1, 8), 1.0)
    assert measured.prefill_limit(1) == 1024
    assert measured.prefill_limit(2) == 64  # nothing of two rows yet


@given(
    decode=st.floats(1e-3, 1),
    token=st.floats(1e-6, 1),
    delay=st.floats(1, 100),
    rows=st.integers(1, 32),
    measured=st.sets(st.sampled_from([64, 256, 1024]), min_size=1),
)
def test_a_step_takes_no_more_than_its_share(
    decode: float, token: float, delay: float, rows: int, measured: set[int]
) -> None:
    """With durations in proportion to tokens, the limit is the largest width that keeps the delay."""
    each = pace(delay)
    each.record(BUCKETS.decode(rows, 64), decode)
    for width in measured:
        each.record(Shape(1, width, 64), token * width)
    limit = each.prefill_limit(rows)
    known = [width for width in BUCKETS.prefill_widths if width >= min(measured)]
    fitting = [width for width in known if decode + token * width <= delay * decode * (1 - 1e-9)]
    assert limit >= max(fitting, default=64)
    assert limit == 64 or decode + token * limit <= delay * decode * (1 + 1e-6)


def test_an_estimate_recovers_from_a_slow_moment() -> None:
    measured = pace()
    measured.record(Shape(1, 1, 8), 0.1)
    measured.record(Shape(1, 256, 8), 100.0)
    assert measured.prefill_limit(1) == 64
    measured.record(Shape(1, 64, 8), 0.1)
    assert measured.prefill_limit(1) == 256


def test_packed_prompts_count_together() -> None:
    measured = pace()
    measured.record(Shape(1, 1, 8), 0.1)
    measured.record(Shape(4, 64, 8), 0.6)
    assert measured.prefill_limit(1) == 256


def test_delay_below_one() -> None:
    with fails("max_decode_delay", 0.5):
        EngineConfig(max_decode_delay=0.5)


@pytest.mark.parametrize("slow", [False, True])
def test_the_engine_measures_and_keeps_to_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """Durations are what the test says: chunks beside decoding are long, or short, and answers the same."""
    recorded: list[Shape] = []
    record = Pace.record

    def counted(self: Pace, shape: Shape, seconds: float) -> None:
        recorded.append(shape)
        assert seconds > 0
        record(self, shape, 1.0 if shape.width == 1 else 0.01 * shape.width**2 * (100 if slow else 1))

    monkeypatch.setattr(Pace, "record", counted)
    config = EngineConfig(num_pages=20, page_size=16, max_num_seqs=4, max_model_len=64, token_budget=36)
    engine = Engine(model, config)
    for shape in ((1, 1, 4), (2, 1, 4), (1, 16, 4)):
        engine._pace.record(Shape(*shape), 0.5)
    params = RequestParams(40, ignore_eos=True)
    engine.add("stream", [5, 6, 7], params)
    for _ in range(4):
        engine.step()
    schedule, chunks = engine._scheduler.schedule, []
    monkeypatch.setattr(engine._scheduler, "schedule", lambda: (plan := schedule(), chunks.append(plan))[0])
    engine.add("long", list(range(4, 52)), RequestParams(4, ignore_eos=True))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    counts = [piece.count for plan in chunks for piece in plan.prefill]
    assert counts == ([16, 16, 16] if slow else [32, 16])
    assert all(plan.decode for plan in chunks if plan.prefill)
    alone = Engine(model, config).generate([list(range(4, 52))], RequestParams(4, ignore_eos=True))[0]
    assert tokens["long"] == list(alone.token_ids)
