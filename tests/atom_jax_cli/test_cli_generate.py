import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import SamplingParams, generate, hosts, load
from atom_jax_cli.generate import Generation
from tests.atom_jax.command import PROMPT, fails, run, run_json, subprocess_run


class TestGenerate:
    def tokens(self, checkpoint, prompt, count, **options):
        model = load(checkpoint)
        ids = jnp.asarray([model.tokenizer(prompt).input_ids], jnp.int32)
        lengths = jnp.asarray([ids.shape[1]], jnp.int32)
        out = generate(model.params, ids, lengths, config=model.config, max_new_tokens=count, **options)
        return model, np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()

    def test_streamed_text_is_that_of_generate(self, checkpoint):
        model, tokens = self.tokens(checkpoint, PROMPT, 16)
        result = run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 16)
        ended = tokens[-1] in model.config.eos_token_ids
        text = model.tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=True)
        assert result.stdout == f"{text}\n"
        assert "tokens/s" in result.stderr

    def test_prompt_after_the_checkpoint(self, checkpoint):
        options = ("--max-new-tokens", 8)
        want = run("generate", checkpoint, "--prompt", PROMPT, *options).stdout
        assert run("generate", checkpoint, PROMPT, *options).stdout == want
        both = run_json("generate", checkpoint, PROMPT, "--prompt", "12", *options)["results"]
        assert [result["prompt"] for result in both] == [PROMPT, "12"]
        # Words without quotes are a mistake, not prompts of their own.
        assert "extra argument" in run("generate", checkpoint, "the", "tin", status=2).stderr

    def test_text_comes_piece_by_piece(self, checkpoint, monkeypatch):
        """Each step's text is written before the next step is taken."""
        model = load(checkpoint)
        written, seen = [], []

        def stream(model, **request):
            for token in model.tokenizer("the 12", add_special_tokens=False).input_ids:
                seen.append("".join(written))
                yield np.asarray([token]), np.asarray([True])

        monkeypatch.setattr(hosts, "call_stream", stream)
        monkeypatch.setattr(sys.stdout, "write", written.append)
        Generation(model, 8, SamplingParams()).stream([3], echo=True)
        assert seen == ["", "the", "the "]
        assert "".join(written) == "the 12\n"

    def test_json(self, checkpoint):
        model, tokens = self.tokens(checkpoint, PROMPT, 8)
        got = run_json("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 8)
        (result,) = got["results"]
        assert result["prompt"] == PROMPT
        assert result["tokens"] == tokens
        assert result["finish_reason"] == "length"
        assert result["prompt_tokens"] == got["prompt_tokens"] == len(model.tokenizer(PROMPT).input_ids)
        assert got["new_tokens"] == 8
        assert got["seconds"] >= got["seconds_to_first_token"] > 0
        assert got["tokens_per_second"] > 0

    def test_stop_id_ends_the_text_and_is_not_in_it(self, checkpoint):
        model, tokens = self.tokens(checkpoint, PROMPT, 8)
        stop = next(token for token in tokens[1:] if token != tokens[0])
        count = tokens.index(stop) + 1
        args = ("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 8, "--stop-id", stop)
        (result,) = run_json(*args)["results"]
        assert (result["tokens"], result["finish_reason"]) == (tokens[:count], "stop")
        assert result["text"] == model.tokenizer.decode(tokens[: count - 1], skip_special_tokens=True)
        assert run(*args).stdout == result["text"] + "\n"

    def test_batch_from_options_and_files(self, checkpoint, tmp_path):
        lines, records = tmp_path / "lines.txt", tmp_path / "records.jsonl"
        lines.write_text(f"{PROMPT}\n\na longer prompt than the others\n")
        records.write_text('{"prompt": "12\\n12"}\n\n{"prompt": "the", "other": 1}\n{"prompt": "a"}\n')
        common = ("--max-new-tokens", 8)
        got = run_json("generate", checkpoint, "--prompt", "the", "--prompts-file", lines, *common)
        assert [result["prompt"] for result in got["results"]] == [
            "the",
            PROMPT,
            "a longer prompt than the others",
        ]
        for result in got["results"]:
            assert result["tokens"] == self.tokens(checkpoint, result["prompt"], 8)[1]
        got = run_json("generate", checkpoint, "--prompts-file", records, *common)
        assert [result["prompt"] for result in got["results"]] == ["12\n12", "the", "a"]
        shown = run("generate", checkpoint, "--prompts-file", records, *common).stdout
        assert all(result["text"] in shown for result in got["results"])

    def test_sampling_is_that_of_the_library(self, checkpoint):
        options = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--max-new-tokens", 8)
        args = ("generate", checkpoint, "--prompt", PROMPT, *options)
        want = self.tokens(
            checkpoint, PROMPT, 8, key=jax.random.key(7), sampling=SamplingParams(1.5, 50, 0.9)
        )[1]
        assert run_json(*args, "--seed", 7)["results"][0]["tokens"] == want
        assert run_json(*args, "--seed", 8)["results"][0]["tokens"] != want

    def test_chat_template(self, checkpoint):
        tokenizer = load(checkpoint).tokenizer
        want = len(tokenizer("<|turn|>" + PROMPT, add_special_tokens=False).input_ids)
        got = run_json("generate", checkpoint, "--chat", "--prompt", PROMPT, "--max-new-tokens", 1)
        assert got["prompt_tokens"] == want

    @pytest.mark.parametrize(
        ("args", "parts"),
        [
            ((), ["--prompt", "--prompts-file"]),
            (("--prompt", ""), ["''", "no tokens"]),
            (("--prompt", "the " * 200), ["128"]),
            (("--prompt", "the", "--max-new-tokens", "0"), ["max_new_tokens"]),
            (("--prompt", "the", "--temperature", "-1"), ["temperature"]),
            (("--prompt", "the", "--top-p", "2"), ["top-p"]),
        ],
    )
    def test_errors(self, checkpoint, args, parts):
        fails("generate", checkpoint, *args, parts=parts)

    @pytest.mark.parametrize(
        ("name", "data", "parts"),
        [
            ("missing.txt", None, ["missing.txt", "No such file"]),
            ("empty.txt", b" \n", ["empty.txt", "no prompt"]),
            ("latin.txt", b"caf\xe9", ["latin.txt", "UTF-8"]),
            ("bad.jsonl", b'{"prompt": "a"}\n{', ["bad.jsonl", "line 2", "JSON"]),
            ("other.jsonl", b'{"text": "a"}', ["other.jsonl", "line 1", '"prompt"']),
        ],
    )
    def test_bad_prompts_files(self, checkpoint, tmp_path, name, data, parts):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        fails("generate", checkpoint, "--prompts-file", tmp_path / name, parts=parts)

    def test_no_chat_template(self, checkpoint, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(checkpoint, copy)
        settings = copy / "tokenizer" / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
        fails("generate", copy, "--chat", "--prompt", "the", parts=["chat template", "--chat"])

    @pytest.mark.parametrize(
        ("template", "part"),
        [
            ("{{ raise_exception('no system role') }}", "no system role"),
            ("{{ messages[0].content.nothing() }}", "nothing"),
            ("{{ messages[7].role }}", "no element 7"),
            ("{{ 1 // 0 }}", "zero"),
            ("{{ messages | sort(attribute='x') | join(1, 2, 3, 4) }}", "chat template fails"),
            ("{% for message in messages %}", "chat template fails"),
            ("{{ 'a' * 10 + 1 }}", "chat template fails"),
            ([{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}], "default"),
        ],
    )
    def test_chat_template_that_fails(self, checkpoint, tmp_path, template, part):
        """A template is the vendor's program: whatever it raises is one line."""
        copy = tmp_path / "copy"
        shutil.copytree(checkpoint, copy)
        (copy / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
        settings = copy / "tokenizer" / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
        parts = ["the model's chat template fails", part, "leave --chat out"]
        fails("generate", copy, "--chat", "--prompt", "the", parts=parts)

    @pytest.mark.parametrize("options", [(), ("--chat",)])
    def test_prompt_that_is_not_unicode(self, checkpoint, options, tmp_path):
        """Bytes that are no UTF-8 on the command line, and half of a pair in a file."""
        (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}')
        bytes_of_the_shell = b"\xff".decode(errors="surrogateescape")
        for prompt in (("--prompt", bytes_of_the_shell), ("--prompts-file", tmp_path / "half.jsonl")):
            fails("generate", checkpoint, *prompt, *options, parts=["not valid Unicode"])

    def test_not_a_checkpoint(self, original, tmp_path):
        fails("generate", tmp_path / "no", "--prompt", "the", parts=[tmp_path / "no"])
        fails("generate", original, "--prompt", "the", parts=[original, "atom-jax convert"])

    def test_subprocess(self, checkpoint):
        """The real program: stdout is the text, and nothing of it is lost or added by libraries."""
        want = run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 8).stdout
        result = subprocess_run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 8)
        assert (result.returncode, result.stdout) == (0, want)
        (line,) = result.stderr.splitlines()
        assert line.startswith("8 tokens in ")
