"""The model of several GPUs: its formulas, and that the page shows the saved prediction."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest

from bench import scaling
from bench import scaling_model as model
from bench.aot.hlo import Collective
from bench.scaling_model import H100, NETWORK, NVLINK, Link

FREE = Link("free", math.inf, 0.0)


def step(scheme: str = "w4a4kv4", devices: int = 8, batch: int = 16, context: int = 2048) -> model.StepTime:
    config = scaling.config_of("Llama-3-70B", scheme, devices)
    return model.step_time(config, batch=batch, context=context, devices=devices)


def test_tables_are_those_of_the_saved_prediction() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.with_tables(page, json.loads(scaling.RESULT.read_text())) == page


@pytest.mark.parametrize(("scheme", "batch", "devices"), [("w4a4kv4", 64, 8), ("bf16", 16, 4)])
def test_the_saved_prediction_is_that_of_the_code(scheme: str, batch: int, devices: int) -> None:
    row = scaling.step_row("Llama-3-70B", scheme, batch, devices)
    steps = json.loads(scaling.RESULT.read_text())["steps"]
    (saved,) = [
        old for old in steps if all(old[key] == row[key] for key in ("model", "scheme", "batch", "devices"))
    ]
    assert saved.keys() == row.keys()
    for key, value in row.items():
        assert saved[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)


def test_saved_sums_are_those_of_the_code() -> None:
    assert json.loads(scaling.RESULT.read_text())["sums"] == list(scaling.sum_rows())


def test_one_device_sends_nothing() -> None:
    assert step(devices=1).collectives == 0
    assert model.collective_seconds([Collective("all-reduce", 100)], 1, NVLINK) == 0


@pytest.mark.parametrize("devices", [2, 4, 8, 16])
def test_sent_bytes(devices: int) -> None:
    """A sum is a reduce-scatter and a gather, whose results are a share and everything."""
    share, everything = Collective("reduce-scatter", 1000), Collective("all-gather", 1000 * devices)
    sent = model.sent_bytes(share, devices) + model.sent_bytes(everything, devices)
    assert model.sent_bytes(Collective("all-reduce", 1000 * devices), devices) == pytest.approx(sent)
    assert sent == pytest.approx(2 * (devices - 1) * 1000)
    assert model.sent_bytes(Collective("collective-permute", 1000), devices) == 1000
    with pytest.raises(ValueError, match="no model of all-to-all"):
        model.sent_bytes(Collective("all-to-all", 1), devices)


def test_collectives_take_latency_and_bytes_over_rate() -> None:
    sums = [Collective("all-reduce", 8_000_000)] * 3
    assert model.collective_seconds(sums, 8, FREE) == 0
    assert model.collective_seconds(sums, 8, NVLINK) == pytest.approx(3 * (10e-6 + 14e6 / 450e9))
    assert model.collective_seconds([Collective("all-reduce", 0)], 8, NETWORK) == 20e-6


def test_the_roofline_is_that_of_the_weights_where_there_is_little_else() -> None:
    """One sequence with a short context: weights of the layers and of the head, read once."""
    config = scaling.config_of("Llama-3-70B", "bf16", 8)
    roofline, _ = model.part_times(config.part(8), 1, 64)
    weights, _ = model.bytes_of_device(config, batch=1, context=64, devices=8)
    embedding = config.part(8).vocab_size * config.hidden_size * 2  # of which one row is read
    assert roofline == pytest.approx((weights - embedding) / H100.bytes_per_second, rel=0.01)


def test_more_of_anything_takes_longer() -> None:
    steps = [step(devices=devices) for devices in (1, 2, 4, 8)]
    assert all(a.roofline > b.roofline for a, b in itertools.pairwise(steps))
    assert all(a.total > b.total for a, b in itertools.pairwise(steps))
    assert all(a.collectives < b.collectives for a, b in itertools.pairwise(steps))
    # As many kernels on each device, for smaller parts; two sums a layer have two each.
    assert [each.kernels for each in steps[1:]] == [steps[1].kernels] * 3
    assert steps[1].kernels - steps[0].kernels == pytest.approx(80 * 2 * 2 * model.KERNEL_SECONDS)
    assert step(batch=64).total > step(batch=16).total > step(batch=16, context=1024).total
    assert step("bf16").roofline > step("w8a8").roofline > step("w4a4kv4").roofline


def test_a_group_over_the_network_is_slower() -> None:
    host, two = step(batch=64), step(batch=64, devices=16)
    assert two.roofline < host.roofline and two.collectives > 2 * host.collectives


def test_scattering_pays_where_the_times_cross() -> None:
    config = scaling.config_of("Llama-3-70B", "w4a4kv4", 8)
    crossing = model.scattering_pays_from(config, 8, NVLINK)
    assert crossing % 8 == 0

    def time(way: model.Way, tokens: int) -> float:
        layer = model.layer_collectives(config, way, tokens=tokens, devices=8, float_bytes=2)
        return model.collective_seconds(layer, 8, NVLINK)

    assert time("scattered", crossing) <= time("psum", crossing)
    assert time("scattered", crossing - 8) > time("psum", crossing - 8)
    # 2 latencies = 2 × 7/8 × tokens × (2 × 8192 - bytes of a packed row) / rate
    row = (8192 - 128) // 2 + 128 + 4 * 64
    assert crossing == pytest.approx(10e-6 * 450e9 * 8 / 7 / (2 * 8192 - row), abs=8)
    assert model.scattering_pays_from(config, 8, dataclasses.replace(NVLINK, latency=0.0)) == 8


def test_what_the_page_says_of_its_tables() -> None:
    found = json.loads(scaling.RESULT.read_text())
    small = [row for row in found["steps"] if (row["model"], row["batch"]) == ("Llama-3-8B", 16)]
    one, two, *_ = (row["step_ms"] for row in small if row["scheme"] == "w4a4kv4")
    assert two > one
    for row in found["hosts"]:
        assert row["two_hosts_as_one_group"]["step_ms"] > row["one_group_of_a_host_step_ms"]
        keys = ("model", "scheme")
        fits = [
            step["devices"]
            for step in found["steps"]
            if step["fits"] and step["batch"] == 64 and all(step[key] == row[key] for key in keys)
        ]
        assert row["replica_devices"] == min(fits)
    assert all(row["measured_ms"] > row["step_ms"] for row in found["measured"])
    pays = {(row["model"], row["devices"]): row["scattering_pays_from"] for row in found["sums"]}
    assert 400 < pays["Llama-3-70B", 8] < pays["Llama-3-70B", 4] < 512 < pays["Llama-3-8B", 8] < 900


def test_hosts_add_up() -> None:
    for row in json.loads(scaling.RESULT.read_text())["hosts"]:
        rates = row["tokens_per_second"]
        assert all(rates[str(hosts)] == pytest.approx(hosts * rates["1"]) for hosts in scaling.HOSTS)
