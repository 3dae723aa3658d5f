"""The choice of an implementation, its reasons, and its place in jit's cache key."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ActivationFormat, dispatch, quantize, use_implementation

FORMAT = ActivationFormat(32, 0)

_quantize = jax.jit(quantize, static_argnums=1)


def fake_implementation(name: str, shift: int, unsupported: str | None = None) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(
        run=lambda x: x + shift, unsupported=lambda x: unsupported, configuration=lambda x: f"tiles of {name}"
    )
    return module


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch):
    """Pretends that this is a Hopper GPU and that "an_op" has a kernel; returns what replaces the kernel."""
    modules = {
        "mosaic_sm90": fake_implementation("mosaic_sm90", 10),
        "reference": fake_implementation("reference", 1),
    }
    monkeypatch.setattr(dispatch, "_implementation", lambda op, name: modules.get(name))
    monkeypatch.setattr(dispatch, "device_capability", lambda: "9.0")
    return modules


def test_reference_runs_on_request_and_by_itself_on_a_cpu():
    x = jnp.linspace(-1, 1, 64).reshape(2, 32)
    with use_implementation("reference"):
        requested = _quantize(x, FORMAT)
    with dispatch.record_choices() as choices:
        automatic = quantize(x, FORMAT)
    np.testing.assert_array_equal(requested.body, automatic.body)
    assert np.asarray(requested.body).any()
    assert [choice.implementation for choice in choices] == ["reference"]


def test_hopper_takes_the_kernel(on_hopper):
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", 0) == 10
        with use_implementation("reference"):
            assert dispatch.run("an_op", 0) == 1
        assert dispatch.run("an_op", 0) == 10
    assert [choice.implementation for choice in choices] == ["mosaic_sm90", "reference", "mosaic_sm90"]
    assert choices[0].configuration == "tiles of mosaic_sm90"


def test_automatic_choice_says_why_it_is_not_the_kernel(on_hopper, monkeypatch):
    on_hopper["mosaic_sm90"] = fake_implementation("mosaic_sm90", 10, "rows of 7")
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", 0) == 1
    assert choices[0].reason == "mosaic_sm90: rows of 7"
    monkeypatch.setattr(dispatch, "device_capability", lambda: "8.9")
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", 0) == 1
    assert "needs compute capability 9.0" in choices[0].reason


def test_explicit_choice_that_cannot_be_honoured_raises(on_hopper):
    on_hopper["mosaic_sm90"] = fake_implementation("mosaic_sm90", 10, "rows of 7")
    with use_implementation("mosaic_sm90"), pytest.raises(NotImplementedError, match=r"an_op.*rows of 7"):
        dispatch.run("an_op", 0)


def test_unknown_name_raises_and_names_op_and_choices():
    with (
        use_implementation("abacus"),
        pytest.raises(NotImplementedError, match=r"quantize has no implementation 'abacus'.*reference"),
    ):
        quantize(jnp.ones((2, 32)), FORMAT)
    _quantize(jnp.ones((2, 32)), FORMAT)  # the context is left although it raised


def test_choice_is_part_of_the_cache_key_of_jit(on_hopper):
    traces = []

    @jax.jit
    def run(x):
        traces.append(x)
        return dispatch.run("an_op", x)

    def under(name: str) -> int:
        with use_implementation(name):
            return int(run(jnp.int32(0)))

    assert [under(name) for name in ("reference", "mosaic_sm90", "reference", "mosaic_sm90")] == [
        1,
        10,
        1,
        10,
    ]
    assert len(traces) == 2  # one for each choice, both kept


def test_traced_function_does_not_hide_an_unknown_name():
    _quantize(jnp.ones((2, 32)), FORMAT)
    with use_implementation("abacus"), pytest.raises(NotImplementedError, match="abacus"):
        _quantize(jnp.ones((2, 32)), FORMAT)
