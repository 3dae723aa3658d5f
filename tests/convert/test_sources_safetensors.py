import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from atom_jax.checkpoint import read_config, shared_path, shared_specs
from atom_jax.orbax_items import read_tree
from convert.card import read_card
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.sources import open_source
from convert.sources.architectures import expected_tensors
from tests.convert.tiny import (
    CHAT_TEMPLATE,
    fails,
    save_tiny,
    save_weights,
    tiny_config,
    tiny_tensors,
    write_json,
)

Q = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    return save_tiny(tmp_path, shards=3)


def change(folder, **changes):
    """Rewrites the weights of ``folder`` with ``changes``; None takes a tensor out."""
    tensors = tiny_tensors(tiny_config()) | {
        name.replace("__", "."): array for name, array in changes.items()
    }
    save_weights(folder, {name: array for name, array in tensors.items() if array is not None})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_exact(tmp_path, family, shards):
    source = open_source(save_tiny(tmp_path, family, shards=shards))
    want = tiny_tensors(tiny_config(family))
    assert list(source.shapes) == list(expected_tensors(source.config))
    for name, array in want.items():
        got = source.tensor(name)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert source.shapes[name] == got.shape
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtypes(folder, dtype):
    tensors = {name: array.astype(dtype) for name, array in tiny_tensors(tiny_config()).items()}
    save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.tensor(name), array.astype(np.float32))


def test_extra_tensors_are_left_out(folder):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.int64), "other": np.ones(3)}
    change(folder, **extra)
    source = open_source(folder)
    assert list(source.shapes) == list(expected_tensors(source.config))
    with fails(folder, "other"):
        source.tensor("other")


def test_tied_embeddings(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_source(folder).shapes
    tensors = tiny_tensors(tiny_config())
    tensors[HEAD] = tensors[EMBEDDING]  # some checkpoints hold the tied tensor too
    monkeypatch.setattr("convert.sources.safetensors._COMPARED_AT_ONCE", 100 * 64)  # compared in three pieces
    save_weights(folder, tensors, shards=2)
    (folder / "model.safetensors").unlink()
    source = open_source(folder)
    assert HEAD not in source.shapes and source.config.tie_word_embeddings and source.notes == ()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("element", [0, -1])
def test_tied_by_the_configuration_alone(tmp_path, dtype, element):
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    tensors = {name: value.astype(dtype) for name, value in tiny_tensors(tiny_config()).items()}
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD].reshape(-1)[element] += dtype(1)
    save_weights(folder, tensors)
    source = open_source(folder)
    assert not source.config.tie_word_embeddings
    np.testing.assert_array_equal(source.tensor(HEAD), tensors[HEAD].astype(np.float32))
    (note,) = source.notes
    assert all(part in note for part in ("model.safetensors", HEAD, EMBEDDING, "not tied"))


@pytest.mark.parametrize(
    ("head", "parts"),
    [
        (np.ones((5, 64), np.float32), ["[5, 64]", "expected"]),
        (np.ones((265, 64), np.int8), ["I8", "BF16"]),
    ],
)
def test_unusable_head_beside_tied_embeddings(tmp_path, head, parts):
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    save_weights(folder, {**tiny_tensors(tiny_config()), HEAD: head})
    with fails(HEAD, *parts):
        open_source(folder)


def set_of(folder, seed, **options):
    """Writes a set of weights of its own and returns its Q tensor."""
    tensors = tiny_tensors(tiny_config(), seed)
    save_weights(folder, tensors, **options)
    return tensors[Q]


def test_a_single_file_comes_before_an_index(folder):
    set_of(folder, 1, shards=3)
    expected = set_of(folder, 2)
    source = open_source(folder)
    np.testing.assert_array_equal(source.tensor(Q), expected)
    (note,) = source.notes
    assert all(
        part in note for part in ("model.safetensors;", "not used", "model-00001-of-00003.safetensors")
    )


def test_an_index_comes_before_other_files(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    expected = set_of(folder, 1, shards=2)
    source = open_source(folder)
    np.testing.assert_array_equal(source.tensor(Q), expected)
    (note,) = source.notes
    assert all(
        part in note for part in ("model-00001-of-00002.safetensors and 1 more", "consolidated.safetensors")
    )


def test_safetensors_come_before_pytorch(folder):
    torch = pytest.importorskip("torch")
    other = {name: torch.from_numpy(value) for name, value in tiny_tensors(tiny_config(), 5).items()}
    torch.save(other, folder / "pytorch_model.bin")
    source = open_source(folder)
    np.testing.assert_array_equal(source.tensor(Q), tiny_tensors(tiny_config())[Q])
    assert "not used: pytorch_model.bin" in source.notes[0]
    # but files that transformers does not look for come after both
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    source = open_source(folder)
    np.testing.assert_array_equal(source.tensor(Q), other[Q].numpy())
    assert "read from pytorch_model.bin; not used: other.safetensors" in source.notes[0]


@pytest.mark.parametrize("order", [("single", "sharded"), ("sharded", "single")])
def test_the_order_is_that_of_transformers(folder, order):
    transformers = pytest.importorskip("transformers")
    for seed, kind in enumerate(order):
        set_of(folder, 10 + seed, shards=1 if kind == "single" else 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = model.state_dict()[Q].numpy()
    np.testing.assert_array_equal(open_source(folder).tensor(Q), theirs)


def test_notes_are_in_the_card(folder, tmp_path):
    set_of(folder, 1, shards=2)
    out = tmp_path / "out"
    card = convert(folder, out, ConvertOptions(make_recipe("bf16")))
    assert card["notes"] == list(open_source(folder).notes) == read_card(out)["notes"]


def test_an_untied_head_is_converted(tmp_path):
    folder, out = save_tiny(tmp_path, tie_word_embeddings=True), tmp_path / "out"
    tensors = tiny_tensors(tiny_config())
    save_weights(folder, tensors)
    convert(folder, out, ConvertOptions(make_recipe("bf16")))
    config = read_config(out)
    assert not config.tie_word_embeddings
    head = read_tree(shared_path(out), shared_specs(config))["lm_head"]
    np.testing.assert_array_equal(head, tensors[HEAD].astype(ml_dtypes.bfloat16))


def test_generation_config_adds_stop_tokens(folder):
    write_json(folder / "generation_config.json", {"eos_token_id": [2]})
    assert open_source(folder).config.eos_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("token", "generation", "expected"),
    [
        ("<|turn|>", None, (1, 2)),
        ({"content": "<|turn|>", "special": True}, [0, -1, None], (1, 0, 2)),
        ("<|eos|>", None, (1,)),
        (None, None, (1,)),
        ("<|unknown|>", None, (1,)),
    ],
)
def test_tokenizer_adds_its_stop_token(folder, tmp_path, token, generation, expected):
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"eos_token": token})
    write_json(folder / "generation_config.json", {"eos_token_id": generation})
    assert open_source(folder).config.eos_token_ids == expected
    convert(folder, tmp_path / "out", ConvertOptions(make_recipe("bf16")))
    assert read_config(tmp_path / "out").eos_token_ids == expected


def test_fingerprint(tmp_path, folder):
    first = open_source(folder).fingerprint()
    assert len(first) == 64
    assert open_source(save_tiny(tmp_path / "same")).fingerprint() == first
    assert open_source(save_tiny(tmp_path / "seed", seed=1)).fingerprint() != first
    assert open_source(save_tiny(tmp_path / "theta", rope_theta=5e5)).fingerprint() != first


def test_tokenizer_is_copied(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    open_source(folder).write_tokenizer(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer.encode("the 12 🎉\n")) == "the 12 🎉\n"
    assert tokenizer.eos_token == "<|eos|>"
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_tokenizer_without_its_config(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer_config.json").unlink()
    out = tmp_path / "out"
    open_source(folder).write_tokenizer(out)
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<|eos|>"


def test_no_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with fails(folder, "tokenizer.json"):
        open_source(folder).write_tokenizer(tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with fails(path, "not a complete safetensors file"):
        open_source(folder)


def test_truncated_after_opening(folder):
    source = open_source(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with fails(path, Q):
        source.tensor(Q)


def test_header_that_lies(folder):
    path = folder / "model.safetensors"
    header = json.dumps({Q: {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 1 << 40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with fails(path, "not a complete safetensors file"):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({Q: None}, [Q, "[64, 64]", "missing"]),
        ({"lm_head.weight": None}, ["lm_head.weight", "missing"]),
        ({Q: np.ones((64, 32), np.float32)}, [Q, "[64, 32]", "expected [64, 64]"]),
        ({Q: np.ones((64, 64), np.int8)}, [Q, "I8", "BF16"]),
        ({Q: np.ones((64, 64), ml_dtypes.float8_e4m3fn)}, [Q, "F8_E4M3"]),
        ({"model.layers.0.mlp.experts.0.w1.weight": np.ones(4)}, ["experts.0", "mixture of experts"]),
        ({"model.layers.0.block_sparse_moe.gate.weight": np.ones(4)}, ["mixture of experts"]),
        ({Q.replace("weight", "bias"): np.ones(64)}, ["q_proj.bias", "no place"]),
    ],
)
def test_bad_tensors(folder, changes, parts):
    change(folder, **changes)
    with fails(folder, *parts):
        open_source(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(folder, value):
    array = np.ones((64, 64), np.float32)
    array[3, 5] = value
    change(folder, **{Q: array})
    with fails("model.safetensors", Q, "[64, 64]", "NaN or infinity in 1 "):
        open_source(folder).tensor(Q)


def test_float64_beyond_float32(folder):
    change(folder, **{Q: np.full((64, 64), 1e300)})
    with fails(Q, "NaN or infinity"):
        open_source(folder).tensor(Q)


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    write_json(folder / INDEX, index)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with fails(INDEX, "model-00002-of-00003.safetensors", "missing"):
        open_source(sharded)


@pytest.mark.parametrize(
    "path", ["../escape.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 3]
)
def test_index_cannot_leave_the_folder(sharded, path):
    (sharded.parent / "escape.safetensors").write_bytes(
        (sharded / "model-00001-of-00003.safetensors").read_bytes()
    )
    edit_index(sharded, lambda index: index["weight_map"].update({Q: path}))
    with fails(INDEX, Q, "not a file of this folder"):
        open_source(sharded)


def test_index_places_a_tensor_in_the_wrong_shard(sharded):
    def rotate(index):
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"][Q] = files[files.index(index["weight_map"][Q]) - 1]

    edit_index(sharded, rotate)
    with fails(Q, "missing", INDEX):
        open_source(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_a_map(sharded, weight_map):
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    with fails(INDEX, "weight_map"):
        open_source(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", '{"a": ' + "[" * 100_000, "9" * 5000])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with fails(folder / "config.json"):
        open_source(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with fails(folder, "config.json"):
        open_source(folder)


def test_nothing_to_open(tmp_path):
    with fails(tmp_path, "looked for", "safetensors", "pytorch_model.bin", ".gguf"):
        open_source(tmp_path)
    with fails("there is no such file or folder"):
        open_source(tmp_path / "absent")
    (tmp_path / "weights.npz").write_bytes(b"x")
    with fails("weights.npz", ".gguf"):
        open_source(tmp_path / "weights.npz")
    with fails("revision"):
        open_source(tmp_path, revision="main")
