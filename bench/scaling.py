"""Predicts decoding on several GPUs and hosts, and writes the prediction into the documentation.

    python -m bench.scaling      # a minute on a CPU; needs no GPU and no weights

Writes bench/results/scaling.json and the tables of docs/scaling.md. ``bench.scaling_model`` has
the formulas, rates and latencies. Nothing of it was measured on more than one GPU.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from atom_jax.config import ModelConfig, preset
from bench import scaling_model as model
from bench.markdown import table_row, with_table
from bench.models import llama_3_8b, llama_3_70b
from bench.record import DOCS, RESULTS, write_json
from bench.scaling_model import H100, KERNEL_SECONDS, NETWORK, NVLINK, USABLE_BYTES, Link

RESULT = RESULTS / "scaling.json"
PAGE = DOCS / "scaling.md"
MODELS = {"Llama-3-8B": llama_3_8b, "Llama-3-70B": llama_3_70b}
SCHEMES = ("bf16", "w8a8", "w4a16", "w3a16", "w4a8kv4", "w4a4kv4")
BATCHES, CONTEXT = (16, 64), 2048
DEVICES, HOSTS = (1, 2, 4, 8), (1, 2, 4, 8, 16)
MEASURED = RESULTS / "h100" / "generate.json"
Row = dict[str, Any]


def config_of(name: str, scheme: str, devices: int) -> ModelConfig:
    """A checkpoint of so many shards as there are devices."""
    return MODELS[name](preset(scheme, shards=devices))


def step_row(name: str, scheme: str, batch: int, devices: int, context: int = CONTEXT) -> Row:
    """The prediction of one step: milliseconds, tokens per second, GB of a device and whether they fit."""
    config = config_of(name, scheme, devices)
    time = model.step_time(config, batch=batch, context=context, devices=devices)
    weights, cache = model.bytes_of_device(config, batch=batch, context=context, devices=devices)
    return {
        "model": name,
        "scheme": scheme,
        "batch": batch,
        "devices": devices,
        "roofline_ms": 1e3 * time.roofline,
        "kernels_ms": 1e3 * time.kernels,
        "collectives_ms": 1e3 * time.collectives,
        "step_ms": 1e3 * time.total,
        "tokens_per_second": batch / time.total,
        "weights_gb": weights / 1e9,
        "cache_gb": cache / 1e9,
        "fits": weights + cache <= USABLE_BYTES,
    }


def host_rows(steps: list[Row]) -> Iterator[Row]:
    """Tokens per second of 1 to 16 hosts full of replicas of the size that gives the most.

    A replica has the batch for itself. The router costs nothing, so hosts add up.
    """
    for name in MODELS:
        for scheme in SCHEMES:
            found = [row for row in steps if (row["model"], row["scheme"]) == (name, scheme)]
            fitting = [row for row in found if row["batch"] == max(BATCHES) and row["fits"]]
            rates = {
                row["devices"]: row["tokens_per_second"] * model.GPUS_OF_A_HOST / row["devices"]
                for row in fitting
                if row["devices"] <= model.GPUS_OF_A_HOST
            }
            best = max(rates, key=lambda devices: rates[devices])
            alone = next(row for row in fitting if row["devices"] == model.GPUS_OF_A_HOST)
            yield {
                "model": name,
                "scheme": scheme,
                "replica_devices": best,
                "tokens_per_second": {str(hosts): hosts * rates[best] for hosts in HOSTS},
                "one_group_of_a_host_step_ms": alone["step_ms"],
                "two_hosts_as_one_group": step_row(name, scheme, max(BATCHES), 2 * model.GPUS_OF_A_HOST),
            }


def sum_rows() -> Iterator[Row]:
    """Bytes that a GPU sends for each token in each layer, and from how many tokens scattering pays."""
    for name, scheme in itertools.product(MODELS, ("w8a8", "w4a4kv4")):
        for devices in DEVICES[1:]:
            config = config_of(name, scheme, devices)

            def sent(way: model.Way, config: ModelConfig = config, devices: int = devices) -> float:
                # The bytes of a share of tokens are whole numbers for as many tokens as there are devices.
                layer = model.layer_collectives(config, way, tokens=devices, devices=devices, float_bytes=2)
                return sum(model.sent_bytes(each, devices) for each in layer) / devices

            yield {
                "model": name,
                "scheme": scheme,
                "devices": devices,
                "psum": sent("psum"),
                "fixed_order": sent("fixed order"),
                "scattered": sent("scattered"),
                "scattering_pays_from": model.scattering_pays_from(config, devices, NVLINK),
            }


def measured_rows() -> Iterator[Row]:
    """The prediction for Llama-3-8B on one GPU beside what ``bench.gpu_generate`` measured on one."""
    found = json.loads(MEASURED.read_text())["results"]
    context = found["plan"]["context"] + found["plan"]["steps"]  # for which its cache has room
    for figure in found["figures"]:
        if figure["kind"] == "decode" and "ms_per_step" in figure:
            row = step_row("Llama-3-8B", figure["scheme"], figure["batch"], 1, context)
            wanted = ("scheme", "batch", "roofline_ms", "step_ms")
            yield {name: row[name] for name in wanted} | {"measured_ms": figure["ms_per_step"]}


def predict() -> Row:
    """Everything that the page shows."""
    steps = [
        step_row(name, scheme, batch, devices)
        for name in MODELS
        for scheme in SCHEMES
        for batch in BATCHES
        for devices in DEVICES
    ]
    return {
        "steps": steps,
        "hosts": list(host_rows(steps)),
        "sums": list(sum_rows()),
        "measured": list(measured_rows()),
    }


def assumptions_table() -> str:
    """The constants of the model."""

    def link(of: Link) -> tuple[str, str]:
        value = f"{of.bytes_per_second / 1e9:g} GB/s each way, {1e6 * of.latency:g} µs a collective"
        return of.name, value

    rows: list[tuple[str, ...]] = [
        ("", "Rate"),
        ("---", "---"),
        ("memory of an H100 SXM", f"{H100.bytes_per_second / 1e12:g} TB/s"),
        (
            "its tensor cores",
            f"{H100.int8_ops_per_second / 1e12:g} TOP/s INT8, {H100.bf16_ops_per_second / 1e12:g} TFLOP/s",
        ),
        ("weights and cache that fit it", f"{USABLE_BYTES / 1e9:g} GB"),
        ("a kernel, beyond its roofline", f"{1e6 * KERNEL_SECONDS:g} µs"),
        link(NVLINK),
        link(NETWORK),
    ]
    return _table(rows)


def measured_table(found: list[Row]) -> str:
    """Prediction and measurement of one GPU."""
    rows: list[tuple[str, ...]] = [
        ("Llama-3-8B on one H100", "Batch", "Roofline, ms", "Predicted, ms", "Measured, ms"),
        ("---", "---:", "---:", "---:", "---:"),
    ]
    for row in found:
        times = (f"{row[name]:.2f}" for name in ("roofline_ms", "step_ms", "measured_ms"))
        rows.append((row["scheme"], str(row["batch"]), *times))
    return _table(rows)


def step_table(found: list[Row]) -> str:
    """Step time, of which collectives, and tokens per second at each number of GPUs."""
    heads = [f"{devices} GPU{'s' if devices > 1 else ''}" for devices in DEVICES]
    rows: list[tuple[str, ...]] = [
        ("Model", "Scheme", "Batch", *heads),
        ("---", "---", "---:", *["---:"] * len(DEVICES)),
    ]
    for first in found:
        if first["devices"] != DEVICES[0]:
            continue
        key = ("model", "scheme", "batch")
        cells = [row for row in found if all(row[name] == first[name] for name in key)]
        rows.append((first["model"], first["scheme"], str(first["batch"]), *map(_step_cell, cells)))
    return _table(rows)


def _step_cell(row: Row) -> str:
    if not row["fits"]:
        return "does not fit"
    return f"{row['step_ms']:.1f} ({row['collectives_ms']:.1f}), {row['tokens_per_second']:,.0f}"


def memory_table(found: list[Row]) -> str:
    """Weights and cache of a GPU."""
    heads = [f"{devices} GPU{'s' if devices > 1 else ''}" for devices in DEVICES]
    rows: list[tuple[str, ...]] = [("Model", "Scheme", *heads), ("---", "---", *["---:"] * len(DEVICES))]
    for name in MODELS:
        for scheme in SCHEMES:
            cells = [
                f"{row['weights_gb']:.1f} + {row['cache_gb']:.1f}"
                for row in found
                if (row["model"], row["scheme"], row["batch"]) == (name, scheme, max(BATCHES))
            ]
            rows.append((name, scheme, *cells))
    return _table(rows)


def hosts_table(found: list[Row]) -> str:
    """Throughput of replicas on hosts, and one group of 8 GPUs against one of 16."""
    rows: list[tuple[str, ...]] = [
        (
            *("Model", "Scheme", "GPUs of a replica"),
            *(f"{hosts} host{'s' if hosts > 1 else ''}" for hosts in HOSTS),
            "Step of 8 GPUs, ms",
            "Step of 16, ms",
        ),
        ("---", "---", *["---:"] * (len(HOSTS) + 3)),
    ]
    for row in found:
        rates = (f"{row['tokens_per_second'][str(hosts)]:,.0f}" for hosts in HOSTS)
        times = (row["one_group_of_a_host_step_ms"], row["two_hosts_as_one_group"]["step_ms"])
        cells = (f"{time:.1f}" for time in times)
        rows.append((row["model"], row["scheme"], str(row["replica_devices"]), *rates, *cells))
    return _table(rows)


def sums_table(found: list[Row]) -> str:
    """Bytes sent for a token, by the way in which sums are made."""
    rows: list[tuple[str, ...]] = [
        (
            "Model",
            "Scheme",
            "GPUs",
            "`psum`, bfloat16",
            "Fixed order, float32",
            "Scattered",
            "Pays from, tokens",
        ),
        ("---", "---", "---:", "---:", "---:", "---:", "---:"),
    ]
    for row in found:
        sent = (f"{row[way]:,.0f}" for way in ("psum", "fixed_order", "scattered"))
        pays = f"{row['scattering_pays_from']:,}"
        rows.append((row["model"], row["scheme"], str(row["devices"]), *sent, pays))
    return _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(table_row(*cells) for cells in rows) + "\n"


def with_tables(page: str, found: Row) -> str:
    """The page with the tables of a prediction."""
    tables = {
        "assumptions": assumptions_table(),
        "measured": measured_table(found["measured"]),
        "memory": memory_table(found["steps"]),
        "steps": step_table(found["steps"]),
        "hosts": hosts_table(found["hosts"]),
        "sums": sums_table(found["sums"]),
    }
    for name, text in tables.items():
        page = with_table(page, f"scaling: {name}", text)
    return page


def main() -> None:
    """Predicts, and writes the JSON and the page."""
    found = predict()
    write_json(RESULT, found)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{RESULT}, {PAGE}")


if __name__ == "__main__":
    main()
