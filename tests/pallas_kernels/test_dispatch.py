"""The choice of an implementation, its reasons, and its place in jit's cache key."""

from __future__ import annotations

import concurrent.futures
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ActivationFormat, dispatch, quantize, use_implementation
from pallas_kernels.verification import verdicts
from pallas_kernels.verification.verdicts import FAILED
from tests.pallas_kernels.verification.hopper import DEVICE, hopper, on

FORMAT = ActivationFormat(32, 0)
# Why a GPU runs the reference and not the kernel for CPUs.
NO_CPU = f"native_cpu needs a CPU, this is {DEVICE}"

_quantize = jax.jit(quantize, static_argnums=1)


class AnOp(NamedTuple):
    """A call of an op of which there are only implementations."""

    x: int | jax.Array = 0


def fake_implementation(name: str, shift: int, unsupported: str | None = None) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(
        run=lambda call, config: call.x + shift,
        unsupported=lambda call: unsupported,
        configs=lambda call: [f"tiles of {name}", "smaller tiles"],
    )
    return module


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Pretends that this is a Hopper GPU and "an_op" has a verified kernel; returns what replaces it."""
    modules = {
        "mosaic_sm90": fake_implementation("mosaic_sm90", 10),
        "reference": fake_implementation("reference", 1),
    }
    monkeypatch.setattr(dispatch, "_implementation", lambda op, name: modules.get(name))
    with hopper(tmp_path):
        verdicts.adopt(on("an_op"))
        yield modules


def test_reference_runs_on_request_and_the_native_kernel_by_itself_on_a_cpu():
    x = jnp.linspace(-1, 1, 64).reshape(2, 32)
    with use_implementation("reference"):
        requested = _quantize(x, FORMAT)
    with dispatch.record_choices() as choices:
        automatic = quantize(x, FORMAT)
    np.testing.assert_array_equal(requested.body, automatic.body)
    assert np.asarray(requested.body).any()
    assert [choice.implementation for choice in choices] == ["native_cpu"]


def test_hopper_takes_the_kernel(on_hopper):
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", AnOp()) == 10
        with use_implementation("reference"):
            assert dispatch.run("an_op", AnOp()) == 1
        assert dispatch.run("an_op", AnOp()) == 10
    assert [choice.implementation for choice in choices] == ["mosaic_sm90", "reference", "mosaic_sm90"]
    assert choices[0].config == "tiles of mosaic_sm90"


def test_automatic_choice_says_why_it_is_not_the_kernel(on_hopper, tmp_path):
    on_hopper["mosaic_sm90"] = fake_implementation("mosaic_sm90", 10, "rows of 7")
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", AnOp()) == 1
    assert choices[0].reason == f"mosaic_sm90: rows of 7; {NO_CPU}"
    with hopper(tmp_path, capability="8.9"), dispatch.record_choices() as choices:
        assert dispatch.run("an_op", AnOp()) == 1
    assert "needs compute capability 9.0" in choices[0].reason


def test_explicit_choice_that_cannot_be_honoured_raises(on_hopper):
    on_hopper["mosaic_sm90"] = fake_implementation("mosaic_sm90", 10, "rows of 7")
    with use_implementation("mosaic_sm90"), pytest.raises(NotImplementedError, match=r"an_op.*rows of 7"):
        dispatch.run("an_op", AnOp())


def test_the_first_of_several_names_that_can_run_the_call(on_hopper):
    with use_implementation("mosaic_sm90", "reference"), dispatch.record_choices() as choices:
        assert dispatch.run("an_op", AnOp()) == 10
        on_hopper["mosaic_sm90"] = fake_implementation("mosaic_sm90", 10, "too wide")
        assert dispatch.run("an_op", AnOp()) == 1
    reasons = ["requested", "an_op: mosaic_sm90 does not support this call: too wide; requested"]
    assert [choice.reason for choice in choices] == reasons
    on_hopper["reference"] = fake_implementation("reference", 1, "too long")
    with (
        use_implementation("mosaic_sm90", "reference"),
        pytest.raises(dispatch.Unsupported, match=r"too wide; an_op: reference .*: too long"),
    ):
        dispatch.run("an_op", AnOp())


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
        return dispatch.run("an_op", AnOp(x))

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


def test_a_kernel_without_a_verdict_is_not_taken(on_hopper):
    verdicts.adopt(None)
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", AnOp()) == 1
        verdicts.adopt(on("another_op"))
        assert dispatch.run("an_op", AnOp()) == 1
    reason = f"mosaic_sm90: not verified on this device: run `atom-jax doctor`; {NO_CPU}"
    assert [choice.reason for choice in choices] == [reason] * 2


def test_a_kernel_that_failed_is_not_taken(on_hopper):
    verdicts.adopt(on("an_op", FAILED, "killed by SIGABRT"))
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", AnOp()) == 1
    assert "mosaic_sm90: failed on this device: killed by SIGABRT" in choices[0].reason


def test_a_verdict_on_another_device_is_none(on_hopper):
    verdicts.adopt(on("an_op", kind="NVIDIA H100"))
    assert dispatch.run("an_op", AnOp()) == 1


def test_why_a_kernel_does_not_serve_a_call_matters_more_than_its_verdict(on_hopper):
    on_hopper["mosaic_sm90"] = fake_implementation("mosaic_sm90", 10, "rows of 7")
    verdicts.adopt(None)
    with dispatch.record_choices() as choices:
        dispatch.run("an_op", AnOp())
    assert choices[0].reason == f"mosaic_sm90: rows of 7; {NO_CPU}"


def test_a_choice_by_name_asks_for_no_verdict(on_hopper):
    for verdict in (None, on("an_op", FAILED, "hang")):
        verdicts.adopt(verdict)
        with use_implementation("mosaic_sm90"):
            assert dispatch.run("an_op", AnOp()) == 10


def test_the_check_can_be_left_out(on_hopper, monkeypatch):
    monkeypatch.setenv("ATOM_JAX_VERIFY", "0")
    with dispatch.record_choices() as choices:
        assert dispatch.run("an_op", AnOp()) == 10
        for verdict in (None, on("an_op", FAILED, "hang")):
            verdicts.adopt(verdict)
            assert dispatch.run("an_op", AnOp()) == 10
    assert [choice.reason for choice in choices] == ["preferred", *["not verified: ATOM_JAX_VERIFY=0"] * 2]
    monkeypatch.setenv("ATOM_JAX_VERIFY", "1")
    assert dispatch.run("an_op", AnOp()) == 1


def test_a_new_verdict_reaches_functions_that_were_traced_before(on_hopper):
    verdicts.adopt(None)
    run = jax.jit(lambda x: dispatch.run("an_op", AnOp(x)))
    assert run(jnp.int32(0)) == 1
    verdicts.adopt(on("an_op"))
    assert run(jnp.int32(0)) == 10
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # as a server's
        assert pool.submit(run, jnp.int32(0)).result() == 10
    verdicts.adopt(on("an_op", FAILED, "wrong"))
    assert run(jnp.int32(0)) == 1
