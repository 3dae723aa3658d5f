"""llama.cpp as a system: the npm package node-llama-cpp with the binary that comes with it.

It is installed once into the user's cache folder. Nothing is compiled and no script of a package is run.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants

from bench.cpu.protocol import System
from pallas_kernels.user_cache import user_cache

VERSION = "3.22.1"
_DRIVER = Path(__file__).with_name("llama_cpp.mjs")
_BINARIES = {("linux", "x86_64"): "linux-x64", ("linux", "aarch64"): "linux-arm64"}


def install() -> Path | str:
    """The folder in which the package is installed; or why there is none."""
    binary = _BINARIES.get((sys.platform, platform.machine()))
    if binary is None:
        return f"no binary for {sys.platform} on {platform.machine()}"
    if missing := [program for program in ("node", "npm") if shutil.which(program) is None]:
        return f"{' and '.join(missing)} not found"
    folder = user_cache() / f"node-llama-cpp-{VERSION}"
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # The binaries are optional dependencies: all of them, those for GPUs too, would be ten times as large.
    packages = (f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{binary}@{VERSION}")
    options = ("--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--loglevel=error")
    command = ["npm", "install", "--prefix", str(folder), *options, *packages]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        return f"npm cannot install {packages[0]}: {lines[0] if lines else 'it says nothing'}"
    (folder / "complete").touch()
    return folder


def q4_0(source: Path) -> Path:
    """``source`` with Q4_0 in the place of Q4_1, in the user's cache folder.

    llama.cpp has faster matmuls for Q4_0, whose weights it reorders when it loads them. Rounding twice costs
    accuracy, which no benchmark of speed sees.
    """
    out = user_cache() / f"{source.stem.removesuffix('.Q4_1')}.Q4_0.gguf"
    if out.exists():
        return out
    reader = GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    partial = out.with_name(f"{out.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(partial, fields.pop("general.architecture").contents())
    fields.pop("general.file_type", None)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    for name, field in fields.items():
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if kind == GGMLQuantizationType.Q4_1:
            kind = GGMLQuantizationType.Q4_0
            data = quants.quantize(quants.dequantize(tensor.data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)
    return out


def system(folder: Path, model: Path, cores: int) -> System:
    """llama.cpp with a GGUF file, installed in ``folder``."""
    quantization = model.stem.rpartition(".")[2]
    command = ("node", str(_DRIVER), str(folder), str(model), str(cores))
    return System(f"llama.cpp {quantization}", command, cores)
