"""bench.serving and its workloads: what is asked, when, and what is counted."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import preset
from bench import serving
from bench.workload import BenchRequest, Load, sharegpt, synthetic
from tests.atom_jax.models import TINY_GROUPS, tiny_config
from tests.atom_jax.server.fake import FakeEngine


def rng():
    return np.random.default_rng(0)


class TestWorkload:
    def test_lengths(self):
        work = synthetic(4000, max_total=2048, vocab_size=100, rng=rng())
        prompts = np.array([len(request.prompt) for request in work])
        totals = prompts + np.array([request.new_tokens for request in work])
        assert 15 <= np.median(prompts) <= 19
        assert np.log(prompts + 1).std() == pytest.approx(0.8, abs=0.05)
        assert totals.max() <= 2048 and min(request.new_tokens for request in work) >= 1
        assert totals.mean() == pytest.approx(1024 + 12, rel=0.05)
        assert all(0 <= token < 100 for token in work[0].prompt)

    def test_the_seed_repeats_it(self):
        assert synthetic(9, max_total=64, vocab_size=9, rng=rng()) == synthetic(
            9, max_total=64, vocab_size=9, rng=rng()
        )

    def test_poisson_arrivals(self):
        gaps = np.diff(Load(rate=4).arrivals(20_000, rng()))
        assert gaps.mean() == pytest.approx(0.25, rel=0.05)
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)

    def test_sharegpt(self, tmp_path):
        def turns(*pairs):
            return {"conversations": [{"from": who, "value": text} for who, text in pairs]}

        path = tmp_path / "conversations.json"
        good = turns(("human", "ab"), ("gpt", "xyz"), ("human", "more"))
        others = [turns(("gpt", "x")), turns(("human", "a" * 90), ("gpt", "x")), {}, turns(("human", "a"))]
        path.write_text(json.dumps([*others, good]))
        encode = lambda text: list(text.encode())  # noqa: E731
        work = sharegpt(path, 3, max_total=64, encode=encode, rng=rng())
        assert work == [BenchRequest((97, 98), 3)] * 3
        with pytest.raises(SystemExit, match="at most 4 tokens"):
            sharegpt(path, 3, max_total=4, encode=encode, rng=rng())


class TestDrive:
    def run(self, load, count=20, **options):
        engine = FakeEngine(step_seconds=0.002, **options)
        work = [BenchRequest((1, 2, 3), 5)] * count
        row = serving.drive(engine, work, load, load.arrivals(count, rng()))
        assert engine.generated == 5 * count and not engine.requests
        return engine, row

    def test_closed_loop(self):
        """No more requests at a time than clients: each step of the fake engine makes one token of each."""
        for clients, steps in ((1, 100), (4, 25)):
            engine, row = self.run(Load(clients=clients))
            assert engine.steps == row["steps"] == steps
            assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"])
            assert row["tpot_seconds"]["p50"] >= 0.002

    def test_poisson(self):
        """Requests wait for their time, and those that find no place wait longer for the first token."""
        _, slow = self.run(Load(rate=50))
        assert slow["seconds"] > 0.15
        # All come at once, and 19 are before the last: of 5 steps each, none shorter than 2 ms.
        _, fast = self.run(Load(rate=1e6), num_pages=1)
        assert fast["ttft_seconds"]["p95"] > 0.15


def test_pages_are_what_the_weights_leave():
    """A w4a4kv4 model of the same memory has many more, of which each takes less."""
    pages = {}
    for scheme in ("bf16", "w4a4kv4"):
        config = tiny_config(preset(scheme, **(TINY_GROUPS if scheme == "w4a4kv4" else {})))
        pages[scheme] = serving.num_pages(config, 400_000, 16)
    # 2 layers, keys and values, 2 heads, 16 tokens, 16 channels of 2 bytes.
    weights = serving.weight_bytes(tiny_config(), jnp.bfloat16)
    assert pages["bf16"] == (400_000 - weights) // (2 * 2 * 2 * 16 * 16 * 2)
    assert pages["w4a4kv4"] > 2 * pages["bf16"]
    with pytest.raises(SystemExit, match="leave no page"):
        serving.num_pages(tiny_config(), 1000, 16)


def test_a_row_for_each_load(monkeypatch):
    """A shape with random weights has a tokenizer, as the engine needs it."""
    config = tiny_config(qkv_bias=False)
    monkeypatch.setitem(serving.KNOWN_MODELS, "tiny", lambda quantization: config)
    model = serving.random_model("tiny", "bf16")
    assert model.tokenizer.decode([5, 7]) == "5 7"
    monkeypatch.setattr(serving, "Engine", lambda model, settings: FakeEngine())
    work = synthetic(4, max_total=32, vocab_size=config.vocab_size, rng=rng())
    loads = [Load(clients=2), Load(rate=1000)]
    rows = list(serving.measure_loads(model, loads, work, serving.EngineConfig(num_pages=8)))
    assert [(row["scheme"], row["load"]) for row in rows] == [
        ("bf16", "2 clients"),
        ("bf16", "1000 requests/s"),
    ]
    assert "2 clients" in serving.line(rows[0])


@pytest.mark.parametrize(
    ("checkpoints", "shape", "schemes"),
    [
        ([], None, "bf16"),
        ([Path("a")], "llama-2-7b", "bf16"),
        ([], "gpt", "bf16"),
        ([], "llama-2-7b", "w8a8"),
    ],
)
def test_wrong_options(checkpoints, shape, schemes):
    with pytest.raises(SystemExit):
        serving._models(checkpoints, shape, schemes)


def test_shapes_are_those_of_the_models():
    config = serving.KNOWN_MODELS["llama-2-7b"](preset("bf16"))
    assert serving.weight_bytes(config, jnp.bfloat16) == pytest.approx(2 * 6.74e9, rel=0.001)
