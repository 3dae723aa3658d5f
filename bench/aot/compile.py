"""Compiles jitted functions for one H200 on a machine without a GPU, and reads what the assembler said.

Needs the CUDA build of jax (``make test-kernels`` installs one beside the project's own environment).
Import this before anything starts a JAX backend.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# XLA's C++ reads the variable with getenv at each compilation; it must be set before the first. Each process
# has a folder of its own: what another one, its parent perhaps, dumps would be taken for its own.
DUMPS = os.environ["MOSAIC_GPU_DUMP_TO"] = tempfile.mkdtemp(prefix="atom-jax-kernels-")
atexit.register(shutil.rmtree, DUMPS, ignore_errors=True)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import (  # noqa: E402
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from bench.aot import lowering  # noqa: E402
from bench.aot.sass import Instructions  # noqa: E402
from pallas_kernels.dispatch import use_implementation  # noqa: E402

_TARGET_CONFIG = Path(__file__).with_name("h200.textproto")
# One SM of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications).
_REGISTERS, _REGISTER_UNIT, _THREADS, _MAX_CTAS = 65_536, 256, 2048, 32
_SMEM_BYTES, _SMEM_RESERVED_BYTES = 233_472, 1024
_SERIALIZED_WGMMA = {"C7510", "C7512"}


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One Mosaic kernel as ptxas compiled it."""

    name: str
    ctas: int | None  # of a launch; not found by jax 0.10
    threads: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int | None  # dynamic; not reported by jax 0.10
    warnings: tuple[str, ...]
    instructions: Instructions | None  # None without nvdisasm

    @property
    def ctas_per_sm(self) -> int:
        """How many CTAs an SM of an H200 holds at once: the least of registers, shared memory, threads."""
        warps = self.threads // 32
        registers_per_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        limits = [_REGISTERS // (registers_per_warp * warps), _THREADS // self.threads, _MAX_CTAS]
        if self.smem_bytes is not None:
            limits.append(_SMEM_BYTES // (self.smem_bytes + _SMEM_RESERVED_BYTES))
        return min(limits)

    @property
    def serialized_wgmma(self) -> bool:
        return bool(_SERIALIZED_WGMMA & set(self.warnings))


# Since jax 0.12 a process compiles equal kernels of different programs once, and dumps them that once: what
# was read then, by the text of the kernel's jaxpr.
_compiled_before: dict[str, CompiledKernel] = {}


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        import jax_plugins.xla_cuda13  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "the CUDA build of jax is not installed (make test-kernels)"
    return None


def _find_nvdisasm() -> Path | None:
    found = shutil.which("nvdisasm")
    if found:
        return Path(found).parents[1]
    import nvidia  # pyright: ignore[reportMissingImports]

    roots = [Path(root) for root in nvidia.__path__]
    return next((path.parents[1] for root in roots for path in root.glob("*/bin/nvdisasm")), None)


def h200_mesh(devices: int = 1) -> Mesh:
    """A mesh with one axis of so many H200s of one host, which need not be there."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=_TARGET_CONFIG.read_text(),
        topology=f"1x1x{devices}",
    )
    return topologies.make_mesh(topology, (devices,), ("x",))


@contextlib.contextmanager
def _tracing_for(mesh: Mesh) -> Iterator[None]:
    """Within it functions are traced for the H200s of ``mesh``."""
    from jax.experimental.mosaic import gpu as mosaic_gpu  # noqa: F401  # sets the variable below on import

    root = _find_nvdisasm()
    if root is not None:
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(root)
    abstract = AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
    )
    with jax.sharding.use_abstract_mesh(abstract):
        yield


def compile_for_h200(
    function: Callable[..., Any],
    *arguments: Any,
    implementations: tuple[str, ...] = ("mosaic_sm90",),
    config: Any = None,
    mesh: Mesh | None = None,
    **jit_options: Any,
) -> tuple[Any, list[CompiledKernel]]:
    """Compiles ``jit(function)`` for one H200, or for those of a mesh.

    Args:
      arguments: pytrees of ``jax.ShapeDtypeStruct`` (or arrays, of which only shapes count).
      implementations, config: of the ops inside; see ``use_implementation``.
      mesh: of ``h200_mesh``, for arguments that have shardings on it; None for one device.
      jit_options: e.g. ``donate_argnums``.

    Returns:
      jax's compiled object (HLO text, memory analysis) and the Mosaic kernels that were compiled, by name.

    Raises:
      lowering.LoweringFault: a kernel would not compute what it says.
    """
    for path in Path(DUMPS).iterdir():
        path.unlink()
    if mesh is None:
        mesh = h200_mesh()
        sharding = NamedSharding(mesh, PartitionSpec())
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
        )
    with _tracing_for(mesh), use_implementation(*implementations, config=config):
        with lowering.checked():
            traced = jax.jit(function, **jit_options).trace(*arguments)
            lowered = traced.lower(lowering_platforms=("cuda",))
        compiled = lowered.compile()
    launches = list(_launches(traced.jaxpr.jaxpr))
    grids = {launch.params["name"]: _ctas(launch.params["meshes"][0]) for launch in launches}
    dumped = [_read(path, grids) for path in Path(DUMPS).glob("*.ptxas")]
    kernels = [*dumped, *_known(launches, dumped)]
    return compiled, sorted(kernels, key=lambda kernel: kernel.name)


def _launches(jaxpr: Any) -> Iterator[Any]:
    """The equations of ``jaxpr`` that launch a Mosaic kernel; none are found by jax 0.10."""
    for equation in jaxpr.eqns:
        if "meshes" in equation.params:
            yield equation
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _launches(inner)


def _ctas(mesh: Any) -> int:
    return math.prod(mesh.grid) * math.prod(mesh.cluster)


def _known(launches: list[Any], dumped: list[CompiledKernel]) -> Iterator[CompiledKernel]:
    """The kernels of a program that were compiled for an earlier one; remembers those that were not.

    Kernels of one program that share a name are left out: which is which is not known.
    """
    by_name = {kernel.name: kernel for kernel in dumped}
    names = collections.Counter(launch.params["name"] for launch in launches)
    for launch in launches:
        name = launch.params["name"]
        if names[name] > 1:
            continue
        text = " ".join(str(launch.params[key]) for key in ("name", "meshes", "jaxprs", "compiler_params"))
        if name in by_name:
            _compiled_before[text] = by_name[name]
        elif text in _compiled_before:
            yield _compiled_before[text]


def _read(ptxas: Path, grids: dict[str, int]) -> CompiledKernel:
    log = ptxas.read_text(errors="replace")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    resources, sass = ptxas.with_suffix(".resources.txt"), ptxas.with_suffix(".sass_ctrl")
    smem = None
    if resources.exists():
        found = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text())
        smem = int(found.group(1)) if found else None
    name = re.sub(r"_\d+$", "", ptxas.stem)  # the dump numbers the kernels of a program
    threads = re.search(r"\.(?:max|req)ntid (\d+)", ptxas.with_suffix(".ptx").read_text())
    assert threads is not None, f"{ptxas.stem}: no block size in the PTX"
    return CompiledKernel(
        name=name,
        ctas=grids.get(name),
        threads=int(threads.group(1)),
        registers=max(map(int, re.findall(r"Used (\d+) registers", log))),
        stack_bytes=max((int(stack) for stack, _, _ in frames), default=0),
        spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in frames),
        smem_bytes=smem,
        warnings=tuple(sorted(set(re.findall(r"\b(C75\d\d)\b", log)))),
        instructions=Instructions.read(sass) if sass.exists() else None,
    )
