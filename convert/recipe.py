"""The recipe of a conversion: the format of the checkpoint, and the settings that only the converter uses."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from atom_jax.config import Format, check_choice, check_fraction, check_unused, preset
from atom_jax.errors import AtomError, not_one_of
from atom_jax.schemes import SCHEMES
from convert.schemes import METHODS

Reorder = Literal["folded", "per_layer", "none"]

# The command's default of ``refine`` (``convert.refine_model.default_steps``), and the most weights in the
# layers of a model that has it. SmolLM2-135M has 106 million; a step takes about four seconds on two cores.
REFINE_STEPS, REFINE_MOST_WEIGHTS = 60, 400_000_000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the converter does to a model (docs/conversion.md); ``make_recipe`` makes the recipe of a scheme.

    The defaults are those of ``w4a4kv4``. A setting that a scheme does not use must have the one value that
    the scheme gives it.

    Attributes:
      format: format of the checkpoint.
      clip_w: fraction of a group's range that INT4 spans in weights, in (0, 1]; None searches it for each
        group and output channel.
      gptq: whether the rounding error of each input channel is compensated in the channels that are rounded
        after it.
      reorder: how the input channels with the most energy are moved to the end: "folded" in one order for
        all layers, folded into the weights; "per_layer" in an order of its own for each linear
        (``Format.gather_inputs``); "none" not at all.
      rotate: whether to rotate the residual stream and the values, which spreads outlier channels over all
        channels.
      migrate: whether scales are moved from activations to weights, or back, where that makes the error of
        a linear smaller.
      smooth_keys: how much the key channels are equalized before they are rounded to INT4: 0 not at all, 1
        fully; None searches what leaves the smallest error, for each kv head.
      exact_sink: whether the mean that is subtracted from keys is moved so that the key of the first token
        is rounded without an error (``convert.sink``); only with ``Format.center_keys``.
      refine: number of training steps that refine the rounding of the weights (``convert.refine``); 0 for
        none.

    Raises:
      AtomError: a value is not supported, or the scheme does not use the setting.
    """

    format: Format = dataclasses.field(default_factory=Format)
    clip_w: float | None = None
    gptq: bool = True
    reorder: Reorder = "folded"
    rotate: bool = False
    migrate: bool = True
    smooth_keys: float | None = None
    exact_sink: bool = True
    refine: int = 0

    def __post_init__(self) -> None:
        check_unused(self.format.scheme, METHODS[self.format.scheme].unused, vars(self))
        check_fraction("clip_w", self.clip_w)
        check_choice("reorder", self.reorder, Reorder)
        if self.format.gather_inputs != (self.reorder == "per_layer"):
            raise AtomError(
                f"inputs are gathered where reorder is per_layer and nowhere else, found reorder "
                f"{self.reorder!r} and gather_inputs {self.format.gather_inputs}"
            )
        if self.smooth_keys is not None and not 0.0 <= self.smooth_keys <= 1.0:
            raise AtomError(f"smooth_keys must be in [0, 1], found {self.smooth_keys}")
        if self.refine < 0:
            raise AtomError(f"refine must not be negative, found {self.refine}")

    @property
    def fits_keys(self) -> bool:
        """Whether the calibration inputs are used to equalize or centre the keys for an INT4 cache."""
        kept_in_int4 = self.format.quantizes_linears and self.format.kv_bits == 4
        return kept_in_int4 and (self.smooth_keys != 0.0 or self.format.center_keys)

    def settings(self) -> dict[str, Any]:
        """All settings by name, including those of the format, as ``make_recipe`` takes them."""
        settings = {**vars(self.format), **{name: getattr(self, name) for name in _OWN}}
        del settings["gather_inputs"]  # follows from reorder
        return settings

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with some settings changed, which may be settings of the format."""
        return _from_settings(**{**self.settings(), **changes})


_OWN = tuple(field.name for field in dataclasses.fields(Recipe) if field.name != "format")


def make_recipe(scheme: str = Format.scheme, **changes: Any) -> Recipe:
    """The default recipe of a scheme, with ``changes`` applied.

    Args:
      scheme: name of the scheme.
      changes: settings of ``Recipe`` and of ``Format``, except ``gather_inputs``, which follows from
        ``reorder``.

    Raises:
      AtomError: the scheme, or a changed value, is not supported.
    """
    if scheme not in METHODS:
        raise not_one_of("scheme", scheme, METHODS)
    return _from_settings(scheme=scheme, **{**METHODS[scheme].unused, **changes})


def has_setting(scheme: str, setting: str) -> bool:
    """Whether a scheme uses a setting of ``Format`` or ``Recipe``."""
    return setting not in SCHEMES[scheme].unused.keys() | METHODS[scheme].unused.keys()


def _from_settings(*, scheme: str, **settings: Any) -> Recipe:
    check_unused(scheme, METHODS[scheme].unused, settings)
    own = {name: settings.pop(name) for name in _OWN if name in settings}
    gather_inputs = own.get("reorder", Recipe.reorder) == "per_layer"
    return Recipe(preset(scheme, gather_inputs=gather_inputs, **settings), **own)
