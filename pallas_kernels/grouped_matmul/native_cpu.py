"""``grouped_matmul`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.native import build
from pallas_kernels.native import config as native_config
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.qarrays import LayerOf, like

_KERNEL = build.Kernel("pallas_kernels.grouped_matmul.native_kernel", "grouped_matmul")
_LANES = 16
TAKES_LAYERS = True
# Of outliers: so many products of INT8 fit an int32.
_MOST_CHANNELS = 2**31 // (255 * 127)


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    longest = max(call.x.outliers.shape[1], call.x.group_size)
    if longest > _MOST_CHANNELS:
        return f"a group of {longest} channels does not fit an int32, {_MOST_CHANNELS} do"
    return None


def configs(call: Call) -> list[NativeConfig]:
    """The instruction sets of this CPU."""
    return native_config.configs()


def run(call: Call, config: NativeConfig) -> Float[Array, "m n"]:
    """See ``api.grouped_matmul``."""
    x, w, bias, residual, out_dtype = call
    (m, num_body), n = x.body.shape, like(w).shape[0]
    w, layer = (w.stack, w.layer) if isinstance(w, LayerOf) else (w, jnp.int32(0))
    if m == 0:
        return jnp.zeros((m, n), out_dtype)
    rows = max(n, _LANES)
    body, outliers = _of_fours(x.body), _of_fours(x.outliers)
    weights = [
        _at_least(array, _LANES, axis) for array, axis in ((w.packed, -2), (w.outliers, -2), (w.scales, -1))
    ]
    nothing = jnp.zeros(1, jnp.float32)
    added = [
        nothing if bias is None else _at_least(bias.astype(jnp.float32), _LANES, -1),
        nothing if residual is None else _at_least(residual.astype(jnp.float32), _LANES, -1),
    ]
    # A group over the whole body grows with it, as the channels that are filled up are zero.
    group_size = body.shape[1] if x.group_size == num_body else x.group_size
    sizes = (
        *(-(-rows // _LANES), m, rows, body.shape[1], outliers.shape[1], w.outliers.shape[-1], group_size),
        *(bias is not None, residual is not None),
    )
    out, _ = build.call(
        _KERNEL,
        config.instructions,
        (body, outliers, x.scales, layer.astype(jnp.int32), *weights, *added),
        (
            jax.ShapeDtypeStruct((m, rows), jnp.float32),
            jax.ShapeDtypeStruct(x.scales.shape, jnp.int32),
        ),
        sizes,
    )
    return out[:, :n].astype(out_dtype)


def _of_fours(x: Shaped[Array, "m k"]) -> Shaped[Array, "m k"]:
    """With zeros up to a multiple of four channels, which are multiplied together."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 4)))


def _at_least(x: Array, size: int, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(0, size - x.shape[axis]))
    return jnp.pad(x, widths)
