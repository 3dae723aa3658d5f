"""``atom-jax convert``: from an original model to a quantized checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from atom_jax.cli.console import JsonOption, format_bytes, note, print_json, progress_bars
from atom_jax.errors import AtomError

# What a setting that was chosen is called.
_SETTINGS = {"group_size": "groups of", "num_outliers": "number of outliers"}
_WEIGHTS, _CACHE, _DATA = "Weights and activations", "KV cache", "Data and evaluation"


class Reorder(StrEnum):
    """Where the order of input channels is applied."""

    FOLDED = "folded"
    PER_LAYER = "per_layer"
    NONE = "none"


class KvRope(StrEnum):
    """Whether keys are quantized before or after the rotary embedding."""

    PRE = "pre"
    POST = "post"


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
        str, typer.Option(help="w4a4kv4 (Atom), w4a8kv4, w4a16, w8a8 or bf16 (not quantized).")
    ] = "w4a4kv4",
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Channels that share a scale: 32, 64 or 128; if not given, 128 where that suits the model.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    num_outliers: Annotated[
        str | None,
        typer.Option(
            help="Channels kept in 8 bits; if not given, 128 where that suits the model; "
            "auto keeps as few as the activations allow.",
            metavar="INTEGER|auto",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    clip_w: Annotated[
        float | None,
        typer.Option(
            help="Clipping of weights, (0, 1]; w4a4kv4 searches it for each group and output channel "
            "if not given.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    clip_a: Annotated[
        float | None, typer.Option(help="Clipping of activations, (0, 1].", rich_help_panel=_WEIGHTS)
    ] = None,
    gptq: Annotated[
        bool | None,
        typer.Option("--gptq/--no-gptq", help="Compensate rounding errors.", rich_help_panel=_WEIGHTS),
    ] = None,
    migrate: Annotated[
        bool | None,
        typer.Option(
            "--migrate/--no-migrate",
            help="Move scales between activations and weights where that makes the error smaller.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    reorder: Annotated[
        Reorder | None,
        typer.Option(help="One order of channels for all layers, or one a layer.", rich_help_panel=_WEIGHTS),
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Spread hot channels over all of them first.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    kv_bits: Annotated[int | None, typer.Option(help="4 or 16.", rich_help_panel=_CACHE)] = None,
    kv_groups: Annotated[
        int | None, typer.Option(help="Scales a cached head has: 1 or 2.", rich_help_panel=_CACHE)
    ] = None,
    kv_rope: Annotated[
        KvRope | None,
        typer.Option(help="Quantize keys before or after RoPE.", rich_help_panel=_CACHE),
    ] = None,
    smooth_keys: Annotated[
        float | None,
        typer.Option(
            help="Even out key channels, from 0 (off) to 1; searched for each kv head if not given.",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    center_keys: Annotated[
        bool | None,
        typer.Option(
            "--center-keys/--no-center-keys",
            help="Remove the mean of the keys before INT4; needs --kv-bits 4 and --kv-rope post.",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a file (text or JSON Lines) or an org/name data set; "
            "built-in English and text sampled from the model if not given, 'sampled' for the latter alone.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    calib_tokens: Annotated[
        int | None, typer.Option(help="Tokens to calibrate on.", rich_help_panel=_DATA)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of sampled text.", min=0, max=2**32 - 1, rich_help_panel=_DATA)
    ] = 0,
    eval_text: Annotated[
        Path | None,
        typer.Option(help="Text to measure perplexity on, before and after.", rich_help_panel=_DATA),
    ] = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Tokens of it to use.", rich_help_panel=_DATA)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Convert SRC (safetensors, PyTorch or GGUF) to a checkpoint in the folder OUT."""
    # First what needs no JAX, so that a wrong option is answered at once.
    from atom_jax.config import FIXED, preset

    auto_outliers = num_outliers == "auto"
    changes = _given(
        group_size=group_size,
        num_outliers=None if num_outliers is None or auto_outliers else _number(num_outliers),
        clip_w=clip_w,
        clip_a=clip_a,
        gptq=gptq,
        migrate=migrate,
        reorder=None if reorder is None else reorder.value,
        rotate=rotate,
        kv_bits=kv_bits,
        kv_groups=kv_groups,
        kv_rope=None if kv_rope is None else kv_rope.value,
        smooth_keys=smooth_keys,
        center_keys=center_keys,
    )
    quantization = preset(scheme, **changes)
    given = {"group_size": group_size, "num_outliers": num_outliers}
    flexible = tuple(name for name, value in given.items() if value is None and name not in FIXED[scheme])

    from convert.pipeline import ConvertOptions
    from convert.pipeline import convert as run

    options = ConvertOptions(
        quantization=quantization,
        calibration=calib,
        seed=seed,
        eval_text=eval_text,
        revision=revision,
        auto_outliers=auto_outliers,
        flexible=flexible,
        **_given(calibration_tokens=calib_tokens, eval_tokens=eval_tokens),
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
            note(f"chosen to suit every linear: {settings}")
        if outliers := card.get("outliers"):
            errors = ", ".join(
                f"{number}: {error:.4f}" for number, error in outliers["relative_error"].items()
            )
            note(f"{outliers['chosen']} outliers chosen; relative error by their number: {errors}")
        note(f"{out}: {scheme} checkpoint, {format_bytes(size)}; details: atom-jax inspect {out}")


def _number(outliers: str) -> int:
    try:
        return int(outliers)
    except ValueError:
        raise AtomError(f"--num-outliers {outliers!r} is neither a number nor 'auto'") from None


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the others keep the defaults of the library."""
    return {name: value for name, value in options.items() if value is not None}
