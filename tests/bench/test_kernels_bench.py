"""The GPU benchmark's program, run on a CPU with the reference: what it writes, and what errors do to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
import typer

from bench import kernels, record
from bench.gpu import progress, sweep, targets, timing
from bench.gpu.peers import peers
from pallas_kernels.roofline import H200, seconds
from pallas_kernels.tuning import winners
from pallas_kernels.verification import cases
from pallas_kernels.verification.cases import Case

MODEL = "SmolLM2-135M"


def few_cases() -> list[Case]:
    return [cases.matmul(MODEL, "o_proj", 24), cases.append(MODEL, 8)]


def results(path: Path) -> dict:
    return json.loads(path.read_text())["results"]


def broken_case(message: str = "the compiler refuses") -> Case:
    def call(*_):
        raise ValueError(message)

    return dataclasses.replace(cases.norm(MODEL, 8), function=call, shape="broken")


def test_writes_times_ratios_and_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "results" / "kernels.json"
    assert kernels.run(few_cases(), out, "reference", 1000, smoke=True)
    found = results(out)
    assert found["clock"] == "wall: the device is no GPU but cpu"
    assert found["ceilings"]["bytes_per_second"] > 0 and found["ceilings"]["bf16_ops_per_second"] > 0
    matmul, append = found["cases"]
    assert (matmul["op"], append["op"]) == ("grouped_matmul", "kv_append")
    for row in (matmul, append):
        assert row["seconds"] > 0 and row["clock"] == "wall" and "error" not in row
        assert row["of_copy"] == pytest.approx(
            row["bytes"] / row["seconds"] / found["ceilings"]["bytes_per_second"]
        )
    assert matmul["tops"] == pytest.approx(2 * 24 * 576 * 576 / matmul["seconds"] / 1e12)
    timed = {name: peer["seconds"] for name, peer in matmul["peers"].items()}
    assert "XLA bf16" in timed
    assert matmul["best_peer"] == min(timed, key=lambda name: timed[name])
    assert matmul["speedup"] == pytest.approx(min(timed.values()) / matmul["seconds"])
    assert list(append["peers"]) == ["XLA reference"]
    assert found["skipped"] == [] and found[progress.RUNNING] is None
    assert "o_proj 576x576 M=24" in capsys.readouterr().out


def test_an_error_is_recorded_and_the_run_goes_on(tmp_path: Path):
    out = tmp_path / "kernels.json"
    assert not kernels.run([broken_case(), cases.norm(MODEL, 8)], out, "reference", 1000, smoke=True)
    first, second = results(out)["cases"]
    assert first["error"] == "ValueError: the compiler refuses" and "seconds" not in first
    assert second["seconds"] > 0


def test_cases_out_of_time_are_listed(tmp_path: Path):
    out = tmp_path / "kernels.json"
    assert kernels.run(few_cases(), out, "reference", 0, smoke=True)
    found = results(out)
    assert found["cases"] == [] and found["skipped"] == [case.name for case in few_cases()]


def test_resumes_after_a_hang(tmp_path: Path):
    """The process that ended left one row and was working on another case."""
    out, hung, rest = tmp_path / "kernels.json", broken_case(), cases.norm(MODEL, 8)
    done = kernels.identity(cases.silu(MODEL, 8)) | {"error": "an earlier one", "peers": {}}
    document = {"results": {"cases": [done], progress.RUNNING: kernels.identity(hung)}}
    out.write_text(json.dumps(document))
    selected = [cases.silu(MODEL, 8), hung, rest]
    assert not kernels.run(selected, out, "reference", 1000, resume=True, smoke=True)
    first, second, third = results(out)["cases"]
    assert first == done
    assert second["case"] == hung.name and second["error"] == "the process hung or died"
    assert third["case"] == rest.name and third["seconds"] > 0


def test_stops_where_the_gpu_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "device_lost", lambda: True)
    out = tmp_path / "kernels.json"
    with pytest.raises(typer.Exit) as stopped:
        kernels.run([broken_case(), *few_cases()], out, "reference", 1000, smoke=True)
    assert stopped.value.exit_code == progress.DEVICE_LOST
    assert [row["error"] for row in results(out)["cases"]] == ["ValueError: the compiler refuses"]


@pytest.mark.slow
def test_order_and_costs_of_all_cases():
    ordered = kernels.ordered(cases.all_cases())
    assert len({case.name for case in ordered}) == len(ordered)
    wanted = [targets.has_target(case.op, case.model, case.shape) for case in ordered]
    # Four linears at M = 16, 64 and 4096, two row-wise ops, attention.
    assert sum(wanted) == 15 and all(wanted[:15])
    for case in ordered:
        assert 0 < seconds(case.cost, H200) < 0.01, case.name
    attention = cases.attention("Llama-3-8B", 128, 1, 2048).cost
    assert attention.bytes == 2 * 128 * 2048 * 8 * (64 + 8) + 2 * 128 * 32 * 128 * 2


def row(case: Case, seconds: float, of_copy: float, **peers: float) -> dict:
    timed = {name.replace("_", " "): {"seconds": value} for name, value in peers.items()}
    return kernels.identity(case) | {"seconds": seconds, "of_copy": of_copy, "peers": timed}


def test_targets_are_judged():
    decode = cases.matmul("Llama-3-8B", "qkv_proj", 16)
    prefill = cases.matmul("Llama-3-8B", "qkv_proj", 4096)
    other = cases.matmul("Llama-2-7B", "qkv_proj", 16)
    met = targets.check([row(decode, 1.0, 0.8, XLA_bf16=3.0, torch_bf16=2.9, torch_INT8=1.0)])
    assert met[0]["met"] is True and met[0]["speedup"] == 2.9  # INT8 is no bf16 peer
    missed = targets.check([row(decode, 1.0, 0.8, XLA_bf16=3.0, torch_bf16=2.7)])
    assert missed[0]["met"] is False
    slow = targets.check([row(decode, 1.0, 0.69, XLA_bf16=3.0)])
    assert slow[0]["met"] is False
    assert targets.check([row(prefill, 1.0, 0.1, XLA_bf16=1.3)])[0]["met"] is True
    assert targets.check([row(decode, 1.0, 0.8)])[0]["met"] is None
    assert targets.check([kernels.identity(decode) | {"error": "x", "peers": {}}])[0]["met"] is None
    assert targets.check([row(other, 1.0, 0.1, XLA_bf16=0.1)]) == []


def test_median_launch():
    assert timing._per_launch([1.0, 2.0, 1.0, 9.0, 1.0, 2.0], 3) == 3.0
    assert timing._per_launch([1.0, 2.0, 3.0], 2) == 3.0


def test_int8_peer_only_where_torch_has_it():
    torch = pytest.importorskip("torch")
    names = lambda rows: [peer.name for peer in peers(cases.matmul(MODEL, "o_proj", rows), torch)]  # noqa: E731
    assert "torch INT8" in names(24)
    assert "torch INT8" not in names(16)
    assert [peer.name for peer in peers(cases.matmul(MODEL, "o_proj", 24), None)] == ["XLA bf16"]


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration of the op below."""

    scale: float


@pytest.mark.parametrize(
    "case",
    [
        cases.matmul("Llama-3-8B", "o_proj", 16),
        cases.matmul("Llama-3-8B", "o_proj", 4096),
        cases.norm("Llama-3-8B", 64),
        cases.attention_output("Llama-3-8B", 64),
        cases.silu("Llama-3-8B", 64),
        cases.attention("Llama-3-8B", 16, 1, 2048),
        cases.attention("Llama-3-8B", 1, 512, 2048),
    ],
    ids=lambda case: case.name,
)
def test_kernels_offer_configurations_to_sweep(case: Case):
    default, *others = sweep.configs(case)
    assert others and len({default, *others}) == 1 + len(others)
    assert {type(config) for config in others} == {type(default)}


def test_sweep_takes_the_fastest_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Protocol of a tunable op, with the reference in the place of a kernel."""
    from pallas_kernels.silu_quantize import reference
    from pallas_kernels.silu_quantize.call import Call

    tried: list[float] = []

    def run(call: Call, config: Config):
        tried.append(config.scale)
        if config.scale == 3:
            raise ValueError("too much shared memory")
        return original(call._replace(gate_up=call.gate_up * jnp.bfloat16(config.scale)))

    original = reference.run
    monkeypatch.setattr(sweep, "IMPLEMENTATION", "reference")
    offered = [Config(1), Config(2), Config(3)]
    monkeypatch.setattr(reference, "configs", lambda call: offered, raising=False)
    times = iter([2e-6, 1e-6])
    monkeypatch.setattr(reference, "run", run)
    clock = timing.Clock("fake")
    monkeypatch.setattr(clock, "measure", lambda program: timing.Timing(next(times), "fake", 1.0, 1, None))
    out = tmp_path / "h200.json"
    sweep.sweep_cases([cases.silu(MODEL, 8), cases.norm(MODEL, 8)], clock, 1000, out)
    (entry,) = json.loads(out.read_text())["entries"]
    assert list(dict.fromkeys(tried)) == [1, 2, 3]  # the first when the cost is counted, too
    assert entry["winner"] == {"config": {"scale": 2}, "seconds": 1e-6}
    assert "too much shared memory" in entry["tried"][2]["error"]


def test_results_are_kept_by_gpu():
    assert record.gpu_results("NVIDIA H100 80GB HBM3") == record.RESULTS / "h100"
    assert winners.path("NVIDIA H200") == winners.FOLDER / "h200.json"
