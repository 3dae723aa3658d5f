"""Checkpoints on disk: what is written comes back, what is damaged is named in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import checkpoint, orbax_items
from atom_jax.config import ModelConfig, preset
from atom_jax.embedding import Embedding
from atom_jax.kv_cache import init_cache
from atom_jax.llama import make_params, merge
from pallas_kernels import QuantizedWeight
from tests.atom_jax.models import tiny_config
from tests.convert.tiny import fails, save_tokenizer

CONFIGS = {
    "bf16": tiny_config(preset("bf16"), qk_norm=True),
    "groups": tiny_config(
        preset(
            "w4a4kv4", group_size=32, num_outliers=32, gather_inputs=True, center_keys=False, head_bits=16
        ),
        o_bias=True,
    ),
    "centered": tiny_config(preset("w4a4kv4", group_size=32, num_outliers=32, center_keys=True)),
    "windows": tiny_config(preset("bf16"), windows=(None, 64)),
    "per-channel": tiny_config(preset("w4a4kv4", group_size=None, num_outliers=0), tie_word_embeddings=True),
}


def random_tree(specs: checkpoint.StoredSpecs, seed: int) -> checkpoint.StoredParams:
    """Any values of the stored types: every byte of packed data, scales and vectors exact in bfloat16."""
    rng = np.random.default_rng(seed)

    def fill(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(spec.dtype, jnp.integer):
            low, high = (-128, 128) if spec.dtype == jnp.int8 else (0, 64)
            return rng.integers(low, high, spec.shape).astype(spec.dtype)
        return rng.normal(0, 0.3, spec.shape).astype(jnp.bfloat16).astype(spec.dtype)

    return jax.tree.map(fill, specs)


def write(folder: Path, config: ModelConfig) -> tuple[list[checkpoint.StoredParams], checkpoint.StoredParams]:
    """A whole checkpoint by hand; returns the layers and the shared part that it holds."""
    layers = [random_tree(checkpoint.layer_specs(config), seed) for seed in range(config.num_layers)]
    shared = random_tree(checkpoint.shared_specs(config), 99)
    for index, layer in enumerate(layers):
        orbax_items.write_tree(checkpoint.layer_path(folder, index), layer)
    orbax_items.write_tree(checkpoint.shared_path(folder), shared)
    checkpoint.write_config(folder, config)
    (folder / checkpoint.TOKENIZER_FOLDER).mkdir()
    save_tokenizer(folder / checkpoint.TOKENIZER_FOLDER)
    return layers, shared


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although threads write on after the error, and make the folder again where it was removed."""
    unfinished = tmp_path / "shared.orbax-checkpoint-tmp"

    def write_on() -> None:
        for index in range(6):
            unfinished.mkdir(exist_ok=True)
            (unfinished / f"{index}").write_text("late")
            time.sleep(0.1)

    thread = threading.Thread(target=write_on)

    class Failing(orbax_items.ocp.StandardCheckpointer):
        def save(self, *args: Any, **kwargs: Any) -> None:
            thread.start()
            time.sleep(0.05)
            raise OSError("File too large")

    monkeypatch.setattr(orbax_items.ocp, "StandardCheckpointer", Failing)
    with fails("shared: cannot be written", "File too large"):
        orbax_items.write_tree(tmp_path / "shared", {"norm": np.ones(4, np.float32)})
    assert not thread.is_alive() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_comes_back(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    layers, shared = write(tmp_path, config)
    model = checkpoint.load(tmp_path)
    assert model.config == config and model.path == tmp_path

    stacked: Any = jax.tree.map(lambda *parts: np.stack(parts), *layers)
    tree: dict[str, Any] = {"layers": {}}
    for key, value in stacked.items():
        if isinstance(value, dict):
            assert "outliers" in value or not config.format.num_outliers
            empty = np.zeros((*value["packed"].shape[:-1], 0), np.int8)
            group = config.format.group_size or {"down_proj": 96}.get(key, 64)
            outliers, scales = value.get("outliers", empty), value["scales"].astype(np.float32)
            tree["layers"][key] = QuantizedWeight(value["packed"], outliers, scales, group)
        else:
            tree["layers"][key] = value
    for key, value in shared.items():
        tree[key] = value
        if isinstance(value, dict):
            empty, scales = np.zeros((config.vocab_size, 0), np.int8), value["scales"].astype(np.float32)
            tree[key] = QuantizedWeight(*map(jnp.asarray, (empty, value["outliers"], scales)), group_size=0)
    assert isinstance(tree["embedding"], QuantizedWeight) == (config.format.head_bits == 8)
    tree["embedding"] = Embedding(tree["embedding"], jnp.dtype(jnp.float32))
    expected = make_params(config, tree)

    assert jax.tree.structure(model.params) == jax.tree.structure(expected)
    for actual, wanted in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == wanted.dtype
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("name", ["bf16", "centered"])
def test_dtype_is_that_of_the_residual_stream(name: str, tmp_path: Path) -> None:
    """Parameters stay what they are on disk."""
    config = CONFIGS[name]
    write(tmp_path, config)
    tokens = jnp.zeros((1, 3), jnp.int32)
    for dtype in (jnp.bfloat16, jnp.float32):
        params: Any = checkpoint.load(tmp_path, dtype=dtype).params
        embedding = params["embedding"].get_value()
        assert embedding.dtype == dtype
        rows = embedding.rows(jnp.asarray([3, config.vocab_size + 5]))
        table = embedding.table.dequantize() if name == "centered" else embedding.table
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, jnp.asarray(table)[jnp.asarray([3, -1])].astype(dtype))
        hidden = merge(params, config).hidden(tokens, tokens + jnp.arange(3), init_cache(config, 1, 4))[0]
        assert hidden.dtype == dtype
        if name != "bf16":
            continue
        for linear in ("qkv_proj", "down_proj"):
            assert params["layers"][linear].get_value().dtype == jnp.bfloat16
        assert embedding.table.dtype == params["lm_head"].get_value().dtype == jnp.bfloat16
        for vector in (params["norm"], params["layers"]["q_norm"], params["layers"]["qkv_bias"]):
            assert vector.get_value().dtype == jnp.float32


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, CONFIGS["groups"])
    return folder


@pytest.fixture
def damaged(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(intact, tmp_path / "checkpoint"))


def rewrite(change: Callable[[checkpoint.StoredParams], Any], layer: int = 1) -> Callable[[Path], None]:
    """Damage: writes a layer, or the shared part (-1), with ``change`` applied."""

    def damage(folder: Path) -> None:
        specs = checkpoint.shared_specs if layer < 0 else checkpoint.layer_specs
        path = checkpoint.shared_path(folder) if layer < 0 else checkpoint.layer_path(folder, layer)
        tree = random_tree(specs(CONFIGS["groups"]), 0)
        change(tree)
        shutil.rmtree(path)
        orbax_items.write_tree(path, tree)

    return damage


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder.joinpath(*names))


def truncate(folder: Path) -> None:
    """Halves the largest data file of layer 1."""
    path = max(checkpoint.layer_path(folder, 1).rglob("d/*"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder: Path) -> None:
    for path in checkpoint.layer_path(folder, 1).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def wrong_shape(tree: checkpoint.StoredParams) -> None:
    tree["qkv_proj"]["packed"] = tree["qkv_proj"]["packed"][:-1]


def wrong_dtype(tree: checkpoint.StoredParams) -> None:
    tree["input_norm"] = tree["input_norm"].astype(jnp.bfloat16)


def wrong_scales(tree: checkpoint.StoredParams) -> None:
    tree["down_proj"]["scales"] = tree["down_proj"]["scales"].astype(np.float32)


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing-layer": (remove("params", "layers", "0001"), ("layers/0001: missing from the checkpoint",)),
    "missing-shared": (remove("params", "shared"), ("params/shared: missing from the checkpoint",)),
    "wrong-shape": (
        rewrite(wrong_shape),
        ("layers/0001: tensor qkv_proj.packed: expected int8[128, 64], found int8[127, 64]",),
    ),
    "wrong-dtype": (
        rewrite(wrong_dtype),
        ("layers/0001: tensor input_norm: expected float32[64], found bfloat16[64]",),
    ),
    "wrong-scales": (
        rewrite(wrong_scales),
        ("tensor down_proj.scales: expected bfloat16[3, 64], found float32[3, 64]",),
    ),
    "no-scales": (
        rewrite(lambda tree: tree["o_proj"].pop("scales")),
        ("layers/0001: expected", "under o_proj, found ['outliers', 'packed']"),
    ),
    "missing-tensor": (
        rewrite(lambda tree: tree.pop("norm"), layer=-1),
        ("params/shared: expected", "under the root, found ['embedding', 'lm_head']"),
    ),
    "array-for-linear": (
        rewrite(lambda tree: tree.update(o_proj=np.zeros((64, 64), np.float32))),
        ("layers/0001: expected", "under o_proj, found []"),
    ),
    "truncated": (truncate, ("layers/0001: not readable: ",)),
    "empty": (empty, ("layers/0001: not readable: ",)),
}


# Orbax's event loop leaves callbacks behind when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_parameters(name: str, damaged: Path) -> None:
    damage, parts = DAMAGE[name]
    damage(damaged)
    with fails(str(damaged), *parts):
        checkpoint.load(damaged)


def edited(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {**data, **changes}


def formatted(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {**data, "format": {**data["format"], **changes}}


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (edited(format_version=6), "not an Atom-JAX checkpoint of version 1 to 5 (found 6)"),
        (edited(format_version=True), "not an Atom-JAX checkpoint of version 1 to 5 (found True)"),
        (edited(format_version="2"), "not an Atom-JAX checkpoint of version 1 to 5 (found '2')"),
        (edited(format_version=2, format=[]), "model configuration is not readable"),
        (edited(format_version=1), "model configuration is not readable: no settings under 'quantization'"),
        (lambda data: {"model_type": "llama"}, "not an Atom-JAX checkpoint of version 1 to 5 (found None)"),
        (edited(surprise=1), "surprise"),
        (lambda data: {k: v for k, v in data.items() if k != "rope"}, "rope"),
        (lambda data: {k: v for k, v in data.items() if k != "hidden_size"}, "hidden_size"),
        (edited(hidden_size="64"), "hidden_size must be a positive integer, found '64'"),
        (edited(num_layers=-1), "num_layers must be a positive integer, found -1"),
        (edited(windows=64), "configuration is not readable"),
        (edited(windows=[64]), "windows of 1 layers in a model of 2"),
        (edited(windows=[64, 0]), "a window must be a positive integer, or null, found 0"),
        (edited(windows=[True, 64]), "a window must be a positive integer, or null, found True"),
        (formatted(scheme="w2a2"), "scheme 'w2a2' is not one of bf16, "),
        (formatted(group_size=48), "group size 48 is not one of 32, "),
        (edited(eos_token_ids=3), "configuration is not readable"),
        (edited(format=None), "configuration is not readable"),
        (formatted(center_keys=True, kv_bits=16), "center_keys needs kv_bits 4 and kv_rope 'post', found"),
        (formatted(center_keys=True, kv_rope="pre"), "found kv_bits 4 and kv_rope 'pre'"),
        (formatted(num_outliers=64), "64 input channels are not 64 outliers and whole groups of 32"),
        (formatted(num_outliers=1), "64 input channels are not 1 outliers and whole groups of 32"),
        (lambda data: [1], "a JSON object expected, found list"),
    ],
)
def test_bad_configuration(edit: Callable[[dict[str, Any]], Any], part: str, damaged: Path) -> None:
    file = damaged / checkpoint.CONFIG_FILE
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    with fails(file, part):
        checkpoint.load(damaged)


def version_1(data: dict[str, Any], **recipe: Any) -> dict[str, Any]:
    """The configuration as version 1 wrote it, in which the converter's recipe was not apart."""
    format = dict(data["format"])
    del format["head_bits"]  # 16 before version 3
    del format["rotate_inner"]  # false before version 4
    del format["shards"]  # 1 before version 5
    reorder = "per_layer" if format.pop("gather_inputs") else "folded"
    made = {"clip_w": None, "gptq": True, "rotate": False, "migrate": True, "smooth_keys": None}
    settings = {**format, **made, "reorder": reorder, **recipe}
    rest = {name: value for name, value in data.items() if name not in ("format", "format_version")}
    return {"format_version": 1, **rest, "quantization": settings}


def version_2(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration as version 2 wrote it, whose embedding and head were always bfloat16."""
    data = version_3(data)
    format = {name: value for name, value in data["format"].items() if name != "head_bits"}
    return {**data, "format_version": 2, "format": format}


def version_3(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration as version 3 wrote it, whose inner channels were never rotated."""
    data = version_4(data)
    format = {name: value for name, value in data["format"].items() if name != "rotate_inner"}
    return {**data, "format_version": 3, "format": format}


def version_4(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration as version 4 wrote it, whose layers were never cut into shards."""
    format = {name: value for name, value in data["format"].items() if name != "shards"}
    return {**data, "format_version": 4, "format": format}


@pytest.mark.parametrize("before", [version_1, version_2, version_3, version_4])
@pytest.mark.parametrize("name", CONFIGS)
def test_earlier_versions_are_read(
    name: str, before: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    config = CONFIGS[name]
    config = config.replace(format=dataclasses.replace(config.format, head_bits=16, rotate_inner=False))
    write(tmp_path, config)
    expected = checkpoint.load(tmp_path)
    file = tmp_path / checkpoint.CONFIG_FILE
    file.write_text(json.dumps(before(json.loads(file.read_text()))))
    model = checkpoint.load(tmp_path)
    assert model.config == expected.config == config
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ({"surprise": 1}, "surprise"),
        ({"reorder": "sideways"}, "reorder 'sideways' is not one of folded, "),
        ({"group_size": 48}, "group size 48 is not one of 32, "),
    ],
)
def test_bad_version_1(recipe: dict[str, Any], part: str, damaged: Path) -> None:
    file = damaged / checkpoint.CONFIG_FILE
    file.write_text(json.dumps(version_1(json.loads(file.read_text()), **recipe)))
    with fails(file, part):
        checkpoint.load(damaged)


def test_version_1_from_before_keys_were_centered_and_layers_had_windows(damaged: Path) -> None:
    file = damaged / checkpoint.CONFIG_FILE
    data = version_1(json.loads(file.read_text()))
    del data["quantization"]["center_keys"], data["windows"]
    file.write_text(json.dumps(data))
    model = checkpoint.load(damaged)
    config = CONFIGS["groups"]
    assert model.config == config.replace(format=dataclasses.replace(config.format, rotate_inner=False))
    assert "k_mean" not in checkpoint.layer_specs(model.config)
    assert model.config.windows == ()


@pytest.mark.parametrize("content", [b"", b'{"format_version": 1,', b"\xff\xfe", b"[" * 100_000])
def test_configuration_that_is_not_json(content: bytes, damaged: Path) -> None:
    file = damaged / checkpoint.CONFIG_FILE
    file.write_bytes(content)
    with fails(file, "not readable as JSON"):
        checkpoint.load(damaged)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with fails(tmp_path / "nowhere" / "config.json", "no such file"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("text")
    with fails(tmp_path / "file" / "config.json"):
        checkpoint.load(str(tmp_path / "file"))


def test_tokenizer(intact: Path, damaged: Path) -> None:
    tokenizer = checkpoint.load(intact).tokenizer
    assert tokenizer.decode(tokenizer("the 12")["input_ids"]) == "the 12"
    folder = damaged / checkpoint.TOKENIZER_FOLDER
    (folder / "tokenizer.json").write_text("{}")
    model = checkpoint.load(damaged)  # damage there is no concern of the parameters
    with fails(folder, "not readable"):
        _ = model.tokenizer
    shutil.rmtree(folder)
    with fails(folder, "the checkpoint has no tokenizer"):
        _ = model.tokenizer
