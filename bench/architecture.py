"""Draws the picture in docs/architecture.md: which folder imports which, read from the code.

    python -m bench.architecture

A box is a folder of Python files; the files at the top of a package are one box, too. The folders of all
operators of ``pallas_kernels`` together are one box. An arrow means that a file in one box imports a file in
another. Arrows between the top of a package and its own folders are left out, and so are ``__main__`` files,
because nobody imports them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("atom_jax_cli", "convert", "atom_jax", "pallas_kernels")
_BEGIN, _END = "```mermaid\n", "```\n"


def box_of(parts: tuple[str, ...]) -> str:
    """The box of a module, by the parts of its dotted name."""
    package, folders = parts[0], parts[1:-1]
    if not folders:
        return package
    if package == "pallas_kernels" and (ROOT / package / folders[0] / "call.py").exists():
        return "pallas_kernels/operators"
    return f"{package}/{folders[0]}"


def imported(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """The modules of ``PACKAGES`` that a file imports, wherever in it, as parts of their names."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # ``from package import name``: the name may be a module or a folder.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = tuple(name.split("."))
            path = ROOT.joinpath(*parts)
            if parts[0] not in PACKAGES:
                continue
            if path.with_suffix(".py").exists():
                yield parts
            elif path.is_dir():
                yield (*parts, "__init__")


def arrows() -> set[tuple[str, str]]:
    """All pairs (importing box, imported box) of different boxes."""
    found = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if file.name == "__main__.py":
                continue
            box = box_of(file.relative_to(ROOT).with_suffix("").parts)
            for parts in imported(ast.parse(file.read_text(encoding="utf-8"))):
                found.add((box, box_of(parts)))
    return {
        (one, other)
        for one, other in found
        if one != other and not one.startswith(f"{other}/") and not other.startswith(f"{one}/")
    }


def diagram() -> str:
    """The picture in Mermaid's language."""
    found = arrows()
    boxes = sorted({box for pair in found for box in pair})
    identifier = {box: box.replace("/", "_") + "_" for box in boxes}
    lines = ["flowchart TD"]
    for package in PACKAGES:
        lines.append(f"  subgraph {package}")
        for box in boxes:
            if box.split("/")[0] == package:
                lines.append(f'    {identifier[box]}["{box.removeprefix(package + "/")}"]')
        lines.append("  end")
    lines += [f"  {identifier[one]} --> {identifier[other]}" for one, other in sorted(found)]
    return "\n".join(lines) + "\n"


def drawn(page: str) -> str:
    """``page`` with the picture of the present code in the place of its old one."""
    before, rest = page.split(_BEGIN)
    return before + _BEGIN + diagram() + _END + rest.split(_END, 1)[1]


def main() -> None:
    """Draws the picture anew."""
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
