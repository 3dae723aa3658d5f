"""Which group sizes and numbers of outliers a model allows: a linear must be whole groups plus outliers.

All linears share one group size and one number of outliers. So their numbers of input channels must all have
the same remainder when divided by the group size. Of a linear that is stored in blocks (``Format.shards``)
each block has groups and outliers of its own, so it is the channels of a block that count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from atom_jax.config import GROUP_SIZES, Format, ModelConfig
from atom_jax.errors import AtomError
from atom_jax.schemes import SCHEMES
from atom_jax.structure import LINEARS

_WITHOUT_GROUPS = (
    f"no groups of {', '.join(map(str, GROUP_SIZES))} suit every linear: use the scheme w8a8, which has "
    "neither groups nor outliers"
)
# The settings that ``choose_groups`` can choose.
CHOOSABLE = frozenset({"group_size", "num_outliers"})
# If the number of outliers is chosen here, it is near the input channels of the narrowest linear divided by
# this, and at most twice as large.
_OUTLIER_PART = 8


def has_groups(format: Format) -> bool:
    """Whether the scheme divides the input channels of its weights into groups."""
    weight = SCHEMES[format.scheme].weight
    return weight is not None and weight.grouped


def has_outliers(format: Format) -> bool:
    """Whether the scheme uses the setting ``num_outliers``."""
    return SCHEMES[format.scheme].has("num_outliers")


def check_groups(name: str, channels: int, group_size: int | None, num_outliers: int | None) -> int:
    """Checks the groups of one weight and returns its group size.

    Args:
      name: what to call the weight in error messages.
      channels: number of its input channels, K.
      group_size: None for one group of all channels but the outliers.
      num_outliers: number of its outlier channels; None for a format without outliers.

    Returns:
      ``group_size``, or the number of channels in the group if that was None.

    Raises:
      AtomError: see ``check_linears``.
    """
    check_linears({name: channels}, group_size, num_outliers)
    return group_size or channels - (num_outliers or 0)


def check_model(config: ModelConfig) -> None:
    """AtomError if the groups of the format do not suit every linear of the model, see ``check_linears``.

    The shards of the format must divide the model (``convert.shards.check_division``).
    """
    format = config.format
    if not has_groups(format):
        return
    outliers = format.num_outliers if has_outliers(format) else None
    try:
        check_linears(block_channels(config), format.group_size, outliers)
    except AtomError as error:
        others = [
            shards
            for shards in range(1, format.shards)
            if config.indivisible(shards) is None and _suits(with_shards(config, shards))
        ]
        if not others:
            raise
        raise AtomError(f"{error}, or {_or(others)} shards") from error


def _suits(config: ModelConfig) -> bool:
    format = config.format
    outliers = format.num_outliers if has_outliers(format) else None
    counts = block_channels(config).values()
    return all(_problem(count, format.group_size, outliers) is None for count in counts)


def with_shards(config: ModelConfig, shards: int) -> ModelConfig:
    """The configuration with another number of shards."""
    return config.replace(format=dataclasses.replace(config.format, shards=shards))


def check_linears(channels: Mapping[str, int], group_size: int | None, num_outliers: int | None) -> None:
    """Checks the groups of linears that share one group size and one number of outliers.

    Args:
      channels: number of input channels, K, of each linear, by the name for error messages.
      group_size: None for one group of all channels but the outliers.
      num_outliers: number of outlier channels of each linear; None for a format without outliers.

    Raises:
      AtomError: for some linear, K - num_outliers is not positive or not a multiple of the group size. The
        message names the first such linear, and settings that suit all linears.
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
    """The format of ``config``, with its ``flexible`` settings changed so that they suit every linear.

    A format that suits every linear is returned unchanged. Otherwise the largest group size is chosen that
    allows a number of outliers of at most a quarter of the narrowest linear's input channels, preferably
    above zero. Of the numbers that it allows, the one is chosen that is nearest to an eighth of these
    channels, or to the format's number if that is smaller. The GPU kernels support the chosen number if the
    input channels of all linears are multiples of 32. With shards the channels of a block count, and a number
    of outliers that suits is not kept if it is more than a quarter of the narrowest block.

    Args:
      config: configuration of the model, with the format to start from; its shards must divide the model.
      flexible: the names in ``CHOOSABLE`` of the settings that may change.
      measured_outliers: whether the number of outliers is measured later (``convert.passes.outliers``). If
        so, only the group size is chosen here, such that there are numbers to choose from.

    Returns:
      The format. If no choice suits every linear, it is the one of ``config``.
    """
    format = config.format
    if not has_groups(format):
        return format
    if not has_outliers(format):
        counts = block_channels(config).values()
        fits = [(size, 0) for size in GROUP_SIZES if all(count % size == 0 for count in counts)]
    else:
        fits = _fits(block_channels(config).values())
    if "group_size" not in flexible:
        fits = [fit for fit in fits if fit[0] == format.group_size]
    if measured_outliers:
        fits = [fit for fit in fits if fit[1] <= _most_outliers(config)]
        suits = format.group_size in {size for size, _ in fits}
    else:
        if "num_outliers" not in flexible and has_outliers(format):
            fits = [fit for fit in fits if fit[1] == format.num_outliers]
        suits = (format.group_size, format.num_outliers) in fits
        if format.shards > 1 and "num_outliers" in flexible:
            suits = suits and format.num_outliers <= _most_outliers(config)
    if suits or not fits:  # if nothing fits, ``check_model`` raises the error
        return format
    size, outliers = min(fits, key=lambda fit: _rank(config, *fit))
    chosen = {"group_size": size} if measured_outliers else {"group_size": size, "num_outliers": outliers}
    return dataclasses.replace(format, **chosen)


def _most_outliers(config: ModelConfig) -> int:
    return 2 * min(block_channels(config).values()) // _OUTLIER_PART


def _rank(config: ModelConfig, size: int, outliers: int) -> tuple[bool, bool, int, int, int]:
    """Sort key of a group size and a number of outliers; the best has the smallest key."""
    wanted = min(config.format.num_outliers, min(block_channels(config).values()) // _OUTLIER_PART)
    return (
        outliers > _most_outliers(config),
        outliers == 0 and wanted > 0,
        -size,
        abs(outliers - wanted),
        outliers,
    )


def block_channels(config: ModelConfig) -> dict[str, int]:
    """Number of input channels of each linear, or of each block of one, by the name for error messages."""
    counts = {}
    for linear in LINEARS:
        blocks = linear.blocks(config)
        name = linear.weight if blocks == 1 else f"{linear.weight}, each of {blocks} shards"
        counts[name] = linear.channels(config) // blocks
    return counts


def _problem(channels: int, group_size: int | None, num_outliers: int | None) -> str | None:
    """Why a linear with ``channels`` input channels cannot have these groups and outliers; None if it can."""
    body = channels - (num_outliers or 0)
    if body <= 0:
        return f"{num_outliers} outliers leave none of its {channels} input channels for INT4 groups"
    if group_size is None or body % group_size == 0:
        return None
    less = "" if num_outliers is None else f" less {num_outliers} outliers"
    return f"its {channels} input channels{less} are not whole groups of {group_size}"


def _fits(channels: Collection[int]) -> list[tuple[int, int]]:
    """All (group size, number of outliers) that suit all linears and leave each at least one group."""
    narrowest = min(channels)
    return [
        (size, outliers)
        for size in GROUP_SIZES
        if len({count % size for count in channels}) == 1
        for outliers in range(narrowest % size, narrowest - size + 1, size)
    ]


def _advice(channels: Collection[int], group_size: int | None, num_outliers: int | None) -> str:
    """Text with settings that suit all linears and are nearest to the given ones."""
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
