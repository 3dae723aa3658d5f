import contextlib
import struct

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, TokenType

from atom_jax.checkpoint import load_tokenizer, read_config
from atom_jax.config import RopeConfig
from atom_jax.detokenize import detokenize
from atom_jax.errors import AtomError
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.sources import open_source
from convert.sources.architectures import expected_tensors, parse_config
from convert.sources.gguf_config import llama3_divisors
from tests.convert.tiny import fails, save_gguf, tiny_config, tiny_tensors, tiny_vocabulary, to_gguf

Q = "model.layers.1.self_attn.q_proj.weight"
BOTH = {"attention_bias": True, "mlp_bias": True}


def save(path, arch="llama", *, change=None, metadata=None, **overrides):
    """Writes a tiny GGUF and returns it with its weights; ``change`` replaces GGUF tensors (None drops)."""
    config = tiny_config(arch, **overrides)
    tensors = tiny_tensors(config)
    renamed = to_gguf(arch, tensors, config) | (change or {})
    renamed = {name: array for name, array in renamed.items() if array is not None}
    return save_gguf(path, arch, renamed, config, metadata=metadata), tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("llama", BOTH),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_tensors_are_exact(path, arch, overrides):
    _, tensors = save(path, arch, **overrides)
    source = open_source(path)
    assert list(source.shapes) == list(expected_tensors(source.config)) == list(tensors)
    assert source.config.tie_word_embeddings == overrides.get("tie_word_embeddings", False)
    assert source.config.rms_norm_eps == 1e-5
    assert (source.config.bos_token_id, source.config.eos_token_ids) == (0, (1,))
    for name, array in tensors.items():
        got = source.tensor(name)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        assert got.flags.writeable
        np.testing.assert_array_equal(got, array, err_msg=name)


def test_config_matches_that_of_the_folder_format(path):
    save(path, "qwen3", head_dim=32)
    want = parse_config(tiny_config("qwen3", head_dim=32), where="")
    assert open_source(path).config == want


@pytest.mark.parametrize("window", [None, 0, 1, 64, 127, 128, 4096])
def test_windows_of_mistral(path, window):
    """As from a folder; llama.cpp calls the model "llama"."""
    save(path, metadata=None if window is None else {"llama.attention.sliding_window": window})
    config = open_source(path).config
    family = "mistral" if window in (1, 64, 127) else "llama"
    assert config == parse_config(tiny_config(family, sliding_window=window), where="")
    assert config.windows == ((window, window) if family == "mistral" else ())


def test_a_window_of_some_layers_is_refused(path):
    """Qwen2's max_window_layers has no key in a GGUF file."""
    save(path, "qwen2", metadata={"qwen2.attention.sliding_window": 64})
    with fails(path, "sliding_window 64", "128", "which layers"):
        open_source(path)
    save(path, "qwen2", metadata={"qwen2.attention.sliding_window": 128})
    assert open_source(path).config.windows == ()


@pytest.mark.parametrize("kind", [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_tokens_that_end_a_turn_stop(path, tmp_path, token, kind):
    config = tiny_config(vocab_size=len(tiny_vocabulary()) + 1)
    vocabulary = [*tiny_vocabulary(), token]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(vocabulary) - 4) + [kind]
    metadata = {
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
    }
    save_gguf(path, "llama", to_gguf("llama", tiny_tensors(config), config), config, metadata=metadata)
    assert open_source(path).config.eos_token_ids == (1, len(vocabulary) - 1)
    convert(path, tmp_path / "out", ConvertOptions(make_recipe("bf16")))
    assert read_config(tmp_path / "out").eos_token_ids == (1, len(vocabulary) - 1)
    tokenizer = load_tokenizer(tmp_path / "out")
    # one token in a prompt, and no text in an answer
    assert tokenizer(f"a{token}").input_ids == [vocabulary.index("a"), len(vocabulary) - 1]
    assert detokenize(tokenizer, [vocabulary.index("a"), len(vocabulary) - 1]) == "a"


def test_ids_that_mean_none(path, tmp_path):
    keys = ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id")
    save(path, metadata={f"tokenizer.ggml.{key}": 2**32 - 1 for key in keys})
    source = open_source(path)
    assert source.config.bos_token_id is None and source.config.eos_token_ids == ()
    source.write_tokenizer(tmp_path / "out")
    assert "bos_token" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_folder_with_one_file(path):
    save(path)
    (path.parent / "imatrix.bin").write_bytes(b"of llama.cpp")
    assert open_source(path.parent).fingerprint() == open_source(path).fingerprint()
    save(path.with_name("second.gguf"))
    with fails(path.parent, "2 .gguf files"):
        open_source(path.parent)


@pytest.fixture
def parts(path):
    """A file split by the ``gguf`` package, and its weights."""
    config = tiny_config()
    tensors = tiny_tensors(config)
    save_gguf(path, "llama", to_gguf("llama", tensors, config), config, split_max_tensors=8)
    files = sorted(path.parent.glob("*.gguf"))
    assert [file.name for file in files] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return files, tensors


@pytest.mark.parametrize("which", [0, 1, 2, None])
def test_split(parts, which, tmp_path):
    files, tensors = parts
    source = open_source(files[0].parent if which is None else files[which])
    assert list(source.shapes) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.tensor(name), array, err_msg=name)
    assert source.config == parse_config(tiny_config(), where="")
    source.write_tokenizer(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def test_fingerprint_of_all_parts(parts, path):
    files, _ = parts
    before = open_source(files[0]).fingerprint()
    data = bytearray(files[2].read_bytes())
    data[-64] ^= 1
    files[2].write_bytes(data)
    assert open_source(files[0]).fingerprint() != before


def test_split_with_a_part_missing(parts):
    files, _ = parts
    files[1].unlink()
    for given in (files[0], files[2], files[0].parent):
        with fails("one of 3 shards", files[1].name, "missing"):
            open_source(given)


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_that_is_a_pointer(parts, number):
    files = parts[0]
    files[number].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with fails(files[number], "Git LFS pointer", "git lfs pull"):
        open_source(files[0])


def test_parts_of_something_else(parts, path):
    files, _ = parts
    second, third = files[1].read_bytes(), files[2].read_bytes()
    files[1].write_bytes(third)
    with fails(files[1], "split.no is 2, expected 1"):
        open_source(files[0])
    files[1].write_bytes(second)
    alone = path.with_name("renamed.gguf")
    alone.write_bytes(files[0].read_bytes())
    with fails(alone, "split.count is 3", "one of 1 files"):
        open_source(alone)
    save(path)  # whole, under the name of a part
    path.replace(files[1])
    with fails(files[1], "split.count is 1", "one of 3 files"):
        open_source(files[0])


def test_parts_that_lack_tensors(path):
    config = tiny_config()
    renamed = to_gguf("llama", tiny_tensors(config), config)
    first = path.with_name("few-00001-of-00002.gguf")
    for number, file in enumerate((first, path.with_name("few-00002-of-00002.gguf"))):
        extra = {"split.no": number, "split.count": 2, "split.tensors.count": len(renamed) + 1}
        half = dict(list(renamed.items())[number::2])
        save_gguf(file, "llama", half, config, metadata=extra)
    with fails(first, f"hold {len(renamed)} tensors", f"expected {len(renamed) + 1}"):
        open_source(first)


def test_a_tensor_in_two_parts(path):
    config = tiny_config()
    renamed = to_gguf("llama", tiny_tensors(config), config)
    files = [path.with_name(f"two-0000{number}-of-00002.gguf") for number in (1, 2)]
    for number, file in enumerate(files):
        extra = {"split.no": number, "split.count": 2}
        save_gguf(file, "llama", renamed, config, metadata=extra)
    with fails(files[1], "is in two-00001-of-00002.gguf, too"):
        open_source(files[0])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_tensors(path, kind):
    config = tiny_config()
    tensors = tiny_tensors(config)
    qtype = GGMLQuantizationType[kind]
    renamed = to_gguf("llama", tensors, config)
    matrices = [name for name, array in renamed.items() if array.ndim == 2]
    packed = {name: gguf.quants.quantize(renamed[name], qtype) for name in matrices}
    save_gguf(path, "llama", renamed | packed, config, raw=dict.fromkeys(matrices, qtype))
    source = open_source(path)
    for name, array in tensors.items():
        step = np.abs(array).max() / 7 if array.ndim == 2 else 0.0
        np.testing.assert_allclose(source.tensor(name), array, atol=step)
    want = gguf.quants.dequantize(packed["blk.0.ffn_down.weight"], qtype)
    np.testing.assert_array_equal(source.tensor("model.layers.0.mlp.down_proj.weight"), want)


def dequantized_kinds():
    """Every type of blocks that this version of ``gguf`` dequantizes."""
    for kind in GGMLQuantizationType:
        block, size = GGML_QUANT_SIZES[kind]
        with contextlib.suppress(NotImplementedError):
            if block > 1 and gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind).size:
                yield kind


@pytest.mark.parametrize("kind", list(dequantized_kinds()), ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantizes(path, kind):
    """Blocks of random bytes. Without their two highest bits no float16 in them is infinite."""
    config = tiny_config(intermediate_size=256)
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(0).integers(0, 64, (64, 256 // block * size), np.uint8)
    renamed = to_gguf("llama", tiny_tensors(config), config) | {"blk.0.ffn_down.weight": packed}
    save_gguf(path, "llama", renamed, config, raw={"blk.0.ffn_down.weight": kind})
    want = gguf.quants.dequantize(packed, kind)
    assert np.abs(want).max() > 0
    np.testing.assert_array_equal(open_source(path).tensor("model.layers.0.mlp.down_proj.weight"), want)


def test_float64(path):
    wide = np.random.default_rng(0).normal(size=(64, 128))
    save(path, change={"blk.0.ffn_down.weight": wide})
    got = open_source(path).tensor("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_array_equal(got, wide.astype(np.float32))


def test_large_tensors_are_read_in_pieces(path, monkeypatch):
    monkeypatch.setattr("convert.sources.gguf_file._CHUNK_BYTES", 3 * 4 * 64)  # 3 rows of 64
    _, tensors = save(path)
    np.testing.assert_array_equal(open_source(path).tensor("lm_head.weight"), tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("metadata", "change", "rope"),
    [
        ({"llama.rope.freq_base": 500000.0}, {}, RopeConfig(5e5)),
        ({"llama.rope.freq_base": None}, {}, RopeConfig(1e4)),
        ({"llama.rope.scaling.type": "none"}, {}, RopeConfig(1e4)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {},
            RopeConfig(1e4, "linear", 2.0),
        ),
        ({"llama.rope.scale_linear": 4.0}, {}, RopeConfig(1e4, "linear", 4.0)),
        (
            {"llama.rope.freq_base": 500000.0},
            {"rope_freqs.weight": llama3_divisors(5e5, 16, 32.0).astype(np.float32)},
            RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
        ),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, RopeConfig(1e4)),
    ],
)
def test_rope(path, metadata, change, rope):
    save(path, metadata=metadata, change=change)
    assert open_source(path).config.rope == rope


def test_llama3_divisors_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_divisors(5e5, 128, 8.0), scaled.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"general.architecture": "gemma3"}, ["'gemma3'", "qwen3"]),
        ({"llama.expert_count": 8}, ["num_local_experts", "8"]),
        ({"llama.attention.sliding_window": "64"}, ["sliding_window", "integer", "'64'"]),
        (
            {"llama.attention.sliding_window": 64, "llama.attention.sliding_window_pattern": 2},
            ["sliding_window 64", "128", "which layers"],
        ),
        ({"llama.attention.value_length": 8}, ["value_length 8", "16"]),
        ({"llama.rope.dimension_count": 8}, ["rope.dimension_count 8", "16"]),
        ({"llama.rope.scaling.type": "yarn"}, ["factor", "missing"]),
        ({"llama.rope.scaling.type": "longrope"}, ["'longrope'"]),
        ({"llama.rope.scaling.type": "linear"}, ["factor", "missing"]),
        ({"llama.embedding_length": None}, ["hidden_size", "missing"]),
        ({"llama.block_count": 3}, ["model.layers.2.input_layernorm.weight", "missing"]),
        ({"llama.attention.head_count_kv": [2, 2]}, ["num_key_value_heads", "[2, 2]"]),
        ({"llama.attention.head_count": "four"}, ["num_attention_heads", "'four'"]),
        ({"llama.attention.head_count": 0, "llama.attention.key_length": None}, ["num_attention_heads"]),
        ({"split.count": 2}, ["split.count is 2", "one of 1 files", "NAME-00001-of-0000N.gguf"]),
        ({"general.type": "adapter"}, ["adapter", "merge it"]),
        ({"tokenizer.ggml.eos_token_id": 10**6}, ["eos_token_id", "1000000"]),
    ],
)
def test_bad_metadata(path, metadata, parts):
    save(path, metadata=metadata)
    with fails(path, *parts):
        open_source(path)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"blk.1.attn_q.weight": None}, [Q, "missing"]),
        ({"token_embd.weight": None}, ["vocab_size", "missing"]),
        ({"blk.1.attn_q.weight": np.ones((64, 32), np.float32)}, [Q, "[64, 32]", "expected [64, 64]"]),
        ({"blk.1.attn_q.weight": np.ones((64, 64), np.int8)}, ["blk.1.attn_q.weight", "I8", "dequantized"]),
        ({"blk.1.ffn_gate_exps.weight": np.ones((4, 64), np.float32)}, ["ffn_gate_exps", "experts"]),
        ({"rope_freqs.weight": np.full(8, 3.0, np.float32)}, ["rope_freqs.weight", "[8]"]),
        ({"rope_freqs.weight": np.full(4, np.nan, np.float32)}, ["rope_freqs.weight", "[4]"]),
    ],
)
def test_bad_tensors(path, change, parts):
    save(path, change=change)
    with fails(path, *parts):
        open_source(path)


def test_not_finite(path):
    save(path, change={"blk.1.attn_q.weight": np.full((64, 64), np.inf, np.float32)})
    with fails(path, Q, "[64, 64]", "NaN or infinity"):
        open_source(path).tensor(Q)


def test_cut_short_anywhere(path, tmp_path):
    data = save(path)[0].read_bytes()
    cut = tmp_path / "cut.gguf"
    rng = np.random.default_rng(0)
    for size in (0, 3, 4, 8, 20, len(data) - 1, *rng.integers(0, len(data), 20)):
        cut.write_bytes(data[:size])
        with fails(cut, "not a complete GGUF file"):
            open_source(cut)


def test_cut_short_after_opening(path):
    save(path)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:-20000])
    with fails(path, "output.weight [265, 64]", "shorter"):
        source.tensor("lm_head.weight")
    path.unlink()
    with fails(path, "output.weight [265, 64]", "cannot be read"):
        source.tensor("lm_head.weight")


def test_damaged_header_is_an_error_or_harmless(path, tmp_path):
    """With flipped bytes in the header: an AtomError or a source, never another exception or a hang."""
    data = bytearray(save(path)[0].read_bytes())
    damaged = tmp_path / "damaged.gguf"
    rng = np.random.default_rng(0)
    for position in (*range(4, 24), *rng.integers(24, 4000, 60)):
        copy = bytearray(data)
        copy[position] ^= int(rng.integers(1, 256))
        damaged.write_bytes(copy)
        with contextlib.suppress(AtomError):
            open_source(damaged)


def test_bogus_array_length_ends(path):
    data = save(path)[0].read_bytes()
    key = b"tokenizer.ggml.token_type"
    at = data.index(key) + len(key) + 8  # after the types of value and element
    path.write_bytes(data[:at] + struct.pack("<Q", 1 << 60) + data[at + 8 :])
    with fails(path, "not a complete GGUF file"):
        open_source(path)
