import builtins
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from convert.sources import open_source
from tests.convert.tiny import fails, save_tiny, tiny_config, tiny_tensors, write_json

torch = pytest.importorskip("torch")

Q = "model.layers.1.self_attn.q_proj.weight"
INDEX = "pytorch_model.bin.index.json"


def save_bin(folder, tensors, *, shards=1):
    """Replaces the safetensors of ``folder`` by PyTorch pickles of ``tensors``."""
    for path in folder.glob("model*"):
        path.unlink()
    state = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in tensors.items()}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for part in range(shards):
        name = f"pytorch_model-{part + 1:05}-of-{shards:05}.bin"
        some = dict(list(state.items())[part::shards])
        torch.save(some, folder / name)
        weight_map.update(dict.fromkeys(some, name))
    write_json(folder / INDEX, {"weight_map": weight_map})


@pytest.fixture
def folder(tmp_path):
    folder = save_tiny(tmp_path)
    save_bin(folder, tiny_tensors(tiny_config()))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tensors_are_exact(folder, shards, dtype):
    want = {
        name: torch.from_numpy(array).to(getattr(torch, dtype))
        for name, array in tiny_tensors(tiny_config()).items()
    }
    save_bin(folder, want, shards=shards)
    if shards > 1:
        (folder / "pytorch_model.bin").unlink()
    source = open_source(folder)
    assert list(source.shapes) == list(want)
    for name, tensor in want.items():
        got = source.tensor(name)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, tensor.float().numpy())


def test_tensors_do_not_alias_the_file(folder):
    source = open_source(folder)
    first = source.tensor(Q)
    first[:] = 7.0
    np.testing.assert_array_equal(source.tensor(Q), tiny_tensors(tiny_config())[Q])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_writes_what_we_read(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, **{k: v for k, v in tiny_config(family).items() if k != "model_type"}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    sources = [open_source(tmp_path / name) for name in ("single", "sharded")]
    for name, tensor in model.state_dict().items():
        for source in sources:
            np.testing.assert_array_equal(source.tensor(name), tensor.float().numpy())


def test_format_before_zip_and_parameters_and_views(folder):
    state = {name: torch.nn.Parameter(torch.from_numpy(x)) for name, x in tiny_tensors(tiny_config()).items()}
    state[Q] = torch.nn.Parameter(state[Q].detach().t())  # not contiguous
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    got = open_source(folder).tensor(Q)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, tiny_tensors(tiny_config())[Q].T)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_state_dict_of_a_training_program(folder, key):
    want = tiny_tensors(tiny_config())
    state = {name: torch.from_numpy(array) for name, array in want.items()}
    training = {"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}, "lr": 0.1}
    torch.save({key: state, **training}, folder / "pytorch_model.bin")
    source = open_source(folder)
    for name, array in want.items():
        np.testing.assert_array_equal(source.tensor(name), array)
    torch.save({"state_dict": state, "model": state}, folder / "pytorch_model.bin")
    with fails("pytorch_model.bin", "several state dicts", "state_dict, model"):
        open_source(folder)


@pytest.mark.parametrize("names", [["other.bin"], ["part-1-of-2.bin", "part-2-of-2.bin"], ["a.bin", "b.bin"]])
def test_other_names_and_no_index(folder, names):
    want = tiny_tensors(tiny_config())
    (folder / "pytorch_model.bin").unlink()
    for index, name in enumerate(names):
        part = {key: torch.from_numpy(want[key]) for key in list(want)[index :: len(names)]}
        torch.save(part, folder / name)
    for other in ("training_args.bin", "optimizer.bin", "adapter_model.bin"):
        (folder / other).write_bytes(b"not a pickle")
    for given in (folder, folder / names[0]):
        if given == folder or "-of-" in names[0] or len(names) == 1:
            source = open_source(given)
            for name, array in want.items():
                np.testing.assert_array_equal(source.tensor(name), array)


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_malicious_pickle_does_not_run(folder, tmp_path, plain_pickle):
    target = tmp_path / "owned"
    path = folder / "pytorch_model.bin"
    if plain_pickle:
        path.write_bytes(pickle.dumps({Q: Touch(target)}, protocol=2))
    else:
        torch.save({Q: Touch(target)}, path)
    with fails(path, "is not a plain tensor checkpoint"):
        open_source(folder)
    assert not target.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -1, -100])
def test_truncated(folder, keep):
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with fails(path, "is not a plain tensor checkpoint"):
        open_source(folder)


def test_not_a_state_dict(folder):
    wrapped = {"model": {"a": torch.ones(2)}}
    for content in (
        [torch.ones(2)],
        {"weights": wrapped},
        {"model": wrapped},
        {1: torch.ones(2)},
        torch.ones(2),
    ):
        torch.save(content, folder / "pytorch_model.bin")
        with fails("pytorch_model.bin", "is not a plain tensor checkpoint"):
            open_source(folder)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (torch.ones(64, 32), ["[64, 32]", "expected [64, 64]"]),
        (torch.ones(64, 64, dtype=torch.int8), ["int8"]),
        (torch.ones(64, 64).to_sparse(), ["layout"]),
        (torch.ones(64, 64, device="meta"), ["plain tensor"]),
    ],
)
def test_bad_tensors(folder, value, parts):
    save_bin(folder, tiny_tensors(tiny_config()) | {Q: value})
    with fails("pytorch_model.bin", Q, *parts):
        open_source(folder)


def test_not_finite(folder):
    save_bin(folder, tiny_tensors(tiny_config()) | {Q: torch.full((64, 64), float("nan"))})
    with fails("pytorch_model.bin", Q, "NaN"):
        open_source(folder).tensor(Q)


def test_shards_are_checked(folder):
    save_bin(folder, tiny_tensors(tiny_config()), shards=2)
    (folder / "pytorch_model.bin").unlink()  # it would be taken
    shard: Path = folder / "pytorch_model-00002-of-00002.bin"
    torch.save({}, shard)
    with fails(shard, "missing", INDEX):
        open_source(folder)
    shard.unlink()
    with fails(INDEX, shard.name, "missing"):
        open_source(folder)


@pytest.mark.parametrize("same", [True, False])
def test_head_beside_tied_embeddings(tmp_path, same):
    folder, tensors = save_tiny(tmp_path, tie_word_embeddings=True), tiny_tensors(tiny_config())
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_bin(folder, tensors)
    source = open_source(folder)
    assert source.config.tie_word_embeddings == same == ("lm_head.weight" not in source.shapes)
    assert len(source.notes) == (not same)
    if not same:
        np.testing.assert_array_equal(source.tensor("lm_head.weight"), tensors["lm_head.weight"])
        assert "pytorch_model.bin" in source.notes[0] and "lm_head.weight" in source.notes[0]


def test_a_single_file_comes_before_an_index(folder):
    save_bin(folder, tiny_tensors(tiny_config(), seed=7), shards=2)
    source = open_source(folder)
    np.testing.assert_array_equal(source.tensor(Q), tiny_tensors(tiny_config())[Q])
    assert "read from pytorch_model.bin; not used: pytorch_model-00001-of-00002.bin" in source.notes[0]


def test_without_torch(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with fails(folder, "pip install", "[torch]"):
        open_source(folder)


def test_torch_with_the_weights_only_hole(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    with fails("torch >= 2.6", "2.5.1"):
        open_source(folder)
