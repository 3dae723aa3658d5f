"""Which group sizes and numbers of outliers a model allows: its linears must be outliers plus whole groups.

All linears share one group size and one number of outliers, so the linears must leave the same remainder when
their input channels are divided by the group size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from atom_jax.config import GROUP_SIZES, Format, ModelConfig
from atom_jax.errors import AtomError
from atom_jax.schemes import SCHEMES
from atom_jax.structure import linear_shapes

_WITHOUT_GROUPS = (
    f"no groups of {', '.join(map(str, GROUP_SIZES))} suit every linear: use the scheme w8a8, which has "
    "neither groups nor outliers"
)
# Settings that can be left to ``choose_groups``.
CHOOSABLE = frozenset({"group_size", "num_outliers"})
# Without a wish a linear keeps this part of its channels as outliers, and never more than twice of it.
_OUTLIER_PART = 8


def has_groups(format: Format) -> bool:
    """Whether the weights of the scheme are cut into groups."""
    weight = SCHEMES[format.scheme].weight
    return weight is not None and weight.grouped


def has_outliers(format: Format) -> bool:
    """Whether the scheme has a setting for outliers."""
    return SCHEMES[format.scheme].has("num_outliers")


def check_groups(name: str, channels: int, group_size: int | None, num_outliers: int | None) -> int:
    """The group size to use for one weight of ``channels`` input channels (None: the whole body).

    Args:
      name: what to call the tensor in the message.
      channels: its input channels, K.
      num_outliers: None for a format that has no outliers.

    Raises:
      AtomError: see ``check_linears``.
    """
    check_linears({name: channels}, group_size, num_outliers)
    return group_size or channels - (num_outliers or 0)


def check_model(config: ModelConfig) -> None:
    """AtomError where the groups of the format do not suit every linear, see ``check_linears``."""
    format = config.format
    if has_groups(format):
        outliers = format.num_outliers if has_outliers(format) else None
        check_linears(_channels(config), format.group_size, outliers)


def check_linears(channels: Mapping[str, int], group_size: int | None, num_outliers: int | None) -> None:
    """Checks the groups of linears that share one group size and one number of outliers.

    Args:
      channels: the input channels, K, of each linear, by its name in the message.
      num_outliers: None for a format that has no outliers.

    Raises:
      AtomError: the body of a linear, K - num_outliers channels, is empty or not made of whole groups. The
        message names the first such linear, and what suits all of them.
    """
    if num_outliers is not None and num_outliers < 0:
        raise AtomError(f"number of outliers must not be negative, found {num_outliers}")
    if group_size is not None and group_size < 1:
        raise AtomError(f"group size must be positive, found {group_size}")
    for name, count in channels.items():
        problem = _problem(count, group_size, num_outliers)
        if problem is not None:
            advice = _advice(channels.values(), group_size, num_outliers)
            raise AtomError(f"{name}: {problem}; {advice}")


def choose_groups(
    config: ModelConfig, flexible: Collection[str], *, measured_outliers: bool = False
) -> Format:
    """The format of ``config``, of which the ``flexible`` settings become what suits every linear.

    A format that suits stays as it is. Else the group size becomes the largest with which a number of
    outliers up to a quarter of the narrowest linear suits, preferably one above zero. The number of outliers
    becomes the one that is nearest to an eighth of that linear, but not to more than the format's: where
    channels are multiples of 32, the GPU kernels multiply it.

    Args:
      flexible: names of ``CHOOSABLE``; others are kept whatever they are.
      measured_outliers: the number of outliers is chosen later (``passes.outliers``): only the group size is
        chosen here, so that there are numbers to choose from.

    Returns:
      The format, which suits unless nothing does.
    """
    format = config.format
    if not has_groups(format):
        return format
    if not has_outliers(format):
        fits = [(size, 0) for size in GROUP_SIZES if all(k % size == 0 for k in _channels(config).values())]
    else:
        fits = _fits(_channels(config).values())
    if "group_size" not in flexible:
        fits = [fit for fit in fits if fit[0] == format.group_size]
    if measured_outliers:
        fits = [fit for fit in fits if fit[1] <= _most_outliers(config)]
        suits = format.group_size in {size for size, _ in fits}
    else:
        if "num_outliers" not in flexible and has_outliers(format):
            fits = [fit for fit in fits if fit[1] == format.num_outliers]
        suits = (format.group_size, format.num_outliers) in fits
    if suits or not fits:  # where nothing fits, ``check_model`` says so
        return format
    size, outliers = min(fits, key=lambda fit: _rank(config, *fit))
    chosen = {"group_size": size} if measured_outliers else {"group_size": size, "num_outliers": outliers}
    return dataclasses.replace(format, **chosen)


def _most_outliers(config: ModelConfig) -> int:
    return 2 * min(_channels(config).values()) // _OUTLIER_PART


def _rank(config: ModelConfig, size: int, outliers: int) -> tuple[bool, bool, int, int, int]:
    """What is better comes first."""
    wanted = min(config.format.num_outliers, min(_channels(config).values()) // _OUTLIER_PART)
    return (
        outliers > _most_outliers(config),
        outliers == 0 and wanted > 0,
        -size,
        abs(outliers - wanted),
        outliers,
    )


def _channels(config: ModelConfig) -> dict[str, int]:
    """The input channels of each linear."""
    return {name: columns for name, (_, columns) in linear_shapes(config).items()}


def _problem(channels: int, group_size: int | None, num_outliers: int | None) -> str | None:
    """Why a linear of so many input channels cannot be cut so; None if it can."""
    body = channels - (num_outliers or 0)
    if body <= 0:
        return f"{num_outliers} outliers leave none of its {channels} input channels for INT4 groups"
    if group_size is None or body % group_size == 0:
        return None
    less = "" if num_outliers is None else f" less {num_outliers} outliers"
    return f"its {channels} input channels{less} are not whole groups of {group_size}"


def _fits(channels: Collection[int]) -> list[tuple[int, int]]:
    """Every group size and number of outliers that suit all linears, at least one group in each."""
    narrowest = min(channels)
    return [
        (size, outliers)
        for size in GROUP_SIZES
        if len({count % size for count in channels}) == 1
        for outliers in range(narrowest % size, narrowest - size + 1, size)
    ]


def _advice(channels: Collection[int], group_size: int | None, num_outliers: int | None) -> str:
    """What suits all linears and is nearest to what was asked."""
    if num_outliers is None:
        sizes = [str(size) for size in GROUP_SIZES if all(count % size == 0 for count in channels)]
        return f"try groups of {' or '.join(sizes)}" if sizes else _WITHOUT_GROUPS
    fits = _fits(channels)
    if not fits:
        return _WITHOUT_GROUPS
    counts = sorted(
        (count for size, count in fits if size == group_size), key=lambda count: abs(count - num_outliers)
    )
    sizes = [size for size, count in fits if count == num_outliers]
    options = []
    if counts:
        options.append(f"{_or(counts[:2])} outliers with groups of {group_size}")
    if sizes:
        options.append(f"{num_outliers} outliers with groups of {max(sizes)}")
    if not options:
        size, count = min(fits, key=lambda fit: (abs(fit[1] - num_outliers), -fit[0]))
        options.append(f"{count} outliers with groups of {size}")
    return f"try {', or '.join(options)}"


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
