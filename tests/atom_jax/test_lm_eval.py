"""lm-eval's tasks on a tiny checkpoint: its numbers equal a direct computation."""

import importlib
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import forward, generate, init_cache, load
from atom_jax.engine import Engine, EngineConfig
from atom_jax.errors import AtomError
from atom_jax.openai.served_model import served_model
from atom_jax.server.app import Service
from atom_jax.server.config import ServerConfig
from tests.atom_jax.command import ROOT, TEXT, fails, run, run_json
from tests.atom_jax.server.fake import running

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'atom-jax[eval]', see docs/testing.md")
adapter = importlib.import_module("atom_jax.lm_eval_adapter")
Instance = importlib.import_module("lm_eval.api.instance").Instance

TASKS = ROOT / "tests" / "atom_jax" / "tasks"


@pytest.fixture(autouse=True)
def local_data(tmp_path, monkeypatch):
    """Paths in the tasks are relative to the repository; prepared data goes elsewhere."""
    datasets = importlib.import_module("datasets")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def lm(model):
    return adapter.AtomLM(model, batch_size=3)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def direct(model, context, continuation):
    """Log-likelihood of token ids after token ids, in float64."""
    tokens = jnp.asarray([context + continuation], jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    cache = init_cache(model.config, 1, tokens.shape[1], dtype=jnp.float32)
    logits, _ = forward(model.params, tokens, positions, cache, config=model.config)
    rows = np.asarray(logits[0, len(context) - 1 : -1], np.float64)
    log = rows - rows.max(-1, keepdims=True)
    log -= np.log(np.exp(log).sum(-1, keepdims=True))
    return log[np.arange(len(continuation)), continuation].sum()


def ids(model, text):
    return model.tokenizer(text, add_special_tokens=False).input_ids


class TestLogLikelihood:
    def test_after_a_context(self, lm, model):
        """In the order of the requests, whatever their lengths."""
        pairs = [("the ant", " in"), ("a", " 1212 in the hut"), ("the tin and the inn", " x"), ("12", "12")]
        results = lm.loglikelihood(requests("loglikelihood", *pairs))
        for (log, greedy), (context, continuation) in zip(results, pairs, strict=True):
            whole, length = ids(model, context + continuation), len(ids(model, context))
            assert log == pytest.approx(direct(model, whole[:length], whole[length:]), abs=1e-4)
            assert greedy is False

    def test_without_a_context(self, lm, model):
        ((log, _),) = lm.loglikelihood(requests("loglikelihood", ("", "the hut")))
        bos = model.tokenizer.bos_token_id
        assert log == pytest.approx(direct(model, [bos], ids(model, "the hut")), abs=1e-4)

    def test_spaces_belong_to_the_continuation(self, lm):
        results = lm.loglikelihood(requests("loglikelihood", ("the ant ", "inn"), ("the ant", " inn")))
        assert results[0] == results[1]

    def test_long_context_loses_its_start(self, lm, model):
        """The model sees its 128 last tokens, the last of the continuation not among them."""
        ((log, _),) = lm.loglikelihood(requests("loglikelihood", (TEXT.strip(), " the hut")))
        whole, length = ids(model, TEXT.strip() + " the hut")[-129:], len(ids(model, " the hut"))
        tokens = jnp.asarray([whole[:-1]], jnp.int32)
        positions = jnp.arange(128, dtype=jnp.int32)[None]
        cache = init_cache(model.config, 1, 128, dtype=jnp.float32)
        logits, _ = forward(model.params, tokens, positions, cache, config=model.config)
        rows = np.asarray(logits[0, -length:], np.float64)
        want = rows[np.arange(length), whole[-length:]] - np.log(np.exp(rows).sum(-1))
        assert log == pytest.approx(want.sum(), abs=1e-4)

    def test_greedy(self, lm, model):
        """A continuation that is the model's own is recognized."""
        context = next(
            word
            for word in ("the", "a", "12", "in", "hut", "tin", "x", "y", "z", ".", ",", "and", "at")
            if model.tokenizer.decode(self.best(model, word)).isascii()
            and self.best(model, word)[0] > 2
            and ids(model, word + model.tokenizer.decode(self.best(model, word)))
            == ids(model, word) + self.best(model, word)
        )
        text = model.tokenizer.decode(self.best(model, context))
        assert lm.loglikelihood(requests("loglikelihood", (context, text)))[0][1] is True

    def best(self, model, context):
        tokens = jnp.asarray([ids(model, context)], jnp.int32)
        lengths = jnp.asarray([tokens.shape[1]])
        out = generate(model.params, tokens, lengths, config=model.config, max_new_tokens=1)
        return [int(out.tokens[0, 0])]

    @pytest.mark.parametrize(("context", "continuation", "tokens"), [("a", "", 0), ("a", "x" * 129, 129)])
    def test_what_cannot_be_scored(self, lm, context, continuation, tokens):
        with pytest.raises(AtomError, match=f"a continuation of {tokens} tokens cannot be scored"):
            lm.loglikelihood(requests("loglikelihood", (context, continuation)))


@pytest.fixture(scope="module")
def server(model):
    settings = EngineConfig(page_size=16, max_num_seqs=3, max_model_len=128, token_budget=64)
    engine = Engine(model, settings)
    with running(Service(ServerConfig("tiny"), engine, served_model(model, engine))) as (url, _):
        yield url


@pytest.fixture(scope="module")
def clients(server, checkpoint):
    """One that asks for two prompts in a request, and one with several requests at a time."""
    pytest.importorskip("tenacity", reason="needs lm-eval's clients: pip install 'lm-eval[api]'")
    kind = importlib.import_module("lm_eval.models.openai_completions").LocalCompletionsAPI
    options = {
        "model": "tiny",
        "base_url": f"{server}/v1/completions",
        "tokenizer": str(checkpoint / "tokenizer"),
        "tokenizer_backend": "huggingface",
        "max_length": 128,
        "max_retries": 1,
    }
    return [kind(**options, batch_size=2), kind(**options, num_concurrent=3)]


class TestServer:
    """lm-eval's own client of servers, on the same checkpoint."""

    def test_log_likelihoods_are_the_adapters(self, clients, lm):
        pairs = [("the ant", " in"), ("a", " 1212 in the hut"), ("the tin and the inn", " x"), ("", "12")]
        wanted = lm.loglikelihood(requests("loglikelihood", *pairs))
        for client in clients:
            found = client.loglikelihood(requests("loglikelihood", *pairs))
            for (log, greedy), (wanted_log, wanted_greedy) in zip(found, wanted, strict=True):
                assert log == pytest.approx(wanted_log, abs=1e-3)
                assert greedy == wanted_greedy

    def test_what_is_greedy(self, clients, model):
        context = ids(model, "the ant")
        out = generate(
            model.params,
            np.array([context]),
            np.array([len(context)]),
            config=model.config.replace(eos_token_ids=()),
            max_new_tokens=3,
        )
        best = np.asarray(out.tokens)[0].tolist()
        other = [*best[:2], (best[2] + 1) % model.config.vocab_size]
        for client in clients:
            asked = [(("", ""), context, continuation) for continuation in (best, other)]
            assert [greedy for _, greedy in client._loglikelihood_tokens(asked)] == [True, False]


def rolling(model, text):
    """Windows of 128: BOS and 127 tokens predict the first 128; later ones have all the context that fits."""
    tokens = [model.tokenizer.bos_token_id, *ids(model, text)]
    total = direct(model, tokens[:1], tokens[1:129])
    for start in range(129, len(tokens), 128):
        end = min(start + 128, len(tokens))
        total += direct(model, tokens[end - 129 : start], tokens[start:end])
    return total


def test_rolling(lm, model):
    texts = ["the hut", TEXT[:300], "", TEXT]
    assert len(ids(model, TEXT)) > 3 * 128
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    assert got[2] == 0.0
    for text, log in zip(texts, got, strict=True):
        assert log == pytest.approx(rolling(model, text) if text else 0.0, abs=5e-4)


class TestGenerateUntil:
    def text(self, model, prompt, count):
        tokens = jnp.asarray([ids(model, prompt)[-128 + count :]], jnp.int32)
        out = generate(
            model.params,
            tokens,
            jnp.asarray([tokens.shape[1]]),
            config=model.config,
            max_new_tokens=count,
        )
        row = out.tokens[0, : int(out.lengths[0])].tolist()
        return model.tokenizer.decode(row, skip_special_tokens=True)

    def test_equals_generate(self, lm, model):
        """Two kinds of request, more than a batch, prompts of many lengths and one too long, in order."""
        prompts = ["the", "a thin ant in the hut", "12", TEXT, "x y z", "inn"]
        counts = [6, 6, 3, 6, 6, 3]
        got = lm.generate_until(
            requests(
                "generate_until",
                *((prompt, {"max_gen_toks": count}) for prompt, count in zip(prompts, counts, strict=True)),
            )
        )
        assert got == [self.text(model, *each) for each in zip(prompts, counts, strict=True)]

    def test_ends_before_a_stop_string(self, lm, model):
        text = self.text(model, "the", 12)
        stop = text[4:6]
        got = lm.generate_until(
            requests("generate_until", ("the", {"until": [stop, "never"], "max_gen_toks": 12}))
        )
        assert got == [text[: text.index(stop)]]

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_repeats_are_independent_and_reproducible(self, model, batch_size):
        """lm-eval gives a request once for each of its repeats; other requests change nothing."""
        options = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 10}
        repeated = ("the thin ant", options)
        lm = adapter.AtomLM(model, batch_size=batch_size, seed=1)
        got = lm.generate_until(requests("generate_until", *[repeated] * 5))
        assert len(set(got)) == 5
        others = [("a hut", options), ("the", {"max_gen_toks": 3})]
        mixed = [others[0], repeated, others[1], *[repeated] * 4]
        again = adapter.AtomLM(model, batch_size=2, seed=1).generate_until(requests("generate_until", *mixed))
        assert [again[place] for place in (1, 3, 4, 5, 6)] == got
        other_seed = adapter.AtomLM(model, batch_size=batch_size, seed=2)
        assert not set(other_seed.generate_until(requests("generate_until", *[repeated] * 5))) & set(got)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_gen_toks": 128}, "128 new tokens leave no room for a prompt in a context of 128"),
            ({"num_beams": 4}, "beams"),
            ({"length_penalty": 2.0}, "not supported: length_penalty"),
        ],
    )
    def test_refused(self, lm, options, message):
        with pytest.raises(AtomError, match=message):
            lm.generate_until(requests("generate_until", ("the", options)))


class TestCommand:
    QUESTIONS = (TASKS / "questions.jsonl").read_text(encoding="utf-8")

    def tasks(self, checkpoint, names, *options):
        return run_json("eval", checkpoint, "--tasks", names, "--include-path", TASKS, *options)

    def test_three_kinds_of_task(self, checkpoint, model):
        """Results are those of a computation from the questions themselves."""
        got = self.tasks(checkpoint, "atom_choice,atom_generate,atom_rolling", "--batch-size", 4)
        docs = json.loads(f"[{','.join(self.QUESTIONS.splitlines())}]")
        right, right_norm, exact = [], [], []
        for doc in docs:
            context = f"Question: {doc['question']}\nAnswer:"
            logs = []
            for choice in doc["choices"]:
                # lm-eval puts a space of its own before a choice.
                whole, length = ids(model, f"{context} {choice}"), len(ids(model, context))
                logs.append(direct(model, whole[:length], whole[length:]))
            lengths = [len(choice) for choice in doc["choices"]]
            right.append(np.argmax(logs) == doc["answer"])
            right_norm.append(np.argmax(np.divide(logs, lengths)) == doc["answer"])
            answer = TestGenerateUntil().text(model, doc["question"], 8).split("\n")[0]
            exact.append(answer == doc["choices"][doc["answer"]])
        results = got["results"]
        assert results["atom_choice"]["acc"]["value"] == pytest.approx(np.mean(right))
        assert results["atom_choice"]["acc_norm"]["value"] == pytest.approx(np.mean(right_norm))
        assert results["atom_generate"]["exact_match"]["value"] == pytest.approx(np.mean(exact))
        lines = (TASKS / "texts.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        total = sum(rolling(model, text) for text in texts)
        words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
        want = {"word_perplexity": math.exp(-total / words), "byte_perplexity": math.exp(-total / size)}
        for name, value in want.items():
            assert results["atom_rolling"][name]["value"] == pytest.approx(value, rel=1e-4)
        assert got["examples"] == {"atom_choice": 5, "atom_generate": 5, "atom_rolling": 2}
        assert got["seconds"] > 0 and got["lm_eval"]

    def test_limit_fewshot_and_table(self, checkpoint):
        options = ("--limit", 2, "--num-fewshot", 1)
        got = self.tasks(checkpoint, "atom_choice", *options)
        assert (got["examples"], got["num_fewshot"]) == ({"atom_choice": 2}, {"atom_choice": 1})
        shown = run("eval", checkpoint, "--tasks", "atom_choice", "--include-path", TASKS, *options)
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.stdout.splitlines()]
        accuracy = got["results"]["atom_choice"]["acc"]
        assert ["atom_choice", "acc", f"{accuracy['value']:.4f}", f"{accuracy['stderr']:.4f}"] in rows
        assert "2 examples in" in shown.stderr

    def test_data_that_is_not_there(self, checkpoint):
        fails(
            "eval",
            checkpoint,
            "--tasks",
            "atom_absent",
            "--include-path",
            TASKS,
            parts=["task atom_absent", "data cannot be loaded", "absent.jsonl"],
        )

    def test_no_network(self, checkpoint, monkeypatch):
        constants = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        fails(
            "eval",
            checkpoint,
            "--tasks",
            "atom_remote",
            "--include-path",
            TASKS,
            parts=["task atom_remote", "data cannot be loaded", "no-such-data-set"],
        )

    def test_no_such_folder(self, checkpoint, tmp_path):
        args = ("eval", checkpoint, "--tasks", "a", "--include-path", tmp_path / "no")
        fails(*args, parts=[tmp_path / "no"])

    @pytest.mark.slow
    def test_no_such_task(self, checkpoint):
        """Looked for among lm-eval's own tasks, too."""
        fails(
            "eval", checkpoint, "--tasks", "atom_choice,nothing", "--include-path", TASKS, parts=["'nothing'"]
        )
