"""``atom-jax doctor``, and the check of the kernels by everything that loads a model."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import warnings
from typing import Any

import jax
import pytest

import atom_jax
from atom_jax import compilation_cache, doctor
from atom_jax.engine import EngineConfig
from atom_jax.kernel_check import check_kernels
from atom_jax.schemes import SCHEMES
from atom_jax_cli.engine import load_engine
from pallas_kernels import devices, use_implementation
from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from pallas_kernels.verification import device, verdicts, verify
from pallas_kernels.verification.checks import all_checks
from pallas_kernels.verification.verdicts import FAILED, GOOD, UNCHECKED
from pallas_kernels.verification.verify import Result
from tests.atom_jax.command import PROMPT, ROOT, fails, run, run_json
from tests.pallas_kernels.verification.fake_child import command
from tests.pallas_kernels.verification.hopper import DEVICE, KERNEL, children, forgotten, hopper

ENGINE = EngineConfig(page_size=16, max_num_seqs=1, max_model_len=64, token_budget=32, prefix_caching=False)


def failed(op: str) -> Result:
    return Result(FAILED, "hang: no result within 20 s")


@pytest.fixture
def on_hopper(tmp_path):
    """A Hopper GPU all of whose kernels fail, so that the reference runs, on the CPU that is there."""
    with hopper(tmp_path / "cache"), children(failed) as asked:
        yield asked


class TestLoading:
    def test_load_checks_the_kernels_once_and_warns_once(self, checkpoint, on_hopper, capsys):
        with pytest.warns(RuntimeWarning, match=r"kv_append.* failed the check.*`atom-jax doctor`") as caught:
            atom_jax.load(checkpoint)
        assert len(caught) == 1
        assert on_hopper == [list(all_checks())]
        (line,) = capsys.readouterr().err.splitlines()
        assert DEVICE in line and "checking the GPU kernels" in line
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            atom_jax.load(checkpoint)
        assert len(on_hopper) == 1 and capsys.readouterr().err == ""
        with forgotten(), pytest.warns(RuntimeWarning, match="failed the check"):  # another process
            atom_jax.load(checkpoint)
        assert len(on_hopper) == 1 and capsys.readouterr().err == ""

    def test_good_kernels_are_no_news(self, checkpoint, tmp_path, capsys):
        with hopper(tmp_path), children(lambda op: Result(GOOD, "")), warnings.catch_warnings():
            warnings.simplefilter("error")
            atom_jax.load(checkpoint)
            assert verdicts.objection(DEVICE, "kv_append", KERNEL) is None
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_nothing_is_checked_on_a_cpu(self, checkpoint, capsys):
        with children(failed) as asked:
            atom_jax.load(checkpoint)
        assert asked == [] and capsys.readouterr().err == ""

    def test_nothing_is_checked_if_the_user_said_so(self, checkpoint, on_hopper, monkeypatch):
        with use_implementation("reference"):
            atom_jax.load(checkpoint)
        with use_implementation(KERNEL):
            assert check_kernels() is None
        monkeypatch.setenv("ATOM_JAX_VERIFY", "0")
        atom_jax.load(checkpoint)
        assert on_hopper == []

    def test_generate_says_so_and_runs_the_reference(self, checkpoint, on_hopper):
        result = run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 2)
        lines = result.stderr.splitlines()
        assert sum("checking the GPU kernels" in line for line in lines) == 1
        assert sum("failed the check" in line for line in lines) == 1
        assert next(line for line in lines if "failed the check" in line).startswith(
            "warning: GPU kernels on"
        )
        assert any(line.startswith("kernel checks: ") for line in lines)
        assert result.stdout.strip() and len(on_hopper) == 1
        again = run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 2)
        assert again.stdout == result.stdout and "kernels" not in again.stderr

    def test_a_missing_checkpoint_does_not_wait_for_the_check(self, tmp_path, on_hopper):
        fails("generate", tmp_path / "none", "--prompt", PROMPT, parts=["none"])
        assert on_hopper == []

    def test_serve_and_batch_check_before_they_compile(self, checkpoint, on_hopper, capsys, monkeypatch):
        # It would stay on for the tests that follow.
        monkeypatch.setattr(compilation_cache, "enable_compilation_cache", lambda: None)
        _, engine = load_engine(checkpoint, ENGINE, memory_gb=0.01)
        assert engine.stats().num_pages > 0
        assert len(on_hopper) == 1
        assert capsys.readouterr().err.count("failed the check") == 1

    def test_evaluations_check_too(self, checkpoint, text, on_hopper):
        run("eval", checkpoint, "--text", text, "--seq-len", 16, "--max-tokens", 32)
        with forgotten():
            run("compare", checkpoint, checkpoint, "--text", text, "--seq-len", 16, "--max-tokens", 32)
        assert len(on_hopper) == 1


class TestDoctor:
    def test_on_a_cpu(self):
        shown = run("doctor").stdout
        for part in (
            atom_jax.__version__,
            jax.__version__,
            importlib.metadata.version("numba"),
            "native_cpu",
            "GPU kernels: none applies to this device",
            "suggested: w4a4kv4: every op of it runs a kernel here",
        ):
            assert part in shown
        assert "reference runs" not in shown
        facts = run_json("doctor")
        assert facts["ok"] is True
        assert facts["versions"]["jax"] == jax.__version__
        assert facts["device"]["platform"] == "cpu" and facts["device"]["compute_capability"] is None
        assert facts["kernels"] == [] and facts["implementation"] is None
        assert facts["compilation_cache"]["folder"]
        assert {op["implementation"] for op in facts["ops"]} == {"native_cpu"}
        reason = "mosaic_sm90 needs compute capability 9.0, this is cpu"
        assert {op["reason"] for op in facts["ops"]} == {reason}
        assert {op["configuration"] for op in facts["ops"]} == {str(NativeConfig(available()[0]))}
        assert {op["step"] for op in facts["ops"]} == {"decode", "prefill"}
        # Only INT3 weights have no kernel for the CPU.
        reference = {name: scheme["reference"] for name, scheme in facts["schemes"].items()}
        assert reference == {name: [] for name in SCHEMES} | {"w3a16": ["weight_only_matmul"]}
        assert facts["suggested"]["scheme"] == "w4a4kv4"

    def test_on_a_cpu_where_native_kernels_cannot_run(self, monkeypatch):
        monkeypatch.setattr(build, "api_version", lambda: (9, 1))
        facts = doctor.examine(check=False)
        assert {op["implementation"] for op in facts["ops"]} == {"reference"}
        assert all("native_cpu needs a jaxlib with version" in op["reason"] for op in facts["ops"])
        assert all(scheme["kernels"] == [] for scheme in facts["schemes"].values())
        assert "it runs the reference for norm_quantize, grouped_matmul" in facts["suggested"]["why"]
        assert "the installed one has 9.1" in run("doctor").stdout

    @pytest.mark.slow
    def test_names_the_kernels_that_fail(self, tmp_path, monkeypatch):
        """With children and all: one kernel aborts, one is wrong, one is right."""
        few = {
            name: check
            for name, check in all_checks().items()
            if check.size == "small" and check.op in ("quantize", "norm_quantize", "silu_quantize")
        }
        monkeypatch.setattr(device, "all_checks", lambda: few)
        monkeypatch.setattr(verify, "COMMAND", command(quantize="abort", silu_quantize="wrong"))
        with hopper(tmp_path):
            facts = json.loads(run("doctor", "--seconds", 500, "--json", status=1).stdout)
            verdict = {kernel["op"]: kernel for kernel in facts["kernels"]}
            assert {op: kernel["outcome"] for op, kernel in verdict.items()} == {
                "quantize": "failed",
                "norm_quantize": "good",
                "silu_quantize": "failed",
            }
            assert (
                "SIGABRT" in verdict["quantize"]["reason"]
                and "quantize tiny" in verdict["quantize"]["reason"]
            )
            assert "wrong result" in verdict["silu_quantize"]["reason"]
            # With what is known, in another process: the same verdicts, and no check.
            with forgotten():
                shown = run("doctor", "--no-check", status=1)
            assert "checking" not in shown.stderr
            assert "SIGABRT" in shown.stdout and "silu_quantize" in shown.stdout

    def test_a_good_device(self, tmp_path):
        with hopper(tmp_path), children(lambda op: Result(GOOD, "")) as asked:
            facts = doctor.examine()
            doctor.examine()
            assert len(asked) == 2  # it checks whatever is known
            with forgotten():
                assert doctor.examine(check=False)["kernels"] == facts["kernels"]
            assert len(asked) == 2
        assert facts["ok"] is True and facts["implementation"] == KERNEL
        assert {kernel["outcome"] for kernel in facts["kernels"]} == {"good"}
        runs = {op["op"]: op["implementation"] for op in facts["ops"]}
        assert runs["silu_quantize"] == runs["grouped_matmul"] == KERNEL

    def test_an_unchecked_kernel_is_not_fine(self, tmp_path):
        with hopper(tmp_path), children(lambda op: Result(UNCHECKED, "not reached within 60 s")):
            result = run("doctor", status=1)
        assert "unchecked" in result.stdout and "not reached" in result.stdout
        assert "not verified on this device: run `atom-jax doctor`" in result.stdout

    def test_without_a_check_nothing_is_known_and_nothing_wrong(self, tmp_path):
        with hopper(tmp_path), children(failed) as asked:
            assert "not checked yet" in run("doctor", "--no-check").stdout
        assert asked == []

    def test_a_gpu_that_jax_does_not_use_is_a_problem(self, monkeypatch):
        gpu = {"name": "NVIDIA H200", "driver_version": "580.1", "memory.total": "143771 MiB"}
        monkeypatch.setattr(doctor, "_nvidia_smi", lambda: [gpu])
        shown = run("doctor", status=1).stdout
        assert "580.1" in shown and "JAX runs on the CPU" in shown

    def test_without_any_device(self, monkeypatch):
        def none() -> None:
            raise RuntimeError("no backend")

        monkeypatch.setattr(jax, "devices", none)
        assert "JAX finds no device: no backend" in run("doctor", status=1).stdout
        assert json.loads(run("doctor", "--json", status=1).stdout)["ok"] is False

    def test_what_nvidia_smi_says(self, monkeypatch):
        said = "NVIDIA H200, 580.1, 143771 MiB, 3 MiB\nNVIDIA H200, 580.1, 143771 MiB, 0 MiB\n"
        done = subprocess.CompletedProcess([], 0, stdout=said)
        monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
        first, second = doctor._nvidia_smi()
        assert first == {
            "name": "NVIDIA H200",
            "driver_version": "580.1",
            "memory.total": "143771 MiB",
            "memory.used": "3 MiB",
        }
        assert second["memory.used"] == "0 MiB"

    def test_other_gpus_have_no_kernels(self, tmp_path, monkeypatch):
        with hopper(tmp_path, kind="NVIDIA A100", capability="8.0"), children(failed) as asked:
            monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
            facts = doctor.examine()
        assert asked == [] and facts["ok"] is True
        assert facts["suggested"]["scheme"] == "bf16" and "8.0" in facts["suggested"]["why"]

    def test_hopper_is_told_the_scheme_with_kernels(self):
        some = {"kernels": ["quantize"], "reference": ["kv_append"]}
        schemes = {name: {"kernels": [], "reference": ["quantize", "kv_append"]} for name in doctor.SCHEMES}

        def suggested(monkeypatch: pytest.MonkeyPatch, **found: Any) -> dict[str, str]:
            monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
            monkeypatch.setattr(devices, "kernels_here", lambda: KERNEL)
            return doctor._suggestion(schemes | found)

        with pytest.MonkeyPatch.context() as monkeypatch:
            best = suggested(monkeypatch, w4a4kv4={"kernels": ["quantize"], "reference": []}, w8a8=some)
            assert best["scheme"] == "w4a4kv4"
            assert "every op of it runs a kernel" in best["why"] and "no INT4 tensor cores" in best["why"]
            other = suggested(monkeypatch, w8a8=some)
            assert other["scheme"] == "w8a8"
            assert "reference for kv_append" in other["why"] and "INT4" not in other["why"]


def test_the_command_of_the_console_works_alone():
    """In a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "atom_jax", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kernels"] == []
