import json

import pytest

from atom_jax.config import RopeConfig
from convert.sources.architectures import expected_tensors, parse_config, with_generation_config
from tests.convert.tiny import FAMILIES, fails, tiny_config

WHERE = "some/config.json"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BOTH = {"attention_bias": True, "mlp_bias": True}


def parse(family="llama", **overrides):
    return parse_config(tiny_config(family, **overrides), where=WHERE)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", BOTH),
        ("mistral", {}),
        ("mistral", {"head_dim": 32}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_expected_tensors_are_those_of_transformers(family, overrides):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = tiny_config(family, **overrides)
    config = getattr(transformers, FAMILIES[family].replace("ForCausalLM", "Config"))(**settings)
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[family])(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    assert expected_tensors(parse(family, **overrides)) == shapes
    # and so it is with the config.json that this version of transformers writes itself
    saved = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [FAMILIES[family]]}
    assert expected_tensors(parse_config(saved, where=WHERE)) == shapes
    assert parse_config(saved, where=WHERE).rope == parse(family, **overrides).rope


def test_biases_of_each_family():
    def flags(config):
        return config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm

    assert flags(parse("llama")) == (False, False, False, False)
    assert flags(parse("llama", **BOTH)) == (True, True, True, False)
    assert flags(parse("mistral", **BOTH)) == (False, False, False, False)
    assert flags(parse("qwen2", **BOTH)) == (True, False, False, False)
    assert flags(parse("qwen3")) == (False, False, False, True)
    assert flags(parse("qwen3", attention_bias=True)) == (True, True, False, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_is_false(family):
    nulls = dict.fromkeys(["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"])
    assert parse_config(tiny_config(family) | nulls, where=WHERE) == parse(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_without_its_head(family):
    headless = FAMILIES[family].replace("ForCausalLM", "Model")
    assert parse(family, architectures=[headless]) == parse(family)


SLIDING = {"use_sliding_window": True, "sliding_window": 64}
MIXED = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "overrides", "windows"),
    [
        ("llama", {}, ()),
        ("mistral", {}, ()),  # 4096, and there are 128 positions
        ("mistral", {"sliding_window": 64}, (64, 64)),
        ("mistral", {"sliding_window": 128}, ()),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 32768}, (4096, 4096)),
        ("qwen2", {"sliding_window": 64}, ()),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}, ()),
        ("qwen2", {**SLIDING, "max_window_layers": 0}, (64, 64)),
        ("qwen2", {**SLIDING, "max_window_layers": 1}, (None, 64)),
        ("qwen2", {**SLIDING, "max_window_layers": 2}, ()),
        ("qwen2", SLIDING, ()),  # 28 layers without one
        ("qwen2", {**SLIDING, "max_window_layers": 0, "layer_types": MIXED}, (64, None)),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, ()),
        ("qwen3", {**SLIDING, "max_window_layers": 1}, (None, 64)),
    ],
)
def test_windows(family, overrides, windows):
    assert parse(family, **overrides).windows == windows


def test_null_is_no_window():
    mistral = {**tiny_config("mistral"), "sliding_window": None, "max_position_embeddings": 32768}
    qwen2 = {**tiny_config("qwen2", use_sliding_window=True, max_window_layers=0), "sliding_window": None}
    for settings in (mistral, qwen2):
        assert parse_config(settings, where=WHERE).windows == ()


def test_llama1_spelling():
    config = parse(num_key_value_heads=None, head_dim=None, rope_theta=None)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)
    by_type = tiny_config()
    del by_type["architectures"]
    assert parse_config(by_type, where=WHERE).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("overrides", "rope"),
    [
        ({}, RopeConfig(10000.0)),
        ({"rope_theta": 500000}, RopeConfig(500000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(10000.0, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "default"}}, RopeConfig(10000.0)),
        ({"rope_scaling": LLAMA3}, RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 64)),
        ({"rope_scaling": {**LLAMA3, "type": "llama3"}}, RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 64)),
        (
            {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
        ),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}}, RopeConfig(1e6)),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            RopeConfig(1e6),
        ),
    ],
)
def test_rope_spellings(overrides, rope):
    assert parse(**overrides).rope == rope


def test_end_of_sequence_ids():
    assert parse(eos_token_id=None).eos_token_ids == ()
    assert parse_config({**tiny_config(), "eos_token_id": None}, where=WHERE).eos_token_ids == ()
    assert parse(eos_token_id=-1).eos_token_ids == () == parse(eos_token_id=[-1, None]).eos_token_ids
    assert parse(eos_token_id=[None, 2, -1, 0]).eos_token_ids == (2, 0)
    assert parse(bos_token_id=-1).bos_token_id is None
    config = parse(eos_token_id=[2, 1, 2])
    assert config.eos_token_ids == (2, 1)
    merged = with_generation_config(config, {"eos_token_id": [1, 0]}, where="generation_config.json")
    assert merged.eos_token_ids == (2, 1, 0)
    assert with_generation_config(config, {}, where="generation_config.json") == config
    with fails("generation_config.json", "eos_token_id", "outside the vocabulary"):
        with_generation_config(config, {"eos_token_id": 10**6}, where="generation_config.json")


@pytest.mark.parametrize(
    ("family", "overrides", "parts"),
    [
        ("llama", {"architectures": ["GemmaForCausalLM"]}, ["'GemmaForCausalLM'", "Qwen3ForCausalLM"]),
        ("llama", {"architectures": []}, ["architectures"]),
        ("llama", {"architectures": "LlamaForCausalLM"}, ["architectures"]),
        (
            "llama",
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            ["num_local_experts"],
        ),
        ("qwen3", {"num_experts": 128}, ["num_experts", "128"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window", "at least 1"]),
        ("mistral", {"sliding_window": "64"}, ["sliding_window", "integer", "'64'"]),
        ("llama", {"use_sliding_window": True}, ["use_sliding_window", "not supported"]),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, ["chunked_attention"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "1 layers", "2"]),
        ("qwen2", {"layer_types": "sliding_attention"}, ["layer_types", "list"]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, ["max_window_layers", "-1"]),
        ("qwen2", {"use_sliding_window": 1}, ["use_sliding_window", "true or false"]),
        ("llama", {"rope_scaling": {"type": "longrope"}}, ["'longrope'"]),
        ("llama", {"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor", "missing"]),
        ("llama", {"rope_scaling": {"factor": 2.0}}, ["rope_scaling.rope_type", "missing"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", "at least 1"]),
        ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ["low_freq_factor"]),
        ("llama", {"rope_scaling": [1]}, ["rope_scaling", "object"]),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            ["rope_type"],
        ),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            ["partial"],
        ),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "quantized already"]),
        ("llama", {"hidden_size": None}, ["hidden_size", "missing"]),
        ("llama", {"rms_norm_eps": None}, ["rms_norm_eps", "missing"]),
        ("qwen3", {"head_dim": None}, ["head_dim", "missing"]),
        ("qwen2", {"num_key_value_heads": None}, ["num_key_value_heads", "missing"]),
        ("llama", {"hidden_size": "64"}, ["hidden_size", "integer", "'64'"]),
        ("llama", {"hidden_size": 64.0}, ["hidden_size", "integer"]),
        ("llama", {"vocab_size": True}, ["vocab_size", "True"]),
        ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ("llama", {"num_hidden_layers": 10**9}, ["num_hidden_layers", "at most"]),
        ("llama", {"num_attention_heads": -4}, ["num_attention_heads", "-4"]),
        ("llama", {"num_key_value_heads": 3}, ["num_attention_heads", "3"]),
        ("llama", {"head_dim": 15}, ["head_dim", "even", "15"]),
        ("llama", {"head_dim": None, "hidden_size": 66}, ["hidden_size", "66"]),
        ("llama", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ("llama", {"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
        ("llama", {"rope_theta": False}, ["rope_theta", "False"]),
        ("llama", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
        ("llama", {"attention_bias": 1}, ["attention_bias", "true or false"]),
        ("llama", {"eos_token_id": "</s>"}, ["eos_token_id", "'</s>'"]),
        ("llama", {"eos_token_id": [1, True]}, ["eos_token_id"]),
        ("llama", {"eos_token_id": -2}, ["eos_token_id", "-2"]),
        ("llama", {"bos_token_id": 10**5000}, ["bos_token_id"]),
    ],
)
def test_bad_configuration_is_named(family, overrides, parts):
    with fails(WHERE, *parts):
        parse(family, **overrides)


@pytest.mark.parametrize("data", [[], "text", None, 3])
def test_not_an_object(data):
    with fails(WHERE, "object"):
        parse_config(data, where=WHERE)
