"""The page and the plot that are made of a kernel benchmark's JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench import kernels, plot_kernels
from bench.gpu import targets
from pallas_kernels.verification import cases


def result() -> dict[str, Any]:
    """As bench.kernels writes it: two measured cases, one failed, one not reached."""
    rows: list[dict[str, Any]] = []
    for case in (cases.matmul(plot_kernels.MODEL, "qkv_proj", 16), cases.norm(plot_kernels.MODEL, 16)):
        work = case.cost
        rows.append(
            kernels.identity(case)
            | dataclasses.asdict(work)
            | {"seconds": 5e-6, "tb_per_second": 2.5, "of_copy": 0.6, "tops": work.int8_ops / 5e-6 / 1e12}
            | {"peers": {"XLA bf16": {"seconds": 1.5e-5}}, "best_peer": "XLA bf16", "speedup": 3.0}
        )
    rows.append(
        {"case": "broken", "op": "quantize", "model": "x", "shape": "y", "error": "E: no", "peers": {}}
    )
    return {
        "environment": {
            "device": "NVIDIA H200",
            "gpu": {"driver_version": "1.2"},
            "versions": {"jax": "0.11.2"},
            "commit": "abc",
        },
        "results": {
            "clock": "kernels (CUPTI)",
            "torch": "2.11",
            "ceilings": {"bytes_per_second": 4.3e12, "bf16_ops_per_second": 780e12},
            "cases": rows,
            "targets": targets.check(rows),
            "skipped": ["another"],
        },
    }


def test_page(tmp_path: Path):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(result()))
    plot_kernels.main(path, tmp_path)
    page = (tmp_path / plot_kernels.PAGE_NAME).read_text()
    assert "NVIDIA H200, driver 1.2, jax 0.11.2, torch 2.11, commit abc." in page
    assert "copy 4.30 TB/s (both directions), bfloat16 matmul 780 TFLOP/s" in page
    name = "grouped_matmul Llama-3-8B qkv_proj 6144x4096 M=16"
    assert f"| decode matmul | {name} | 60% | 70% | 3.00x | 2.80x | no |" in page
    assert f"| {name} | 5.0 | 2.50 | 60% | 161 | XLA bf16 | 3.00x |" in page
    assert "| norm_quantize Llama-3-8B K=4096 M=16 | 5.0 | 2.50 | 60% |  | XLA bf16 | 3.00x |" in page
    assert "- broken: E: no" in page and "Not reached in time: 1 cases." in page
    assert (plot_kernels.PLOT in page) == (tmp_path / plot_kernels.PLOT).exists()


def test_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    plot_kernels.plot(result(), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
