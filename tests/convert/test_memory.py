"""The memory of a conversion is that of its largest layer, not of the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.sources.architectures import expected_tensors, parse_config
from convert.workspace import partial_path
from tests.convert.jobs import save_text
from tests.convert.tiny import save_tokenizer, tiny_config, write_json

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
LAYERS_A_SHARD = 6
CALIBRATION_TOKENS = 512
# Python, JAX, and what XLA compiles.
RUNTIME_BYTES = 2**30
# Numba and LLVM, which compile the kernels for the CPU where they were never compiled before.
COMPILER_BYTES = 256 * 2**20

_DRIVER = """
import sys
from convert.recipe import make_recipe
from convert.pipeline import ConvertOptions, convert
from tests.peak_memory import peak_memory

source, text, out = sys.argv[1:]
convert(source, out, ConvertOptions(make_recipe("w4a4kv4"), calibration=text, calibration_tokens=512))
assert "torch" not in sys.modules
print(peak_memory())
"""


def save_large_llama(folder: Path) -> tuple[int, int]:
    """Writes a Llama of one random layer many times over; returns the bytes of the model and of its largest
    layer, all in float32."""
    folder.mkdir()
    config = tiny_config(**SIZES)
    write_json(folder / "config.json", config)
    save_tokenizer(folder)
    rng = np.random.default_rng(0)
    shapes = expected_tensors(parse_config(config, where="large"))
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layers.setdefault(name.split(".")[2] if ".layers." in name else name, {})[name] = shape
    random: dict[str, np.ndarray] = {}
    weight_map, shard, sizes = {}, {}, []

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for tensors in layers.values():
        sizes.append(sum(4 * int(np.prod(shape)) for shape in tensors.values()))
        for name, shape in tensors.items():
            kind = ".".join(name.split(".")[3:]) or name
            if kind not in random:
                random[kind] = rng.standard_normal(shape, np.float32) * np.float32(0.02) + np.float32(
                    "norm" in name
                )
            shard[name] = random[kind]
        if len(shard) > 9 * LAYERS_A_SHARD:
            flush()
    flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return sum(sizes), max(sizes)


@pytest.mark.slow
def test_peak_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model_bytes, layer_bytes = save_large_llama(source)
    assert model_bytes > 1.5e9
    text = save_text(tmp_path / "text.txt", 20_000)
    try:
        result = subprocess.run(
            [sys.executable, "-c", _DRIVER, str(source), str(text), str(out)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for file in source.iterdir():
            file.unlink()
    assert result.returncode == 0, result.stderr
    assert (out / "config.json").is_file() and not partial_path(out).exists()
    peak = int(result.stdout)
    activations = 4 * CALIBRATION_TOKENS * SIZES["hidden_size"]
    with capsys.disabled():
        print(f"\npeak memory {peak / 1e6:.0f} MB of a model of {model_bytes / 1e6:.0f} MB")
    assert peak < 4 * layer_bytes + activations + RUNTIME_BYTES + COMPILER_BYTES
