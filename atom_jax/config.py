"""Configuration of a model: its architecture and its format. Frozen and hashable, so static under jit."""

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
    """Rotary embedding (RoPE): the base ``theta``, and the rule that extends the context.

    ``linear`` divides every frequency by ``factor``. ``llama3`` (Llama 3.1 model card) divides only the low
    frequencies, with a smooth transition between two wavelengths that follow from ``low_freq_factor``,
    ``high_freq_factor`` and ``original_max_position_embeddings``. ``yarn`` (arXiv 2309.00071) divides the
    frequencies that make at most ``beta_slow`` turns in the original context and keeps those that make at
    least ``beta_fast`` turns. Between them is a linear ramp over the channels; if ``yarn_truncate``, the two
    ends of the ramp are rounded to whole channels. It also multiplies cos and sin by ``attention_factor``.
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
    """How the numbers of a checkpoint are stored and multiplied (docs/quantization.md).

    ``preset`` makes the format of a scheme. The settings that only the converter needs are in
    ``convert.recipe.Recipe``. The defaults are those of ``preset("w4a4kv4")``.

    ``group_size=None`` is one group over all input channels, and ``num_outliers=0`` has no outlier channels:
    together they are the naive per-token, per-channel W4A4 with which the paper compares its method.

    Attributes:
      scheme: name of the scheme, which defines how a linear is stored and multiplied (``atom_jax/schemes``).
        A setting that the scheme does not use must have the one value that the scheme gives it.
      group_size: number of input channels that share a scale: one of ``GROUP_SIZES``, or None.
      num_outliers: number of outlier channels: the last input channels of each linear, kept in INT8.
      clip_a: fraction of a group's range that INT4 spans in activations, in (0, 1].
      rotate_inner: whether each INT4 group of down_proj's input is transformed by a Hadamard matrix before it
        is rounded (``pallas_kernels.hadamard``); only with ``group_size``.
      gather_inputs: whether each linear has its own order of input channels, into which its input is
        gathered at run time.
      kv_bits: bits of each value in the KV cache; 16 means floating point.
      kv_groups: number of scales of each head of a token in an INT4 cache: 1 (as in the paper), or 2, one
        for each half of the head's channels.
      kv_rope: whether keys are cached before ("pre") or after ("post") RoPE.
      head_bits: bits of each value in the embedding and in the head: 8, with a scale for each row and
        multiplied as in w8a8; 16 means floating point.
      center_keys: whether a stored mean of each key channel is subtracted before the key is rounded to INT4.
      shards: number of equal parts into which the layers are cut, for as many devices or a divisor of it
        (``ModelConfig.part``). Linears that are split along their input channels (o and down) then consist of
        as many blocks, each with groups and outliers of its own.

    Raises:
      AtomError: a value is not supported, or the scheme does not use the setting.
    """

    scheme: str = "w4a4kv4"
    group_size: int | None = 128
    num_outliers: int = 128
    clip_a: float = 0.9
    rotate_inner: bool = True
    gather_inputs: bool = False
    kv_bits: Literal[4, 16] = 4
    kv_groups: Literal[1, 2] = 2
    kv_rope: KvRope = "post"
    head_bits: Literal[8, 16] = 8
    center_keys: bool = True
    shards: int = 1

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise not_one_of("scheme", self.scheme, SCHEMES)
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise not_one_of("group size", self.group_size, GROUP_SIZES)
        if self.num_outliers < 0:
            raise AtomError(f"number of outliers must not be negative, found {self.num_outliers}")
        if type(self.shards) is not int or self.shards < 1:
            raise AtomError(f"number of shards must be a positive integer, found {self.shards!r}")
        check_unused(self.scheme, SCHEMES[self.scheme].unused, vars(self))
        check_fraction("clip_a", self.clip_a)
        for name, values in (
            ("kv_rope", KvRope),
            ("kv_bits", Literal[4, 16]),
            ("kv_groups", Literal[1, 2]),
            ("head_bits", Literal[8, 16]),
            ("rotate_inner", Literal[True, False]),
            ("gather_inputs", Literal[True, False]),
            ("center_keys", Literal[True, False]),
        ):
            check_choice(name, getattr(self, name), values)
        if self.center_keys and (self.kv_bits, self.kv_rope) != (4, "post"):
            raise AtomError(
                "center_keys needs kv_bits 4 and kv_rope 'post', "
                f"found kv_bits {self.kv_bits} and kv_rope {self.kv_rope!r}"
            )
        if self.rotate_inner and self.group_size is None:
            raise AtomError("rotate_inner needs groups: a power of two of channels is rotated together")

    def rotates(self, linear: str) -> bool:
        """Whether the input of this linear ("qkv", "o", "gate_up", "down") is rotated within its groups."""
        return linear == "down" and self.rotate_inner

    @property
    def quantizes_linears(self) -> bool:
        return SCHEMES[self.scheme].weight is not None


def check_unused(scheme: str, unused: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Checks the settings that a scheme does not use.

    Args:
      scheme: name of the scheme, for the error message.
      unused: the settings that the scheme does not use, with the value that each must have.
      settings: the settings to check; others than those in ``unused`` are ignored.

    Raises:
      AtomError: one of the unused settings is given with another value.
    """
    for name, value in unused.items():
        if settings.get(name, value) != value:
            raise AtomError(f"{scheme} has no setting {name}; leave it out")


def check_fraction(name: str, fraction: float | None) -> None:
    """AtomError if a clipping fraction is not in (0, 1]; None (the fraction is searched) is accepted."""
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise AtomError(f"{name} must be in (0, 1], found {fraction}")


def check_choice(name: str, value: Any, values: Any) -> None:
    """AtomError if ``value`` is not one of the values of the ``Literal`` type ``values``."""
    if value not in typing.get_args(values):
        raise not_one_of(name, value, typing.get_args(values))


def preset(scheme: str, **changes: Any) -> Format:
    """The default format of a scheme, with ``changes`` applied.

    Args:
      scheme: name of the scheme.
      changes: settings of ``Format`` that replace the scheme's defaults.

    Raises:
      AtomError: the scheme, or a changed value, is not supported.
    """
    if scheme not in SCHEMES:
        raise not_one_of("scheme", scheme, SCHEMES)
    settings = {**SCHEMES[scheme].defaults, **SCHEMES[scheme].unused, **changes}
    # By default groups are rotated and keys are centred wherever that is possible.
    settings.setdefault("rotate_inner", settings.get("group_size", Format.group_size) is not None)
    cache = (settings.get("kv_bits", Format.kv_bits), settings.get("kv_rope", Format.kv_rope))
    settings.setdefault("center_keys", cache == (4, "post"))
    return Format(scheme=scheme, **settings)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only Llama-family model, and the format of its checkpoint.

    ``qkv_bias``, ``o_bias`` and ``mlp_bias`` say which projections have a bias (in Qwen2 only qkv; in Llama
    with attention_bias qkv and o). ``qk_norm`` is Qwen3's RMSNorm over head_dim on queries and keys.

    ``windows`` is the sliding window of each layer in tokens: a query at position p sees the keys at
    positions p - window + 1 to p. None stands for a layer without a window, which sees the whole context; an
    empty tuple means that no layer has a window.
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
        """The largest window of any layer, in tokens; None if at least one layer sees the whole context."""
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
        """The configuration of a model that consists of this one layer."""
        return self.replace(num_layers=1, windows=self.windows[layer : layer + 1])

    def part(self, parts: int) -> ModelConfig:
        """The configuration of one of ``parts`` equal parts of the model, which is what one device computes.

        A part has some of the heads, of the inner channels of the MLP and of the vocabulary (the last part of
        which is padded), and of each linear in blocks ``format.shards / parts`` of them. Where there are
        fewer kv heads than parts, neighbouring parts have the same one.

        Raises:
          AtomError: the model, or its checkpoint, cannot be divided so.
        """
        if parts < 1 or self.format.shards % parts:
            raise AtomError(
                f"a checkpoint of {self.format.shards} shards does not run on {parts} devices; "
                f"convert the original model with --shards {parts}, or a multiple of it"
            )
        if problem := self.indivisible(parts):
            raise AtomError(f"the model cannot be divided into {parts} parts: {problem}")
        blocks = self.format.shards // parts
        return self.replace(
            vocab_size=blocks * -(-self.vocab_size // self.format.shards),
            num_heads=self.num_heads // parts,
            num_kv_heads=max(1, self.num_kv_heads // parts),
            intermediate_size=self.intermediate_size // parts,
            format=dataclasses.replace(self.format, shards=blocks),
        )

    def indivisible(self, parts: int) -> str | None:
        """Why heads or inner channels cannot be divided among ``parts`` devices; None if they can."""
        if self.num_heads % parts:
            return f"{self.num_heads} heads"
        if self.num_kv_heads % parts and parts % self.num_kv_heads:
            return f"{self.num_kv_heads} kv heads"
        if self.intermediate_size % parts:
            return f"{self.intermediate_size} inner channels of the MLP"
        return None

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
