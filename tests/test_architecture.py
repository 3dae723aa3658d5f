"""The shape of the code: imports run one way, torch at the edge, nothing unpickles code, files are short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "atom_jax", "convert", "bench")
MAX_LINES = 400

# What each package never imports.
FORBIDDEN = {
    "pallas_kernels": {"atom_jax", "convert", "bench", "tests", "flax", "transformers", "torch"},
    "atom_jax": {"convert", "bench", "tests", "torch"},
    "convert": {"bench", "tests"},
}


def files(*folders: str) -> list[str]:
    """Python files under ``folders``, relative to the repository."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def imports(node: ast.AST) -> Iterator[str]:
    """Every module that ``node`` imports, dotted."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import of {child.module}"
            yield child.module or ""


def top_level_packages(node: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(node)}


def test_there_is_something_to_check() -> None:
    assert {"pallas_kernels/qarrays.py", "atom_jax/llama.py", "convert/sources/gguf.py"} <= set(
        files(*PACKAGES)
    )


def outside_functions(tree: ast.Module) -> ast.Module:
    """``tree`` without its functions and what only type checkers read: what runs at import."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Strip().visit(tree)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    wrong = {}
    for file in files(package):
        tree = parse(file)
        found = top_level_packages(tree) & FORBIDDEN[package]
        if file.startswith(
            "atom_jax/cli"
        ):  # `atom-jax convert` needs the converter, but only once it is called
            found -= {"convert"} - top_level_packages(outside_functions(tree))
        if found:
            wrong[file] = sorted(found)
    assert wrong == {}


def test_torch_is_imported_by_sources_only_and_lazily() -> None:
    importing = [
        file
        for file in files("atom_jax", "pallas_kernels", "convert")
        if "torch" in top_level_packages(parse(file))
    ]
    assert all(file.startswith("convert/sources/") for file in importing), importing
    script = "import sys, atom_jax, pallas_kernels, convert.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_nothing_unpickles_code() -> None:
    for file in files(*PACKAGES):
        tree = parse(file)
        assert not top_level_packages(tree) & {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "joblib",
            "shelve",
        }, file
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            options = {k.arg: k.value for k in node.keywords}
            unsafe = {"weights_only": False, "allow_pickle": True}
            for name, value in unsafe.items():
                option = options.get(name)
                assert not (isinstance(option, ast.Constant) and option.value is value), (
                    f"{file}:{node.lineno}"
                )
            if ast.unparse(node.func) == "torch.load":
                assert "weights_only" in options, f"{file}:{node.lineno}"


def test_no_tokenizer_class_of_a_checkpoint_is_used() -> None:
    """Classes that transformers names after models rebuild tokenizer.json, each version in its own way."""
    used = {
        name
        for file in files(*PACKAGES)
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ImportFrom) and node.module == "transformers"
        for name in (alias.name for alias in node.names)
        if "Tokenizer" in name
    }
    assert used == {"PreTrainedTokenizerFast"}


def test_no_test_asserts_a_time() -> None:
    """A busy machine must not change the verdict."""
    clocks = re.compile(r"\b(perf_counter|monotonic|process_time|time\.time|timeit)\b")
    found = {
        f"{file}:{node.lineno}"
        for file in files("tests")
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Assert) and clocks.search(ast.unparse(node.test))
    }
    assert found == set()


def test_files_are_short() -> None:
    lines = {
        file: len((ROOT / file).read_text(encoding="utf-8").splitlines())
        for file in files(*PACKAGES, "tests")
    }
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}
