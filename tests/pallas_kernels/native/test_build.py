"""Machine code of native kernels is kept on disk, and not used after one of the sources changed."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels.native import build
from pallas_kernels.native.instruction_sets import available

ROOT = Path(__file__).parents[3]


def quantize_in_another_process(cache: Path) -> str:
    """Runs a native kernel; returns its result, and whether numba was imported."""
    script = """if True:
        import sys
        import jax.numpy as jnp
        from pallas_kernels import ActivationFormat, quantize, use_implementation
        with use_implementation("native_cpu"):
            result = quantize(jnp.arange(64.0).reshape(2, 32), ActivationFormat(32, 0))
        print(int(jnp.sum(result.body)), "numba" in sys.modules)
    """
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_the_first_use_compiles(tmp_path: Path):
    total, imported = quantize_in_another_process(tmp_path).split()
    assert imported == "True"
    (file,) = (tmp_path / "atom-jax" / "native").iterdir()
    assert file.name.startswith(f"atom_jax_quantize_{available()[0]}_") and file.suffix == ".o"
    before = file.stat().st_mtime_ns
    assert quantize_in_another_process(tmp_path).split() == [total, "False"]
    assert file.stat().st_mtime_ns == before


def test_what_calls_a_kernel_does_not_import_numba():
    """Else every start of a server would pay half a second for it, though the machine code is there."""
    script = """if True:
        import importlib, sys
        from pathlib import Path
        found = list(Path("pallas_kernels").glob("*/native_cpu.py"))
        assert len(found) > 8, found
        for file in found:
            importlib.import_module(f"pallas_kernels.{file.parent.name}.{file.stem}")
        print("numba" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_numba_is_left_as_it_was():
    """It does not optimize kernels, but whoever uses it next gets what it is set to."""
    config: Any = importlib.import_module("numba.core.config")
    level = config.OPT
    assert int(level) > 0
    build.compile_kernel(build.Kernel("pallas_kernels.quantize.native_kernel", "quantize"), "generic")
    assert config.OPT is level


def test_a_cache_that_cannot_be_used_is_none(tmp_path: Path):
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    assert quantize_in_another_process(no_folder).split()[1] == "True"


def test_a_kernel_has_another_name_after_a_source_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    kernel = build.Kernel("pallas_kernels.quantize.native_kernel", "quantize")
    other = tmp_path / "another.py"
    other.write_text("changed")
    symbol = build.symbol_of(kernel, "generic")
    files = build.sources()
    monkeypatch.setattr(build, "sources", lambda: [*files, other])
    build._digest.cache_clear()
    try:
        changed = build.symbol_of(kernel, "generic")
    finally:
        build._digest.cache_clear()
    assert changed != symbol


def test_every_file_with_code_or_constants_of_kernels_is_a_source():
    """What a file with functions of Numba imports may be part of the machine code."""
    sources = set(build.sources())
    with_functions = []
    for file in sources:
        imports = [
            node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)
        ]
        modules = {node.module or "" for node in imports}
        if modules & {"numba", "pallas_kernels.native.jit"}:
            with_functions.append(file.name)
            ours = {ROOT.joinpath(*name.split(".")) for name in modules if name.startswith("pallas_kernels")}
            assert {path.with_suffix(".py") for path in ours} <= sources, file
    assert {"native_kernel.py", "native_pages.py", "frame.py", "tiles.py", "rows.py"} <= set(with_functions)
