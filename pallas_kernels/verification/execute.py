"""Runs a case with a kernel and with the reference, and compares.

The kernel runs on this process's device. If results are compared by norms, the reference runs there, too; if
they are integers, it runs on the CPU: on a GPU, XLA's division is off by up to two units in the last place,
and a quotient next to a half would be rounded to the other side. The kernels divide as IEEE 754 says.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from pallas_kernels.devices import REFERENCE
from pallas_kernels.dispatch import use_implementation
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.compare import check_result, same_bits

# Bytes that ``poison`` fills beside the outputs, for the scratch memory of kernels.
_SCRATCH_BYTES = 64 << 20
# Ops whose results are integers.
_INTEGERS = ("quantize", "norm_quantize", "silu_quantize", "kv_append")


class WrongResult(AssertionError):
    """A result is not what it must be; the message says how far off."""


def inputs_of(case: Case, key: Key[Array, ""]) -> tuple[PyTree, ...]:
    """Random arguments of ``case``."""
    return jax.block_until_ready(jax.jit(case.inputs)(key))


def poison(tree: PyTree) -> None:
    """Fills and frees device memory: twice the sizes of ``tree``'s arrays, and some more.

    An output that a kernel does not write then holds NaN (or -1), not the right result of an earlier call.
    """
    sizes = [leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)]
    buffers = [jnp.full((size,), 0xFF, jnp.uint8) for size in (*sizes, *sizes, _SCRATCH_BYTES)]
    jax.block_until_ready(buffers)
    for buffer in buffers:
        buffer.delete()


def compiled(case: Case, implementation: str) -> Callable[..., PyTree]:
    """``case`` jitted for ``implementation``; it copies arguments that it would update in place."""
    # A new function each time: jit must not find what it traced for another implementation.
    call = jax.jit(
        lambda *arguments: case.function(*arguments),
        donate_argnums=case.donated,
        # The reference's matmuls need not be fast; without this XLA takes seconds to try ways to run them.
        compiler_options={"xla_gpu_autotune_level": 0},
    )

    def run(*inputs: PyTree) -> PyTree:
        with use_implementation(implementation), jax.default_matmul_precision("highest"):
            copies = [jax.tree.map(jnp.copy, x) if i in case.donated else x for i, x in enumerate(inputs)]
            return jax.block_until_ready(call(*copies))

    return run


def reference_on_cpu(case: Case, inputs: tuple[PyTree, ...]) -> PyTree:
    """The reference's result, computed on the CPU and put onto the device of ``inputs``.

    Raises:
      RuntimeError: JAX has no CPU backend, e.g. because of JAX_PLATFORMS=cuda.
    """
    (device,) = jax.tree.leaves(inputs)[0].devices()
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        expected = compiled(case, REFERENCE)(*jax.device_put(inputs, cpu))
    return jax.device_put(expected, device)


def check_case(case: Case, implementation: str, key: Key[Array, ""]) -> None:
    """Compares ``implementation`` with the reference on random inputs from ``key``.

    Raises:
      WrongResult: its result is too far from the reference's, or differs when the call is repeated.
      dispatch.Unsupported: it cannot run this call.
    """
    inputs = inputs_of(case, key)
    integers = case.op in _INTEGERS
    expected = reference_on_cpu(case, inputs) if integers else compiled(case, REFERENCE)(*inputs)
    run = compiled(case, implementation)
    results = []
    for _ in range(2):
        poison(expected)
        results.append(run(*inputs))
    said = "repeated, it differs: "
    try:
        same_bits(*results)
        said = ""
        check_result(case, inputs, results[0], expected)
    except AssertionError as error:
        raise WrongResult(f"{said}{error}") from error


def device_lost() -> bool:
    """Whether this process cannot compute any more, e.g. after an illegal memory access."""
    try:
        jax.block_until_ready(jnp.zeros((8,)) + 1)
    except Exception:
        return True
    return False
