"""How a checkpoint is made: its format, and the settings that only the converter looks at."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from atom_jax.config import Format, check_choice, check_fraction, check_unused, preset
from atom_jax.errors import AtomError, not_one_of
from atom_jax.schemes import SCHEMES
from convert.schemes import METHODS

Reorder = Literal["folded", "per_layer", "none"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the converter does (docs/conversion.md); ``make_recipe`` makes one from a scheme's name.

    The defaults are those of ``w4a4kv4``. Settings that a scheme does not use have one value in it.

    Attributes:
      format: of the checkpoint.
      clip_w: the fraction of a group's range that INT4 spans in weights; None searches it for each group and
        output channel.
      gptq: compensates the rounding errors of a weight's channels in those that are rounded later.
      reorder: brings the hottest input channels last: in one order for all layers, folded into the weights,
        or in an order of each linear's own (``Format.gather_inputs``), or not at all.
      rotate: spreads hot channels of the residual stream and of the values over all of them.
      migrate: moves scales from activations to weights, or back, where that makes a linear's error smaller.
      smooth_keys: how far key channels are evened out before INT4 rounds them: 0 not at all, 1 fully, None
        as far as it pays, searched for each kv head.

    Raises:
      AtomError: a value that is not supported, or that the scheme has no use for.
    """

    format: Format = dataclasses.field(default_factory=Format)
    clip_w: float | None = None
    gptq: bool = True
    reorder: Reorder = "folded"
    rotate: bool = False
    migrate: bool = True
    smooth_keys: float | None = None

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

    @property
    def fits_keys(self) -> bool:
        """Whether keys are looked at before the conversion decides how to cache them."""
        kept_in_int4 = self.format.quantizes_linears and self.format.kv_bits == 4
        return kept_in_int4 and (self.smooth_keys != 0.0 or self.format.center_keys)

    def settings(self) -> dict[str, Any]:
        """All settings by name, those of the format among them: what ``make_recipe`` takes."""
        settings = {**vars(self.format), **{name: getattr(self, name) for name in _OWN}}
        del settings["gather_inputs"]  # reorder says it
        return settings

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with other values of some settings, the format's among them."""
        return _from_settings(**{**self.settings(), **changes})


_OWN = tuple(field.name for field in dataclasses.fields(Recipe) if field.name != "format")


def make_recipe(scheme: str = Format.scheme, **changes: Any) -> Recipe:
    """The recipe of a scheme with ``changes`` applied.

    Args:
      scheme: the name of one.
      changes: settings of ``Recipe`` and of ``Format``, except ``gather_inputs``, which ``reorder`` decides.

    Raises:
      AtomError: the scheme, or a changed value, is not supported.
    """
    if scheme not in METHODS:
        raise not_one_of("scheme", scheme, METHODS)
    return _from_settings(scheme=scheme, **{**METHODS[scheme].unused, **changes})


def has_setting(scheme: str, setting: str) -> bool:
    """Whether a setting changes anything in a scheme."""
    return setting not in SCHEMES[scheme].unused.keys() | METHODS[scheme].unused.keys()


def _from_settings(*, scheme: str, **settings: Any) -> Recipe:
    check_unused(scheme, METHODS[scheme].unused, settings)
    own = {name: settings.pop(name) for name in _OWN if name in settings}
    gather_inputs = own.get("reorder", Recipe.reorder) == "per_layer"
    return Recipe(preset(scheme, gather_inputs=gather_inputs, **settings), **own)
