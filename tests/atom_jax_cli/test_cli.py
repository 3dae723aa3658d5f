import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import typer
from typer.core import TyperGroup, TyperOption
from typer.testing import CliRunner

import atom_jax
from atom_jax import load, perplexity
from atom_jax.text import encode
from atom_jax_cli import app, console
from convert.pipeline import ConvertOptions
from convert.recipe import make_recipe
from tests.atom_jax.command import ROOT, TEXT, fails, run, run_json, subprocess_run


class TestConvert:
    @pytest.fixture
    def made(self, monkeypatch):
        """Collects what the command asks of the converter."""
        calls = []

        def convert(src, out, options, progress):
            calls.append((src, out, options))
            progress("first", 1, 2)
            progress("second", 2, 2)
            out.mkdir()
            return {"made": str(out)}

        monkeypatch.setattr("convert.pipeline.convert", convert)
        return calls

    def test_options_that_are_not_given_keep_the_defaults_of_the_library(self, made, tmp_path):
        card = run_json("convert", "SRC", tmp_path / "out")
        assert card == {"made": str(tmp_path / "out")}
        want = ConvertOptions(
            make_recipe("w4a4kv4"), flexible=("group_size", "num_outliers", "refine", "shards")
        )
        assert made == [("SRC", tmp_path / "out", want)]

    def test_all_options(self, made, tmp_path, text):
        options = "--scheme w4a4kv4 --group-size 32 --num-outliers 64 --clip-w 0.8 --clip-a 0.7 --no-gptq "
        options += (
            "--no-migrate --refine 9 --smooth-keys 0.3 --no-center-keys "
            "--reorder per_layer --kv-bits 16 --kv-rope pre --shards 2 "
            "--calib org/data --calib-tokens 1024 --seed 3 "
        )
        options += f"--eval-text {text} --eval-tokens 77 --revision main"
        result = run("convert", "org/model", tmp_path / "out", *options.split())
        assert result.stdout == ""
        recipe = make_recipe(
            "w4a4kv4",
            group_size=32,
            num_outliers=64,
            clip_w=0.8,
            clip_a=0.7,
            gptq=False,
            migrate=False,
            refine=9,
            reorder="per_layer",
            kv_bits=16,
            kv_rope="pre",
            smooth_keys=0.3,
            center_keys=False,
            shards=2,
        )
        want = ConvertOptions(recipe, "org/data", 1024, 3, text, 77, "main")
        assert made == [("org/model", tmp_path / "out", want)]

    def test_automatic_number_of_outliers(self, made, monkeypatch, tmp_path):
        result = run("convert", "SRC", tmp_path / "out", "--num-outliers", "auto")
        assert made[0][2] == ConvertOptions(
            make_recipe("w4a4kv4"), auto_outliers=True, flexible=("group_size", "refine", "shards")
        )
        assert "outliers chosen" not in result.stderr  # the card of these tests has none

        card = {"outliers": {"chosen": 64, "budget": 0.1, "relative_error": {"0": 0.5, "64": 0.125}}}
        monkeypatch.setattr("convert.pipeline.convert", lambda src, out, *args: card)
        result = run("convert", "SRC", tmp_path / "out", "--num-outliers", "auto")
        assert "64 outliers chosen; relative error by their number: 0: 0.5000, 64: 0.1250" in result.stderr

    @pytest.mark.parametrize(
        ("options", "flexible"),
        [
            ("--group-size 64", ("num_outliers", "refine", "shards")),
            ("--num-outliers 64", ("group_size", "refine", "shards")),
            ("--group-size 64 --num-outliers auto", ("refine", "shards")),
            ("--refine 7", ("group_size", "num_outliers", "shards")),
            ("--fast", ("group_size", "num_outliers", "shards")),
            ("--shards 4", ("group_size", "num_outliers", "refine")),
            ("--scheme w4a16", ("group_size", "refine", "shards")),
            ("--scheme w8a8", ("refine", "shards")),
            ("--scheme bf16", ("shards",)),
            ("--scheme bf16 --fast --shards 2", ()),
        ],
    )
    def test_what_is_not_given_is_flexible(self, made, tmp_path, options, flexible):
        run("convert", "SRC", tmp_path / "out", *options.split())
        assert made[0][2].flexible == flexible

    def test_groups_that_were_chosen_are_printed(self, original, tmp_path):
        options = "--fast --no-gptq --no-migrate --smooth-keys 0 --no-center-keys --calib-tokens 128"
        result = run("convert", original, tmp_path / "out", *options.split())
        assert (
            "chosen for this model: groups of 64, number of outliers 0, number of shards 1" in result.stderr
        )
        card = json.loads((tmp_path / "out" / "quantization.json").read_text())
        assert card["job"]["chosen"] == {"group_size": 64, "num_outliers": 0, "shards": 1}

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ("--scheme w2a2", ["'w2a2'", "bf16", "w8a8", "w4a4kv4"]),
            ("--scheme w4a4", ["'w4a4'", "did you mean w4a4kv4?"]),
            ("--scheme W8A8", ["'W8A8'", "did you mean w8a8?"]),
            ("--reorder perlayer", ["reorder 'perlayer' is not one of", "did you mean per_layer?"]),
            ("--kv-rope pst", ["kv_rope 'pst' is not one of pre, post", "did you mean post?"]),
            ("--kv-groups 3", ["kv_groups 3 is not one of 1, 2"]),
            ("--scheme w8a8 --num-outliers 64", ["w8a8 has no setting num_outliers"]),
            ("--scheme w8a8 --num-outliers auto", ["w8a8 has no setting num_outliers"]),
            ("--num-outliers many", ["--num-outliers", "'many'", "'auto'"]),
            ("--group-size 48", ["48", "128"]),
            ("--kv-bits 8", ["kv_bits", "8"]),
            ("--clip-w 1.5", ["clip_w", "1.5"]),
            ("--smooth-keys 1.5", ["smooth_keys", "1.5"]),
            ("--center-keys --kv-rope pre", ["center_keys", "kv_rope 'pre'"]),
            ("--fast --refine 3", ["--fast", "--refine"]),
            ("--scheme bf16 --refine 3", ["bf16 has no setting refine"]),
        ],
    )
    def test_unsupported_options(self, made, tmp_path, options, parts):
        assert len(fails("convert", "SRC", tmp_path / "out", *options.split(), parts=parts)) == 1
        assert made == []

    def test_measured_perplexity_is_printed(self, monkeypatch, tmp_path, text):
        card = {"perplexity": {"before": 20.0, "after": 25.0, "ratio": 1.25, "tokens": 99}}
        monkeypatch.setattr("convert.pipeline.convert", lambda src, out, *args: card)
        result = run("convert", "SRC", tmp_path / "out", "--eval-text", text)
        expected = f"perplexity of {text}: 20.0000 before, 25.0000 after (1.2500 times), over 99 tokens"
        assert expected in result.stderr.splitlines()

    def test_a_long_stage_reports_without_a_terminal(self, made, monkeypatch, tmp_path):
        monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
        first, second, *_ = run("convert", "SRC", tmp_path / "out").stderr.splitlines()
        assert re.fullmatch(r"first: 1 of 2, [\d.]+ s", first)
        assert re.fullmatch(r"second: [\d.]+ s", second)

    def test_a_short_stage_reports_its_end(self, made, monkeypatch, tmp_path):
        monkeypatch.setattr(console, "LOG_SECONDS", math.inf)
        only, *_ = run("convert", "SRC", tmp_path / "out").stderr.splitlines()
        assert re.fullmatch(r"second: [\d.]+ s", only)

    def test_for_real(self, original, text, tmp_path):
        out = tmp_path / "out"
        card = run_json(
            "convert", original, out, "--scheme", "bf16", "--eval-text", text, "--eval-tokens", "200"
        )
        assert card == json.loads((out / "quantization.json").read_text())
        assert card["job"]["recipe"]["scheme"] == "bf16"
        assert card["perplexity"]["tokens"] > 100
        assert load(out).config.num_layers == 2
        fails("convert", original, out, "--scheme", "bf16", "--seed", "1", parts=[out, "exists"])

    def test_source_that_is_not_there(self, tmp_path):
        fails("convert", tmp_path / "no", tmp_path / "out", parts=[tmp_path / "no"])

    def test_output_that_cannot_be_made(self, original, tmp_path):
        (tmp_path / "file").write_text("")
        fails("convert", original, tmp_path / "file" / "out", "--scheme", "bf16", parts=[tmp_path / "file"])

    def test_module(self, tmp_path):
        result = subprocess_run(tmp_path / "no", tmp_path / "out", module="convert")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {tmp_path / 'no'}")
        assert len(result.stderr.splitlines()) == 1


class TestEval:
    def test_is_the_perplexity_of_the_library(self, checkpoint, text):
        model = load(checkpoint)
        tokens = encode(checkpoint / "tokenizer", TEXT)
        want = perplexity(model.params, tokens, config=model.config, seq_len=64, max_tokens=300)
        got = run_json("eval", checkpoint, "--text", text, "--seq-len", 64, "--max-tokens", 300)
        assert got["perplexity"] == want.perplexity
        assert got["tokens"] == want.tokens
        assert set(got) == {"perplexity", "tokens", "seconds", "tokens_per_second"}
        assert got["seconds"] > 0
        shown = run("eval", checkpoint, "--text", text, "--seq-len", 64, "--max-tokens", 300)
        assert shown.stdout == f"perplexity {want.perplexity:.4f}\n"
        assert "tokens/s" in shown.stderr
        assert "longer than" not in shown.stderr

    @pytest.mark.parametrize(
        ("data", "part"),
        [(None, "No such file"), (b"", "no text"), (b"caf\xe9 " * 99, "UTF-8"), (b"i", "two tokens")],
    )
    def test_bad_text(self, checkpoint, tmp_path, data, part):
        path = tmp_path / "text.txt"
        if data is not None:
            path.write_bytes(data)
        fails("eval", checkpoint, "--text", path, "--seq-len", 64, parts=[part])

    def test_window_longer_than_the_context(self, checkpoint, text):
        fails("eval", checkpoint, "--text", text, "--seq-len", 129, parts=["128", "129"])


class TestInspect:
    def test_json_is_the_card(self, checkpoint):
        assert run_json("inspect", checkpoint) == json.loads((checkpoint / "quantization.json").read_text())

    def test_tables(self, checkpoint, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(checkpoint, copy)
        card = json.loads((copy / "quantization.json").read_text())
        errors = [{"qkv_proj": 0.125, "o_proj": 0.25}, {"qkv_proj": 0.375, "o_proj": 0.75}]
        about = {"kind": "sampled", "name": "seed 0", "windows": [2, 64], "sha256": "c" * 64}
        before = {"before": 20.0, "after": 25.0, "ratio": 1.25, "tokens": 99}
        seconds = {"total": 54.5, "stages": {"quantize": 40.25}}
        card |= {"relative_error": errors, "calibration": about, "perplexity": before, "seconds": seconds}
        (copy / "quantization.json").write_text(json.dumps(card))
        shown = run("inspect", copy).stdout
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
        assert ["scheme", "bf16"] in rows
        assert ["versions.jax", card["job"]["versions"]["jax"]] in rows
        assert ["1", "0.3750", "0.7500"] in rows
        assert ["mean", "0.2500", "0.5000"] in rows
        assert ["total", "54.5"] in rows and ["stages.quantize", "40.25"] in rows
        assert ["largest", "0.3750", "0.7500"] in rows
        assert ["ratio", "1.25"] in rows
        # Hashes are shown whole, over two lines if they must.
        assert card["job"]["source_sha256"] in "".join(row[1] for row in rows if len(row) == 2)
        parts = {row[0] for row in rows if row}
        assert {"params/layers", "params/shared", "tokenizer", "together"} <= parts
        assert ["sliding window", "none"] in rows

    @pytest.mark.parametrize(
        ("windows", "shown"),
        [([4096, 4096], "4096"), ([None, 64], "layers: none in 0, 64 in 1"), ([None, None], "none")],
    )
    def test_windows(self, checkpoint, tmp_path, windows, shown):
        copy = tmp_path / "copy"
        shutil.copytree(checkpoint, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"windows": windows}))
        assert re.search(rf"sliding window +│ {shown} ", run("inspect", copy).stdout)

    def test_not_a_checkpoint(self, tmp_path):
        fails("inspect", tmp_path, parts=[tmp_path])


class TestProgram:
    def test_help_names_every_command(self):
        shown = run("--help").stdout
        commands = "convert", "generate", "batch", "eval", "compare", "ablate", "inspect", "explain", "demo"
        for command in commands:
            assert command in shown
            assert "--json" in run(command, "--help").stdout
        assert "serve" in shown

    def test_help_shows_every_default(self):
        """What is asked for when an option is left out; a switch without a counterpart is off."""
        group = typer.main.get_command(app)
        assert isinstance(group, TyperGroup)
        context = group.make_context("atom-jax", ["--help"], resilient_parsing=True)
        shown = 0
        for name, command in group.commands.items():
            for option in command.get_params(context):
                if not isinstance(option, TyperOption) or option.required:
                    continue
                if option.is_flag and not option.secondary_opts:
                    assert not option.default, option.name
                    continue
                record = option.get_help_record(context)
                assert record is not None and "default: " in record[1], f"{name} --{option.name}: {record}"
                shown += 1
        assert shown > 60

    def test_defaults_of_the_recipe(self):
        shown = " ".join(run("convert", "--help").stdout.replace("│", " ").split())
        assert "[default: (4; 16 in bf16, w3a16, w4a16, w8a8)]" in shown
        assert "[default: (on; off in bf16, w3a16, w4a16, w8a8)]" in shown  # --center-keys
        assert "[default: (searched)]" in shown

    def test_version(self):
        assert run("--version").stdout == f"atom-jax {atom_jax.__version__}\n"

    def test_wrong_usage(self):
        assert run("generate", status=2).stdout == ""
        assert run("generate", "ckpt", "--no-such-option", status=2).stdout == ""
        assert run("nothing", status=2).stdout == ""

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (OSError(28, "No space left on device", "some/file"), "some/file: No space left on device"),
            (PermissionError(13, "Permission denied", "some/file"), "some/file: Permission denied"),
            (OSError("strange"), "strange"),
            (MemoryError(), "out of memory"),
            (atom_jax.AtomError("a\nb"), "a b"),
        ],
    )
    def test_errors_are_one_line(self, monkeypatch, error, line):
        def load(path):
            raise error

        monkeypatch.setattr("atom_jax.load", load)
        assert fails("generate", "ckpt", "--prompt", "a", parts=[]) == [f"error: {line}"]

    def test_bug_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr("atom_jax.load", lambda path: 1 // 0)
        result = CliRunner().invoke(app, ["generate", "ckpt", "--prompt", "a"])
        assert isinstance(result.exception, ZeroDivisionError)

    def test_interrupt(self, monkeypatch):
        def load(path):
            raise KeyboardInterrupt

        monkeypatch.setattr("atom_jax.load", load)
        assert run("generate", "ckpt", "--prompt", "a", status=130).stdout == ""

    def test_interrupted_process(self, checkpoint, tmp_path):
        """A real SIGINT while the program waits for a prompts file that is a pipe nobody writes to."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        # A test run in the background of a shell ignores the signal, and its children inherit that.
        listen = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        listen += "os.execv(sys.argv[1], sys.argv[1:])"
        program = [sys.executable, "-m", "atom_jax", "generate", checkpoint, "--prompts-file", pipe]
        process = subprocess.Popen(
            [sys.executable, "-c", listen, *program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with pipe.open("wb"):  # opens when the program does
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        assert (process.returncode, out) == (130, "")
        assert "Traceback" not in err

    def test_reader_that_goes_away(self, checkpoint):
        result = subprocess.run(
            f"{sys.executable} -m atom_jax inspect {checkpoint} --json | true",
            shell=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert (result.stdout, result.stderr) == ("", "")

    def test_format_bytes(self):
        assert [console.format_bytes(size) for size in (0, 999, 1000, 98_362_432, 2_500_000_000)] == [
            "0 B",
            "999 B",
            "1.0 kB",
            "98.4 MB",
            "2.50 GB",
        ]
