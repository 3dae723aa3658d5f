"""``atom-jax convert``: from an original model to a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from atom_jax.errors import AtomError
from atom_jax.schemes import SCHEMES
from atom_jax_cli.console import JsonOption, format_bytes, note, print_json, progress_bars
from convert.recipe import REFINE_STEPS, has_setting, make_recipe

_SCHEME = "w4a4kv4"
# How the settings that the converter chose are called in its messages.
_SETTINGS = {
    "group_size": "groups of",
    "num_outliers": "number of outliers",
    "refine": "steps of refinement",
    "shards": "number of shards",
}
_WEIGHTS, _CACHE, DATA_PANEL = "Weights and activations", "KV cache", "Data and evaluation"


CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: a file (text or JSON Lines), an org/name data set, "
        "or 'sampled' from the model alone.",
        show_default="built-in English and text sampled from the model",
        rich_help_panel=DATA_PANEL,
    ),
]
CalibrationTokensOption = Annotated[
    int, typer.Option(help="Tokens to calibrate on.", rich_help_panel=DATA_PANEL)
]
SeedOption = Annotated[
    int, typer.Option(help="Of sampled text.", min=0, max=2**32 - 1, rich_help_panel=DATA_PANEL)
]
RevisionOption = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit on the Hub.", show_default="the repository's own default"),
]


def _default(setting: str) -> str:
    """The default of a setting for ``--help``: that of the default scheme, then different ones of others."""
    names = {None: "searched", True: "on", False: "off"}
    by_value: dict[str, list[str]] = {}
    for scheme in (_SCHEME, *(each for each in SCHEMES if each != _SCHEME)):
        if has_setting(scheme, setting):
            value = make_recipe(scheme).settings()[setting]
            text = names[value] if value is None or isinstance(value, bool) else str(value)
            by_value.setdefault(text, []).append(scheme)
    first, *others = by_value
    return "; ".join([first, *(f"{value} in {', '.join(by_value[value])}" for value in others)])


GROUP_SIZE_DEFAULT = f"{_default('group_size')} where that suits the model"
NUM_OUTLIERS_DEFAULT = f"{_default('num_outliers')} where that suits the model"


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder or file (.safetensors, .bin, .gguf), or org/name on the Hugging Face Hub.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder to create; may exist if it is empty.", show_default=False)
    ],
    scheme: Annotated[
        str, typer.Option(help="; ".join(f"{name} ({each.about})" for name, each in SCHEMES.items()))
    ] = _SCHEME,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Channels that share a scale: 32, 64 or 128.",
            show_default=GROUP_SIZE_DEFAULT,
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    num_outliers: Annotated[
        str | None,
        typer.Option(
            help="Channels kept in 8 bits; auto keeps as few as the activations allow.",
            metavar="INTEGER|auto",
            show_default=NUM_OUTLIERS_DEFAULT,
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    clip_w: Annotated[
        float | None,
        typer.Option(
            help="Clipping of weights, (0, 1]; searched is for each group and output channel.",
            show_default=_default("clip_w"),
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    clip_a: Annotated[
        float | None,
        typer.Option(
            help="Clipping of activations, (0, 1].", show_default=_default("clip_a"), rich_help_panel=_WEIGHTS
        ),
    ] = None,
    gptq: Annotated[
        bool | None,
        typer.Option(
            "--gptq/--no-gptq",
            help="Compensate rounding errors.",
            show_default=_default("gptq"),
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    migrate: Annotated[
        bool | None,
        typer.Option(
            "--migrate/--no-migrate",
            help="Move scales between activations and weights where that makes the error smaller.",
            show_default=_default("migrate"),
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    reorder: Annotated[
        str | None,
        typer.Option(
            metavar="folded|per_layer|none",
            help="One order of channels for all layers, or one a layer.",
            show_default=_default("reorder"),
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Spread outlier channels over all channels first.",
            show_default=_default("rotate"),
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    rotate_inner: Annotated[
        bool | None,
        typer.Option(
            "--rotate-inner/--no-rotate-inner",
            help="Rotate the inner channels of the MLP within their groups, at run time.",
            show_default=_default("rotate_inner"),
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(
            help="Steps of training that bring the rounding nearer to the float model.",
            min=0,
            show_default=f"{REFINE_STEPS} for a small model, else 0; 0 in w8a8",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Without refinement, as --refine 0.")] = False,
    head_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of the embedding and of the head: 8 or 16.",
            show_default=_default("head_bits"),
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            help="Parts into which the checkpoint is cut: as many devices can run it, or a divisor of it.",
            min=1,
            show_default="8, 4 or 2 where more than 15 billion weights are in the layers, else 1",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="4 or 16.", show_default=_default("kv_bits"), rich_help_panel=_CACHE)
    ] = None,
    kv_groups: Annotated[
        int | None,
        typer.Option(
            help="Scales a cached head has: 1 or 2.",
            show_default=_default("kv_groups"),
            rich_help_panel=_CACHE,
        ),
    ] = None,
    kv_rope: Annotated[
        str | None,
        typer.Option(
            metavar="pre|post",
            help="Quantize keys before or after RoPE.",
            show_default=_default("kv_rope"),
            rich_help_panel=_CACHE,
        ),
    ] = None,
    smooth_keys: Annotated[
        float | None,
        typer.Option(
            help="Even out key channels, from 0 (off) to 1; searched is for each kv head.",
            show_default=_default("smooth_keys"),
            rich_help_panel=_CACHE,
        ),
    ] = None,
    center_keys: Annotated[
        bool | None,
        typer.Option(
            "--center-keys/--no-center-keys",
            help="Remove the mean of the keys before INT4; needs --kv-bits 4 and --kv-rope post.",
            show_default=_default("center_keys"),
            rich_help_panel=_CACHE,
        ),
    ] = None,
    exact_sink: Annotated[
        bool | None,
        typer.Option(
            "--exact-sink/--no-exact-sink",
            help="Round the first token's key without an error; needs --center-keys.",
            show_default=_default("exact_sink"),
            rich_help_panel=_CACHE,
        ),
    ] = None,
    calib: CalibrationOption = None,
    calib_tokens: CalibrationTokensOption = 8192,
    seed: SeedOption = 0,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure perplexity on, before and after.",
            show_default="none",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of it to use.", rich_help_panel=DATA_PANEL)] = 8192,
    revision: RevisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Convert SRC (safetensors, PyTorch or GGUF) to a checkpoint in the folder OUT."""
    # The converter is imported after this, so that a wrong option is reported at once.
    if fast and refine:
        raise AtomError("--fast and --refine contradict each other; leave one out")
    if fast and has_setting(scheme, "refine"):
        refine = 0
    auto_outliers = num_outliers == "auto"
    changes = _given(
        group_size=group_size,
        num_outliers=None if num_outliers is None or auto_outliers else _outliers_option(num_outliers),
        clip_w=clip_w,
        clip_a=clip_a,
        gptq=gptq,
        migrate=migrate,
        reorder=reorder,
        rotate=rotate,
        rotate_inner=rotate_inner,
        refine=refine,
        head_bits=head_bits,
        shards=shards,
        kv_bits=kv_bits,
        kv_groups=kv_groups,
        kv_rope=kv_rope,
        smooth_keys=smooth_keys,
        center_keys=center_keys,
        exact_sink=exact_sink,
    )
    recipe = make_recipe(scheme, **changes)
    given = {"group_size": group_size, "num_outliers": num_outliers, "refine": refine, "shards": shards}
    flexible = tuple(name for name, value in given.items() if value is None and has_setting(scheme, name))

    from convert.pipeline import ConvertOptions
    from convert.pipeline import convert as run

    options = ConvertOptions(
        recipe=recipe,
        calibration=calib,
        calibration_tokens=calib_tokens,
        seed=seed,
        eval_text=eval_text,
        eval_tokens=eval_tokens,
        revision=revision,
        auto_outliers=auto_outliers,
        flexible=flexible,
    )
    with progress_bars() as report:
        card = run(src, out, options, report)
    for line in card.get("notes") or []:
        note(line)
    if json_output:
        print_json(card)
    else:
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        if chosen := card.get("job", {}).get("chosen"):
            settings = ", ".join(f"{_SETTINGS[name]} {value}" for name, value in chosen.items())
            note(f"chosen for this model: {settings}")
        if outliers := card.get("outliers"):
            errors = ", ".join(
                f"{number}: {error:.4f}" for number, error in outliers["relative_error"].items()
            )
            note(f"{outliers['chosen']} outliers chosen; relative error by their number: {errors}")
        if measured := card.get("perplexity"):
            note(
                f"perplexity of {eval_text}: {measured['before']:.4f} before, {measured['after']:.4f} after "
                f"({measured['ratio']:.4f} times), over {measured['tokens']} tokens"
            )
        note(f"{out}: {scheme} checkpoint, {format_bytes(size)}; details: atom-jax inspect {out}")


def _outliers_option(outliers: str) -> int:
    try:
        return int(outliers)
    except ValueError:
        raise AtomError(f"--num-outliers {outliers!r} is neither a number nor 'auto'") from None


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave. The others have the defaults of the library."""
    return {name: value for name, value in options.items() if value is not None}
