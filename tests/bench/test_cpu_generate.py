"""bench.cpu_generate: the systems' processes, what is computed from their times, and the tables."""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants

from atom_jax.config import preset
from bench import cpu_generate, cpu_report
from bench.cpu import limits, llama_cpp, worker
from bench.cpu.protocol import RunningSystem, System
from tests.atom_jax.models import tiny_config, tiny_params

SYSTEM = """
import json, os, sys
print(json.dumps({"ready": {"cores": sorted(os.sched_getaffinity(0))}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["new_tokens"] == 0:
        sys.exit(3)
    print(json.dumps({"seconds": request["new_tokens"], "prompts": len(request["prompts"])}), flush=True)
"""


def python(script: str, cores: int = 1) -> System:
    return System("test", (sys.executable, "-c", script), cores)


class TestProtocol:
    def test_answers(self):
        before = os.sched_getaffinity(0)
        with RunningSystem(python(SYSTEM)) as system:
            assert system.ready == {"cores": sorted(before)[:1]}
            assert system.generate([[1], [2]], 7) == {"seconds": 7, "prompts": 2}
            assert system.generate([[1]], 8)["seconds"] == 8
        assert os.sched_getaffinity(0) == before

    def test_an_end_is_an_error(self):
        with pytest.raises(RuntimeError, match="status 3"), RunningSystem(python(SYSTEM)) as system:
            system.generate([[1]], 0)
        with pytest.raises(RuntimeError, match="status 4"), RunningSystem(python("import sys; sys.exit(4)")):
            pass

    def test_worker(self, monkeypatch: pytest.MonkeyPatch):
        asked, answers = [], io.StringIO()
        request = {"prompts": [[1, 2], [3, 4]], "new_tokens": 5}
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request) + "\n"))
        worker.serve(lambda tokens, count: asked.append((tokens.tolist(), count)), {"a": 1}, answers)
        assert asked == [([[1, 2], [3, 4]], 5)]
        ready, times = map(json.loads, answers.getvalue().splitlines())
        assert ready == {"ready": {"a": 1}} and times.keys() == {"seconds", "cpu_seconds"}

    @pytest.mark.parametrize(("system", "checkpoint"), [("native", None), ("float", Path("a"))])
    def test_a_checkpoint_where_it_belongs(self, system: str, checkpoint: Path | None):
        with pytest.raises(SystemExit, match="checkpoint"):
            worker.load(system, checkpoint)


def test_another_scheme_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_generate, "read_config", lambda path: tiny_config(preset("bf16")))
    with pytest.raises(SystemExit, match="is bf16, w4a4kv4 is expected"):
        cpu_generate.systems(Path("a"), None, 2)


def test_products_are_the_elements_of_the_linears():
    config = tiny_config(preset("bf16"))
    layers = tiny_params(config)["layers"]
    linears = [layer.size for name, layer in layers.items() if name.endswith("_proj")]
    assert worker.products(config)["layers"] == sum(linears)
    assert worker.products(config)["head"] == config.vocab_size * config.hidden_size


class TestTimes:
    def test_seconds_are_of_the_fastest_rounds(self):
        decode, *_, prefill = cpu_generate.MEASURES
        assert decode.seconds({17: [5.0, 2.0], 64: [6.7, 9.0]}) == pytest.approx(0.1)
        assert prefill.seconds({1: [3.0, 2.0]}) == 2.0
        assert [measure.tokens() for measure in cpu_generate.MEASURES] == [1, 16, 512, 2000]
        assert np.shape(cpu_generate.MEASURES[1].prompts()) == (16, 32)

    def test_turns(self, monkeypatch: pytest.MonkeyPatch):
        """All systems do one thing before the next; slow ones rest in every second round."""
        measures = (
            cpu_generate.Measure("decode", 1, 2, (17, 64)),
            cpu_generate.Measure("prefill", 1, 3, (1,)),
        )
        monkeypatch.setattr(cpu_generate, "MEASURES", measures)
        turns = []

        class Fake:
            def __init__(self, name: str) -> None:
                self.name = name

            def generate(self, prompts, count):
                turns.append((self.name, len(prompts[0]), count))
                return {"seconds": count, "cpu_seconds": 1.5 * count}

        systems = [System("fast", (), 1), System("slow", (), 1, frequent=False)]
        running = {system: Fake(system.name) for system in systems}
        answers: cpu_generate.Answers = {}
        for number in range(2):
            cpu_generate.take_turns(running, number, answers)  # pyright: ignore[reportArgumentType]
        both = [(name, *rest) for rest in ((2, 17), (2, 64), (3, 1)) for name in ("fast", "slow")]
        assert turns == [*both, *both[::2]]
        first, *_, last = cpu_generate.rows(answers, {"fast": {}, "slow": {}}, {})
        assert first["system"] == "fast" and first["seconds"] == first["tokens_per_second"] == 1.0
        assert first["seconds_of_rounds"] == {17: [17, 17], 64: [64, 64]} and first["cores_used"] == 1.5
        assert last["system"] == "slow" and last["seconds_of_rounds"] == {1: [1]}
        assert last["tokens_per_second"] == 3.0

    def test_shares_of_the_limits(self):
        ready = {
            "runs": "native",
            "bytes_of_a_step": 100,
            "products_of_a_token": {"layers": 30, "head": 20},
        }
        most = {"read_bytes_per_second": 400.0, "dot_ops_per_second": 1000.0}
        decode = {"kind": "decode", "seconds": 0.5, "tokens_per_second": 2.0}
        assert cpu_generate.shares(decode, ready, most) == {"of_read": 0.5, "of_dot": 0.2}
        assert cpu_generate.shares(decode | {"kind": "prefill"}, ready, most) == {"of_dot": 0.12}
        assert cpu_generate.shares(decode, ready, most | {"dot_ops_per_second": None}) == {"of_read": 0.5}
        assert (
            cpu_generate.shares(decode, {"runs": "float"}, most)
            == cpu_generate.shares(decode, {}, most)
            == {}
        )


class TestLimits:
    def test_dot_products_are_not_optimized_away(self):
        from pallas_kernels.native.instruction_sets import available

        run = limits.dot_products(available()[0])
        assert run(10, 3, -2) == 10 * limits._SUMS * 4 * 3 * -2

    def test_all_words_are_read(self):
        words = np.random.default_rng(0).integers(0, 2**62, 1001)
        assert limits._exclusive_or(words) == np.bitwise_xor.reduce(words)


class TestLlamaCpp:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(llama_cpp.platform, "machine", lambda: "x86_64")

    def programs(self, monkeypatch: pytest.MonkeyPatch, folder: Path, npm: str) -> None:
        """A node, and an npm that is this shell script."""
        folder.mkdir(exist_ok=True)
        for name, script in (("node", ""), ("npm", npm)):
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")

    def test_without_node(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert llama_cpp.install() == "node and npm not found"

    def test_without_a_binary(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(llama_cpp.platform, "machine", lambda: "s390x")
        assert llama_cpp.install() == f"no binary for {sys.platform} on s390x"

    def test_without_a_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        self.programs(monkeypatch, tmp_path / "bin", "echo 'npm error code ENOTFOUND' >&2; exit 1")
        found = llama_cpp.install()
        assert found == "npm cannot install node-llama-cpp@3.22.1: npm error code ENOTFOUND"

    def test_installs_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        self.programs(monkeypatch, tmp_path / "bin", f'echo "$@" >> {tmp_path}/calls')
        folder = llama_cpp.install()
        assert isinstance(folder, Path) and folder.is_relative_to(tmp_path / "cache")
        assert llama_cpp.install() == folder
        (call,) = (tmp_path / "calls").read_text().splitlines()
        assert f"--prefix {folder} --ignore-scripts" in call
        assert call.endswith("node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1")

    def test_q4_0(self, tmp_path: Path):
        source = tmp_path / "model.Q4_1.gguf"
        rng, four, eight = np.random.default_rng(0), GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
        weight, embedding = (rng.normal(size=(4, 64)).astype(np.float32) for _ in range(2))
        writer = GGUFWriter(source, "llama")
        writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
        writer.add_context_length(77)
        writer.add_token_list(["a", "b"])
        for name, data, kind in (("weight", weight, four), ("embedding", embedding, eight)):
            writer.add_tensor(name, quants.quantize(data, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        made = llama_cpp.q4_0(source)
        assert made.name == "model.Q4_0.gguf" and llama_cpp.q4_0(source) == made
        before, after = GGUFReader(source), GGUFReader(made)
        values = {name: field.contents() for name, field in after.fields.items() if "GGUF" not in name}
        assert values.pop("general.file_type") == LlamaFileType.MOSTLY_Q4_0
        expected = {name: field.contents() for name, field in before.fields.items() if "GGUF" not in name}
        assert values == {name: expected[name] for name in expected if name != "general.file_type"}
        found, kept = after.tensors
        assert found.tensor_type == GGMLQuantizationType.Q4_0 and kept.tensor_type == eight
        np.testing.assert_array_equal(kept.data, before.tensors[1].data)
        error = quants.dequantize(found.data, found.tensor_type) - weight
        assert np.abs(error).max() < 0.2 * np.abs(weight).max()

    @pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
    def test_what_is_one_batch(self, tmp_path: Path):
        """Prompts in batches of 512 tokens, then one token of each sequence at once, each with its logits."""
        library = tmp_path / "node_modules" / "node-llama-cpp" / "dist"
        library.mkdir(parents=True)
        (library / "index.js").write_text(
            textwrap.dedent("""
            let batch = [];
            const add = (sequence, position, tokens, logits) =>
                batch.push([sequence, position, tokens.length, ...logits]);
            const decodeBatch = async () => { console.error(JSON.stringify(batch)); batch = []; };
            const _ctx = {
                getThreads: () => 2, setThreads() {}, disposeSequence() {}, initBatch() {}, decodeBatch,
                addToBatch: add
            };
            const model = {createContext: async (options) => ({_ctx, flashAttention: "auto"})};
            const llama = {loadModel: async () => model, systemInfo: "CPU", llamaCppRelease: {release: "b1"}};
            exports.getLlama = async () => llama;
            exports.LlamaLogLevel = {debug: "debug"};
            """)
        )
        driver = Path(llama_cpp.__file__).with_name("llama_cpp.mjs")
        requests = [
            {"prompts": [[5] * 1100], "new_tokens": 1},
            {"prompts": [[5] * 33] * 16, "new_tokens": 3},
        ]
        run = subprocess.run(
            ["node", str(driver), str(tmp_path), "model.gguf", "2"],
            input="".join(json.dumps(request) + "\n" for request in requests),
            capture_output=True,
            text=True,
            check=True,
        )
        ready, *answers = map(json.loads, run.stdout.splitlines())
        assert ready["ready"]["threads"] == 2 and len(answers) == 2
        batches = [json.loads(line) for line in run.stderr.splitlines()]
        assert batches[:3] == [[[0, 0, 512]], [[0, 512, 512]], [[0, 1024, 76, 75]]]
        first, second, *steps = batches[3:]
        assert first == [*([index, 0, 33, 32] for index in range(15)), [15, 0, 17]]
        assert second == [[15, 17, 16, 15]]
        assert steps == [[[index, 33 + step, 1, 0] for index in range(16)] for step in range(2)]


def saved() -> dict:
    def row(system: str, kind: str, speed: float, **more: float) -> dict:
        batch, prompt_tokens = (16, 32) if kind == "decode" else (1, 2000)
        return {
            "system": system,
            "kind": kind,
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "tokens_per_second": speed,
            **more,
        }

    rows = [
        row("Atom", "decode", 300.0, of_read=0.25, of_dot=0.5),
        row("Atom", "prefill", 3000.0, of_dot=0.75),
        row("Atom, 1 core", "decode", 200.0, of_read=0.1, of_dot=0.2),
        row("Atom, 1 core", "prefill", 1500.0, of_dot=0.3),
        row("llama.cpp Q4_1", "decode", 100.0),
        row("llama.cpp Q4_1", "prefill", 500.0),
        row("llama.cpp Q4_0", "decode", 80.0),
        row("llama.cpp Q4_0", "prefill", 1000.0),
    ]
    systems = {
        row["system"]: {"cores": 1 if "1 core" in row["system"] else 2, "llama_cpp": "b1"} for row in rows
    }
    most = {
        "threads": 2,
        "read_bytes_per_second": 2e10,
        "dot_instruction": "dp",
        "dot_ops_per_second": 1.25e12,
    }
    versions = {"jax": "0.10.2", "transformers": "5"}
    where = {"cpu": "a CPU", "cores": 2, "load_before": 0.04, "commit": "abc", "versions": versions}
    results = {"systems": systems, "limits": most, "seconds_of_rounds": [1.0, 2.0], "rows": rows}
    return {"environment": where, "results": results}


class TestReport:
    def test_tables(self):
        short, long = cpu_report.tables(saved()).values()
        assert long.startswith(short)
        assert short.splitlines() == [
            "a CPU, 2 cores, load 0.0 before, jax 0.10.2, transformers 5, llama.cpp b1, commit abc; "
            "the fastest of 2 rounds. In parentheses: over the faster llama.cpp.",
            "",
            "| Tokens per second | Decode, 16 | Prefill, 2,000 |",
            "| --- | ---: | ---: |",
            "| Atom | 300 (3.00x) | 3,000 (3.00x) |",
            "| Atom, 1 core | 200 (2.00x) | 1,500 (1.50x) |",
            "| llama.cpp Q4_1 | 100 (1.00x) | 500 (0.50x) |",
            "| llama.cpp Q4_0 | 80 (0.80x) | 1,000 (1.00x) |",
        ]
        assert long.splitlines()[-3:] == [
            "| Atom, of 20.0 GB/s | 25% |  |",
            "| Atom, of 1.25 TOP/s | 50% | 75% |",
            "| Atom, 2 cores over 1 | 1.50x | 2.00x |",
        ]

    def test_without_llama_cpp(self):
        found = saved()
        found["results"]["rows"] = found["results"]["rows"][:4]
        for name in ("llama.cpp Q4_1", "llama.cpp Q4_0"):
            del found["results"]["systems"][name]
        short = cpu_report.tables(found)["README.md"]
        assert "| Atom | 300 | 3,000 |" in short and "llama.cpp" not in short

    def test_pages_have_places(self, tmp_path: Path):
        (tmp_path / "cpu_generate.json").write_text(json.dumps(saved()))
        (tmp_path / "docs").mkdir()
        for page in cpu_report.tables(saved()):
            shutil.copy(cpu_report.DOCS.parent / page, tmp_path / page)
        for _ in range(2):
            cpu_report.main(results=tmp_path, root=tmp_path)
        for page, text in cpu_report.tables(saved()).items():
            assert (tmp_path / page).read_text(encoding="utf-8").count(text) == 1
