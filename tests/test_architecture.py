"""The shape of the code: imports run one way, torch at the edge, nothing unpickles code, files are short."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import architecture

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "atom_jax", "convert", "atom_jax_cli", "bench")
MAX_LINES = 400

# What each package never imports.
FORBIDDEN = {
    "pallas_kernels": {
        "atom_jax",
        "convert",
        "atom_jax_cli",
        "bench",
        "tests",
        "flax",
        "transformers",
        "torch",
    },
    "atom_jax": {"convert", "atom_jax_cli", "bench", "tests", "torch"},
    "convert": {"atom_jax_cli", "bench", "tests"},
    "atom_jax_cli": {"bench", "tests", "torch"},
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
        found = top_level_packages(parse(file)) & FORBIDDEN[package]
        if Path(file).name == "__main__.py":  # starts the command line; nobody imports it
            found -= {"atom_jax_cli"}
        if found:
            wrong[file] = sorted(found)
    assert wrong == {}


def test_the_api_and_batches_need_no_server() -> None:
    for file in (*files("atom_jax/openai"), *(file for file in files("atom_jax") if "batch" in file)):
        modules = set(imports(parse(file)))
        assert not any(module.startswith("atom_jax.server") for module in modules), file
        assert not top_level_packages(parse(file)) & {"fastapi", "starlette", "uvicorn"}, file


def test_the_command_line_imports_the_converter_when_a_command_runs() -> None:
    """So that --help and a wrong option are answered at once: before, only the recipe's defaults are read."""
    for file in files("atom_jax_cli"):
        found = set(imports(outside_functions(parse(file))))
        assert {name for name in found if name.split(".")[0] == "convert"} <= {"convert.recipe"}, file
    script = "import sys, convert.recipe; sys.exit('convert.sources' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


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


def test_every_scheme_is_complete() -> None:
    """A scheme is a module for the model and one for the converter, with the same name."""
    from atom_jax.config import Format
    from atom_jax.schemes import SCHEMES
    from convert.recipe import Recipe
    from convert.schemes import METHODS

    modules = {Path(file).stem for file in files("atom_jax/schemes")} - {"__init__", "base"}
    assert {scheme.name for scheme in SCHEMES.values()} == set(SCHEMES) == modules
    assert METHODS.keys() == modules
    for name, method in METHODS.items():
        assert (method.quantize is None) == (SCHEMES[name].weight is None), name
        assert method.unused.keys() <= {field.name for field in dataclasses.fields(Recipe)}, name
        assert SCHEMES[name].unused.keys() <= {field.name for field in dataclasses.fields(Format)}, name


def test_the_picture_shows_the_imports() -> None:
    page = architecture.PAGE.read_text(encoding="utf-8")
    assert architecture.drawn(page) == page, "python -m bench.architecture draws it anew"
    boxes = {box for pair in architecture.arrows() for box in pair}
    assert {"convert/passes", "atom_jax/engine", "pallas_kernels/operators"} <= boxes


def test_no_modules_import_each_other() -> None:
    """When they are loaded; what a function imports when it runs, or a type checker reads, is left out."""
    graph = {}
    for file in files(*architecture.PACKAGES):
        module = Path(file).with_suffix("").parts
        graph[module] = set(architecture.imported(outside_functions(parse(file)))) - {module}
    for folder in [module for module in graph if module[-1] == "__init__"]:
        # ``from package import module`` names the package, too, and needs nothing that is in its __init__.
        for found in graph.values():
            if any(other[: len(folder) - 1] == folder[:-1] and other != folder for other in found):
                found.discard(folder)
    assert sum(map(len, graph.values())) > 500
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_pass_is_part_of_a_recipe() -> None:
    """A pass that no recipe runs is dead; one with other arguments cannot be run."""
    from convert.quantize_layer import passes
    from convert.recipe import make_recipe
    from tests.atom_jax.models import tiny_config

    written = {
        f"{Path(file).stem}.{node.name}"
        for file in files("convert/passes")
        for node in parse(file).body
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.args).startswith("layer: FloatParams, stat")
    }
    run = {
        f"{each.func.__module__.rpartition('.')[2]}.{each.func.__name__}"
        for recipe in (make_recipe(), make_recipe(reorder="per_layer"))
        for each in passes(tiny_config(), recipe)
    }
    assert len(run) == 6 and written == run
