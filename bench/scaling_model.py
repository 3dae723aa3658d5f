"""A model of the time of a step on several GPUs: rooflines of a part, costs of launches, and of collectives.

Its rates are those of data sheets, its latencies are assumptions. What a program sends is not: tests compare
``layer_collectives`` with compiled programs. Nothing here was measured on more than one GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from atom_jax.checkpoint import abstract_params
from atom_jax.config import ModelConfig
from atom_jax.explain import step_choices
from atom_jax.kv_cache import init_cache
from atom_jax.layers import activation_format
from atom_jax.structure import LINEARS
from bench.aot.hlo import Collective
from pallas_kernels.dispatch import cost, use_implementation
from pallas_kernels.roofline import PeakRates, seconds

# Data sheet of the H100 SXM, dense rates: the tensor cores of an H200, and slower memory.
H100 = PeakRates("NVIDIA H100 SXM", 3.35e12, 1979e12, 989e12)
# Of its 80 GB. The rest is for activations, programs and the libraries' buffers.
USABLE_BYTES = 72e9
# What a kernel costs beyond its roofline: to launch it, to fill its pipeline, to put partial sums together.
# Measured on one H100 (docs/gpu.md, "The largest gaps"): 4 to 5 µs of each matmul of a decode step.
KERNEL_SECONDS = 4.5e-6
# Kernels that XLA makes in a layer whose activations are not quantized: two norms and silu, which are ops of
# the other schemes.
_FLOAT_KERNELS = 3
# And for each sum of a layer over devices: one rounds what is summed, one adds the residual to the sum.
_SUM_KERNELS = 2
GPUS_OF_A_HOST = 8

# How the devices sum what o_proj and down_proj give.
Way = Literal["psum", "fixed order", "scattered"]


@dataclasses.dataclass(frozen=True)
class Link:
    """What connects the devices of a group.

    Attributes:
      bytes_per_second: that one device sends, while it receives as many.
      latency: seconds of a collective of no bytes.
    """

    name: str
    bytes_per_second: float
    latency: float


# Data sheet of the H100 SXM: NVLink 4, 900 GB/s in both directions together. The latency is an assumption, of
# the order that NCCL's tests (github.com/NVIDIA/nccl-tests) show for small messages.
NVLINK = Link("NVLink", 450e9, 10e-6)
# Data sheet of the ConnectX-7: one port of 400 Gb/s, and a DGX H100 has one for each GPU. The latency is an
# assumption.
NETWORK = Link("network", 50e9, 20e-6)


class StepTime(NamedTuple):
    """Predicted seconds of a decode step, by what they are spent on.

    Attributes:
      roofline: of the ops of one device.
      kernels: what its kernels cost beyond.
      collectives: what the devices send to each other, which overlaps with nothing.
    """

    roofline: float
    kernels: float
    collectives: float

    @property
    def total(self) -> float:
        return self.roofline + self.kernels + self.collectives


def gathered_bytes(config: ModelConfig) -> int:
    """Bytes of the quantized rows of one token that a layer gathers if sums are scattered: qkv and gate_up.

    INT4 values count half a byte, outliers one, scales four. 0 if activations are not quantized, for then
    sums are not scattered.
    """
    params: Any = abstract_params(config)
    layers, total = params["layers"], 0
    for linear in LINEARS:
        if not linear.reads_residual:
            continue
        fmt = activation_format(layers[linear.weight].get_value(), config)
        if fmt is None:
            return 0
        channels = linear.channels(config)
        body = channels - fmt.num_outliers if fmt.group_size else 0
        total += body // 2 + (channels - body) + 4 * (fmt.num_groups(channels) + 1)
    return total


def layer_collectives(
    config: ModelConfig, way: Way, *, tokens: int, devices: int, float_bytes: int
) -> list[Collective]:
    """The collectives of one layer; all that is gathered for a linear counts as one.

    Args:
      config: configuration of the whole model.
      way: how sums are made. "scattered" is that of library sums, for schemes that quantize activations.
      tokens: number of tokens in the program.
      devices: a power of two.
      float_bytes: bytes of a value of the residual stream.
    """
    values = tokens * config.hidden_size
    if way == "psum":
        return [Collective("all-reduce", values * float_bytes)] * 2
    if way == "fixed order":
        # Each device exchanges its whole float32 sum with one at distance 1, 2, 4, ...
        return [Collective("collective-permute", values * 4)] * (2 * (devices.bit_length() - 1))
    gathered = tokens * gathered_bytes(config)
    assert gathered, "float activations are not scattered"
    reads = [linear for linear in LINEARS if linear.reads_residual]
    return [
        *[Collective("reduce-scatter", values * float_bytes // devices)] * 2,
        *[Collective("all-gather", gathered // len(reads))] * len(reads),
    ]


def sent_bytes(collective: Collective, devices: int) -> float:
    """Bytes that each device sends, at the least, in a collective whose result on it has so many bytes."""
    others = devices - 1
    match collective.kind:
        case "all-reduce":
            return 2 * others / devices * collective.bytes
        case "all-gather":
            return others / devices * collective.bytes
        case "reduce-scatter":
            return others * collective.bytes
        case "collective-permute":
            return collective.bytes
    raise ValueError(f"no model of {collective.kind}")


def collective_seconds(collectives: Sequence[Collective], devices: int, link: Link) -> float:
    """Seconds of collectives one after the other; 0 on one device."""
    if devices == 1:
        return 0.0
    sent = sum(sent_bytes(each, devices) for each in collectives)
    return len(collectives) * link.latency + sent / link.bytes_per_second


def link_of(devices: int) -> Link:
    """What connects a group: a ring through several hosts goes at the rate of the network."""
    return NVLINK if devices <= GPUS_OF_A_HOST else NETWORK


@functools.cache
def part_times(config: ModelConfig, batch: int, context: int) -> tuple[float, int]:
    """Roofline seconds of a decode step of ``config`` on one H100, and the number of its kernels.

    All ops are counted as kernels that read each input once. There is no such kernel for some of them yet
    (docs/gpu.md, "The largest gaps"): what XLA makes of those takes longer.
    """
    params = abstract_params(config, jnp.dtype(jnp.bfloat16))
    with use_implementation("reference"):
        choices = step_choices(params, config, batch=batch, seq=1, context=context)
    time, kernels = 0.0, 0 if gathered_bytes(config) else _FLOAT_KERNELS * config.num_layers
    for part, choice in choices:
        calls = config.num_layers if part == "layer" else 1
        time += calls * seconds(cost(choice.op, choice.call), H100)
        kernels += calls
    return time, kernels


def step_time(config: ModelConfig, *, batch: int, context: int, devices: int) -> StepTime:
    """The prediction for a decode step of ``batch`` sequences on the devices of one group.

    Args:
      config: configuration of the whole model, of ``devices`` shards.
    """
    roofline, kernels = part_times(config.part(devices), batch, context)
    layer = layer_collectives(config, "psum", tokens=batch, devices=devices, float_bytes=2)
    embedding = Collective("all-reduce", batch * config.hidden_size * 2)
    logits = Collective("all-gather", batch * config.vocab_size * 4)
    if devices > 1:
        kernels += _SUM_KERNELS * len(layer) * config.num_layers
    everything = [*layer * config.num_layers, embedding, logits]
    return StepTime(
        roofline, kernels * KERNEL_SECONDS, collective_seconds(everything, devices, link_of(devices))
    )


def bytes_of_device(config: ModelConfig, *, batch: int, context: int, devices: int) -> tuple[int, int]:
    """Bytes of weights and of cache that each device of a group holds."""
    part = config.part(devices)
    weights = abstract_params(part, jnp.dtype(jnp.bfloat16))
    cache = jax.eval_shape(lambda: init_cache(part, batch, context))
    found = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (weights, cache)
    ]
    return found[0], found[1]


def scattering_pays_from(config: ModelConfig, devices: int, link: Link) -> int:
    """The least number of tokens for which scattered sums are predicted to take less time than "psum".

    What is sent grows with the tokens, and is less if scattered; there are two collectives more. That the
    norms are computed for a share of the tokens is not counted.
    """

    def time(way: Way, tokens: int) -> float:
        layer = layer_collectives(config, way, tokens=tokens, devices=devices, float_bytes=2)
        return collective_seconds(layer, devices, link)

    # Both times are linear in the tokens, so two points of each give the crossing. Tokens are multiples of
    # the devices, as those that the model scatters.
    base, step = devices, devices * 1024
    extra = time("scattered", base) - time("psum", base)
    saved = (extra - (time("scattered", base + step) - time("psum", base + step))) / step
    return base + devices * max(0, math.ceil(extra / saved / devices))
