"""Configuration of a model: its architecture and its format, frozen and hashable (static under jit)."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from atom_jax.errors import AtomError, not_one_of
from atom_jax.schemes import SCHEMES

RopeScaling = Literal["none", "linear", "llama3", "yarn"]
KvRope = Literal["pre", "post"]

GROUP_SIZES = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and the context-extension rule applied to it.

    ``linear`` divides every frequency by ``factor``; ``llama3`` interpolates only the low ones
    (Llama 3.1 model card), between wavelengths set by ``low_freq_factor``, ``high_freq_factor``
    and ``original_max_position_embeddings``. ``yarn`` (arXiv 2309.00071) interpolates frequencies that
    turn at most ``beta_slow`` times in the original context, keeps those that turn at least ``beta_fast``
    times, with a ramp over the channels between (its ends whole channels if ``yarn_truncate``), and
    multiplies cos and sin by ``attention_factor``.
    """

    theta: float = 10000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    yarn_truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Format:
    """What a checkpoint holds and how it is run (docs/quantization.md); ``preset`` makes one.

    How its numbers were found is the converter's affair: ``convert.recipe.Recipe``. The defaults are those of
    ``w4a4kv4``, the same as ``preset("w4a4kv4")`` gives.

    ``group_size=None`` is one group over the whole row and ``num_outliers=0`` keeps no outliers: together
    they are the naive per-token, per-channel W4A4 that the method is compared with.

    Attributes:
      scheme: what a linear stores and multiplies; ``atom_jax/schemes`` has them. Settings that a scheme does
        not use have one value in it.
      group_size: input channels that share a scale.
      num_outliers: the last input channels of a linear, which are kept in INT8.
      clip_a: the fraction of a group's range that INT4 spans in activations.
      gather_inputs: each linear has an order of input channels of its own, in which its input is gathered.
      kv_bits: of a cached key or value; 16 is floating point.
      kv_groups: scales that an INT4 head of the cache has: 1 (the paper) or 2, one a half.
      kv_rope: keys are cached before or after RoPE.
      center_keys: a stored mean of each key channel is taken off before INT4 rounds the key.

    Raises:
      AtomError: a value that is not supported, or that the scheme has no use for.
    """

    scheme: str = "w4a4kv4"
    group_size: int | None = 128
    num_outliers: int = 128
    clip_a: float = 0.9
    gather_inputs: bool = False
    kv_bits: Literal[4, 16] = 4
    kv_groups: Literal[1, 2] = 2
    kv_rope: KvRope = "post"
    center_keys: bool = True

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise not_one_of("scheme", self.scheme, SCHEMES)
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise not_one_of("group size", self.group_size, GROUP_SIZES)
        if self.num_outliers < 0:
            raise AtomError(f"number of outliers must not be negative, found {self.num_outliers}")
        check_unused(self.scheme, SCHEMES[self.scheme].unused, vars(self))
        check_fraction("clip_a", self.clip_a)
        for name, values in (
            ("kv_rope", KvRope),
            ("kv_bits", Literal[4, 16]),
            ("kv_groups", Literal[1, 2]),
            ("gather_inputs", Literal[True, False]),
            ("center_keys", Literal[True, False]),
        ):
            check_choice(name, getattr(self, name), values)
        if self.center_keys and (self.kv_bits, self.kv_rope) != (4, "post"):
            raise AtomError(
                "center_keys needs kv_bits 4 and kv_rope 'post', "
                f"found kv_bits {self.kv_bits} and kv_rope {self.kv_rope!r}"
            )

    @property
    def quantizes_linears(self) -> bool:
        return SCHEMES[self.scheme].weight is not None


def check_unused(scheme: str, unused: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """AtomError where one of the settings that ``scheme`` does not use has another value than its own."""
    for name, value in unused.items():
        if settings.get(name, value) != value:
            raise AtomError(f"{scheme} has no setting {name}; leave it out")


def check_fraction(name: str, fraction: float | None) -> None:
    """AtomError for a clipping outside of (0, 1]; None is none that is fixed."""
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise AtomError(f"{name} must be in (0, 1], found {fraction}")


def check_choice(name: str, value: Any, values: Any) -> None:
    """AtomError for what is not one of the values of a ``Literal``."""
    if value not in typing.get_args(values):
        raise not_one_of(name, value, typing.get_args(values))


def preset(scheme: str, **changes: Any) -> Format:
    """The named scheme with ``changes`` applied.

    Raises:
      AtomError: the scheme, or a changed value, is not supported.
    """
    if scheme not in SCHEMES:
        raise not_one_of("scheme", scheme, SCHEMES)
    settings = {**SCHEMES[scheme].defaults, **SCHEMES[scheme].unused, **changes}
    # Keys are centred wherever that is possible.
    cache = (settings.get("kv_bits", Format.kv_bits), settings.get("kv_rope", Format.kv_rope))
    settings.setdefault("center_keys", cache == (4, "post"))
    return Format(scheme=scheme, **settings)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Llama-family model.

    ``qkv_bias``/``o_bias``/``mlp_bias`` say which projections carry a bias (Qwen2: only the first;
    Llama with attention_bias: the first two); ``qk_norm`` is Qwen3's RMSNorm over head_dim.

    ``windows`` is the sliding window of each layer: a query at position p sees the keys at p - window + 1 to
    p. None is a layer that sees the whole context; empty means that all do.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    format: Format = dataclasses.field(default_factory=lambda: preset("bf16"))

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise AtomError(f"windows of {len(self.windows)} layers in a model of {self.num_layers}")
        for window in self.windows:
            if window is not None and (type(window) is not int or window < 1):
                raise AtomError(f"a window must be a positive integer, or null, found {window!r}")

    @property
    def longest_window(self) -> int | None:
        """How many of the last positions any layer sees; None where a layer sees all."""
        bounded = [window for window in self.windows if window is not None]
        return max(bounded) if bounded and len(bounded) == self.num_layers else None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def of_layer(self, layer: int) -> ModelConfig:
        """The configuration of a model that is this one layer."""
        return self.replace(num_layers=1, windows=self.windows[layer : layer + 1])

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of ``to_json``; unknown or missing keys raise ``AtomError``."""
        try:
            data = dict(data)
            data["rope"] = RopeConfig(**data["rope"])
            data["format"] = Format(**data["format"])
            data["eos_token_ids"] = tuple(data["eos_token_ids"])
            data["windows"] = tuple(data["windows"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise AtomError(f"model configuration is not readable: {error}") from error
