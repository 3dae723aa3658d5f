"""Kernels of programs that are traced together are compiled at the same time, in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from pallas_kernels.native import build, parallel

FIRST, SECOND = (build.Kernel("no_module", name) for name in ("one", "two"))


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """What would be registered with XLA."""
    calls: list[tuple[str, bytes]] = []
    monkeypatch.setattr(build, "register_code", lambda symbol, code: calls.append((symbol, code)))
    return calls


def call(*kernels: build.Kernel) -> None:
    """Traces calls of kernels."""
    for kernel in kernels:
        jax.eval_shape(lambda kernel=kernel: build.call(kernel, "generic", (), (), (1,)))


def test_kernels_are_compiled_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, registered: list[tuple[str, bytes]]
) -> None:
    both = threading.Barrier(2)

    def compile_(self: object, kernel: build.Kernel, instructions: str) -> bytes:
        both.wait(60)  # fails if only one is compiled at a time
        return kernel.name.encode()

    monkeypatch.setattr(parallel._CompilerProcess, "__enter__", lambda self: self)
    monkeypatch.setattr(parallel._CompilerProcess, "__exit__", lambda self, *error: None)
    monkeypatch.setattr(parallel._CompilerProcess, "compile", compile_)
    with parallel.compiling_in_parallel():
        call(FIRST, SECOND, FIRST)
        assert registered == []
    expected = [(build.symbol_of(kernel, "generic"), kernel.name.encode()) for kernel in (FIRST, SECOND)]
    assert registered == expected
    # They are in the cache now, and another time nothing is compiled.
    registered.clear()
    monkeypatch.setattr(parallel._CompilerProcess, "compile", None)
    with parallel.compiling_in_parallel():
        call(FIRST, SECOND)
    assert registered == expected


def test_after_an_error_what_was_traced_is_registered(
    monkeypatch: pytest.MonkeyPatch, registered: list[tuple[str, bytes]]
) -> None:
    monkeypatch.setattr(build, "machine_code", lambda *_: b"")

    def trace() -> None:
        with parallel.compiling_in_parallel():
            call(FIRST)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace()
    assert [symbol for symbol, _ in registered] == [build.symbol_of(FIRST, "generic")]
    assert parallel.postpone.get() is None


def test_a_process_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """The kernel is compiled in this process then, which has the error."""
    with pytest.raises(ModuleNotFoundError, match="no_module"), parallel.compiling_in_parallel():
        call(FIRST)
    assert "No module named 'no_module'" in capfd.readouterr().err


def test_the_process_that_traces_needs_no_numba(tmp_path: Path) -> None:
    script = """if True:
        import os
        import sys
        import jax
        import jax.numpy as jnp
        from pallas_kernels import ActivationFormat, quantize, use_implementation
        from pallas_kernels.native.parallel import compiling_in_parallel
        os.sched_getaffinity = lambda _: {0, 1}

        def program(x):
            with use_implementation("native_cpu"):
                return quantize(x, ActivationFormat(32, 0))

        x = jnp.arange(64.0).reshape(2, 32)
        with compiling_in_parallel():
            jax.eval_shape(program, x)
        print(int(jnp.sum(jax.jit(program)(x).body)) > 0, "numba" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
    (file,) = (tmp_path / "atom-jax" / "native").iterdir()
    assert file.name.startswith("atom_jax_quantize_")
