"""Tables and plot of the benchmarks of engine and server, and their places in the documentation."""

import json
import shutil

import pytest

from bench import serving_report as report
from bench.markdown import with_table

ENVIRONMENT = {"gpu": None, "cpu": "a CPU", "cores": 2, "load_before": 0.04, "commit": "abc"}
ENVIRONMENT |= {"versions": {"jax": "0.10.2"}}
ENGINE = [
    {"value": 0.04, "ms": [{"step": 400.0, "host_cpu": 3.0}, {"step": 200.0, "host_cpu": 2.0}]},
    {"value": 4.0, "at_once_tokens_per_second": 80.0, "one_by_one_tokens_per_second": 20.0},
    {"value": 8.0, "seconds_new": [5.0, 4.0], "seconds_repeated": [0.5, 0.6]},
]
ROW = {
    "weight_bytes": 269e6,
    "num_pages": 14,
    "load": "4 clients",
    "tokens_per_second": 47.06,
    "mean_running": 3.7,
    "ttft_seconds": {"p50": 0.42, "p95": 1.0, "p99": 2.0},
    "tpot_seconds": {"p50": 0.076, "p95": 0.1, "p99": 0.2},
}
SERVING = {
    "environment": ENVIRONMENT,
    "settings": {"dataset": None, "max_total": 192, "requests": 32, "memory_gb": 0.29},
    "results": [
        ROW | {"scheme": "bf16"},
        ROW | {"scheme": "w8a8", "weight_bytes": 164e6, "num_pages": 85},
        ROW | {"scheme": "w4a4kv4", "weight_bytes": 122e6, "num_pages": 364, "tokens_per_second": 94.12},
        ROW | {"scheme": "w4a4kv4", "weight_bytes": 122e6, "load": "0.8 requests/s"},
    ],
}
SOAK = {
    "requests": {"whole": 1500, "half_sent": 500},
    "clients": 64,
    "seconds": 28.2,
    "wrong": [],
    "free_pages": [72.0, 72.0],
    "preemptions": 3.0,
    "prefix_cache_hit_ratio": 0.17,
    "resident_bytes": [1e8, 2e8, 2.01e8],
    "exit_status": 0,
    "model": {"scheme": "w4a4kv4", "layers": 30, "hidden_size": 576},
    "batch": {"requests": 200, "results_at_kills": [50, 101], "lost": 0, "repeated": 0, "wrong": 0},
}
FOUND = {
    "engine": {"environment": ENVIRONMENT, "results": {"figures": ENGINE}},
    "serving": SERVING,
    "soak": {"environment": ENVIRONMENT, "results": SOAK},
}


@pytest.fixture
def docs(tmp_path):
    """A copy of the pages."""
    for name in ("serving.md", "server.md"):
        shutil.copy(report.DOCS / name, tmp_path)
    return tmp_path


def test_pages_get_the_tables_of_what_was_measured(docs, tmp_path, capsys):
    for name, found in FOUND.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    for _ in range(2):  # the second time in the place of the first tables
        report.main(results=tmp_path, docs=docs)
    serving, server = ((docs / name).read_text(encoding="utf-8") for name in ("serving.md", "server.md"))
    for text, page in (
        ("a CPU, 2 cores, load 0.0 before, jax 0.10.2, commit abc. Each figure is from the", serving),
        ("of a decode step of 32 sequences (200 ms) | < 5% | 0.0% |", serving),
        ("| Everything that the engine's thread computes in such a step |  | 2.0 ms, 1.0% |", serving),
        ("at once (80.0 tokens/s), over one by one (20.0 tokens/s) | 3x | 4.0x |", serving),
        ("of 1,000 tokens (4.0 s), over the same prompt again (0.50 s) | 5x | 8.0x |", serving),
        ("0.29 GB for weights (bf16 0.27 GB, w8a8 0.16 GB, w4a4kv4 0.12 GB) and cache.", serving),
        ("| bf16 | 14 | 4 clients | 47.1 | 1.00x | 3.7 | 0.4 / 1.0 / 2.0 | 76 / 100 / 200 |", serving),
        ("| w8a8 | 85 | 4 clients | 47.1 | 1.00x | 3.7 |", serving),
        ("| w4a4kv4 | 364 | 4 clients | 94.1 | 2.00x | 3.7 |", serving),
        ("| w4a4kv4 | 14 | 0.8 requests/s | 47.1 |  | 3.7 |", serving),
        ("| Model | w4a4kv4, 30 layers, 576 channels |", server),
        ("| 2,000 requests from 64 clients | 1500 whole, 500 half sent |", server),
        ("| Free pages before and after | 72, 72 |", server),
        ("| Memory halfway and at the end | 200 MB, 201 MB |", server),
        ("| Batch of 200, killed with so many results | 50, 101 |", server),
    ):
        assert page.count(text) == 1, text
    assert "Not measured yet" not in serving + server
    assert serving.startswith("# How do I serve a model?") and server.startswith("# How do I run the server?")


def test_what_was_not_measured_keeps_its_place(docs, tmp_path, capsys):
    before = [(docs / name).read_text(encoding="utf-8") for name in ("serving.md", "server.md")]
    report.main(results=tmp_path, docs=docs)
    assert [(docs / name).read_text(encoding="utf-8") for name in ("serving.md", "server.md")] == before
    assert "serving.json is not there: run python -m bench.serving" in capsys.readouterr().out


def test_page_without_a_place():
    with pytest.raises(ValueError, match=r"no place for the table of bench\.soak"):
        with_table("# Server\n", "soak", "table")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(SERVING, tmp_path / report.PLOT)
    drawn = (tmp_path / report.PLOT).read_text()
    assert "w4a4kv4" in drawn and "0.8 requests/s" in drawn
