"""``atom-jax batch``: every request has one result in the end, whatever stops a run."""

import fcntl
import functools
import json
import subprocess
import sys
import textwrap
import time

import pytest

from atom_jax.batch import engine_answers
from atom_jax.batch_files import BatchResult, run_batch
from atom_jax.checkpoint import TOKENIZER_FOLDER
from tests.atom_jax.command import ROOT, fails, run_json
from tests.atom_jax.server.fake import FakeEngine, expected, served
from tests.convert.tiny import fails as raises
from tests.convert.tiny import save_tokenizer


def line(number, **changes):
    body = {"model": "tiny", "prompt": [number + 1], "max_tokens": 1 + number % 5, "seed": 0}
    record = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
    return record | changes


def write(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def read(path):
    return [json.loads(each) for each in path.read_text().splitlines()]


def texts(path):
    """The text of each custom id; there is no id twice."""
    found = {record["custom_id"]: record for record in read(path)}
    assert len(found) == len(read(path))
    return {key: record["response"]["body"]["choices"][0]["text"] for key, record in found.items()}


def answers(count):
    return {f"r{number}": expected([number + 1], 1 + number % 5) for number in range(count)}


@pytest.fixture
def go(tmp_path, tokenizer):
    """``go(lines)``: runs them into out.jsonl and returns its path and what the last report was."""

    def run(lines, engine=None, ahead=6):
        requests, results = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
        engine = engine or FakeEngine()
        answer = functools.partial(engine_answers, engine, served(tokenizer), ahead=ahead)
        end = run_batch(answer, requests, results, model_name="tiny")
        assert not engine.requests
        return results, end

    return run


def test_every_request_has_a_result(go):
    path, end = go([line(number) for number in range(20)])
    assert texts(path) == answers(20)
    assert (end.total, end.done, end.failed) == (20, 20, 0)
    assert end.tokens == sum(map(len, answers(20).values()))


def test_an_answer_that_the_engine_gave_up_is_an_error(go):
    engine = FakeEngine()
    engine.end_reason = "abort"
    several = line(0)
    several["body"]["n"] = 3
    path, end = go([several, line(1)], engine)
    assert (end.done, end.failed) == (2, 2)
    for record in read(path):
        assert record["response"]["status_code"] == 500
        assert record["response"]["body"]["error"]["code"] == "grammar_failed"


def test_the_format_is_openais(go):
    messages = [{"role": "user", "content": "the tin"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 3, "n": 2}
    (result,) = read(go([line(0, url="/v1/chat/completions", body=body)])[0])
    assert result["id"].startswith("batch_req_") and result["error"] is None
    response = result["response"]
    assert response["status_code"] == 200 and response["request_id"]
    assert response["body"]["object"] == "chat.completion"
    assert len(response["body"]["choices"]) == 2
    assert response["body"]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a" * 100}, "prompt"),
        ({"stream": True}, "stream"),
        ({"prompt": [1], "stop": [""]}, "stop.0"),
        ({"prompt": [[1], [1000]]}, "prompt"),
        ({"model": 3}, "model"),
    ],
)
def test_a_bad_request_costs_only_itself(go, change, param):
    path, end = go([line(0), line(1, body=line(1)["body"] | change), line(2)])
    results = {record["custom_id"]: record["response"] for record in read(path)}
    assert results["r1"]["status_code"] == 400
    assert results["r1"]["body"]["error"]["param"] == param
    assert results["r0"]["status_code"] == results["r2"]["status_code"] == 200
    assert (end.done, end.failed) == (3, 1)


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([[1]], ["line 1", "object expected"]),
        ([line(0), line(0)], ["line 2", "'r0'", "twice"]),
        ([line(0, custom_id="")], ["line 1", "custom_id"]),
        ([line(0), line(1, custom_id="\ud800")], ["line 2", "custom_id", "Unicode"]),
        ([line(0), line(1, url="/v1/embeddings")], ["line 2", "/v1/chat/completions"]),
        ([line(0, body=None)], ["line 1", "body"]),
        ([line(0, body={"model": "gpt"})], ["line 1", "'gpt'", "--model-name"]),
    ],
)
def test_a_bad_file_is_refused_whole(go, tmp_path, lines, parts):
    with raises(tmp_path / "in.jsonl", *parts):
        go(lines)
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_is_done_twice(go):
    path, _ = go([line(number) for number in range(5)])
    before = path.read_text()
    path, end = go([line(number) for number in range(8)])
    assert path.read_text().startswith(before)
    assert texts(path) == answers(8)
    assert (end.done, end.tokens) == (8, sum(len(answers(8)[f"r{n}"]) for n in (5, 6, 7)))


def run_with(answer, tmp_path):
    requests = write(tmp_path / "in.jsonl", [line(number) for number in range(3)])
    return run_batch(answer, requests, tmp_path / "out.jsonl", model_name="tiny")


def test_a_second_result_of_a_request_is_left_out(tmp_path):
    def twice(requests):
        for request in requests:
            yield BatchResult(request.custom_id, 200, {"answer": 1}, tokens=2)
            yield BatchResult(request.custom_id, 200, {"answer": 2}, tokens=2)

    end = run_with(twice, tmp_path)
    assert (end.done, end.tokens) == (3, 6)
    found = [(each["custom_id"], each["response"]["body"]) for each in read(tmp_path / "out.jsonl")]
    assert found == [(f"r{number}", {"answer": 1}) for number in range(3)]


def test_a_request_without_a_result_is_an_error(tmp_path):
    with raises(tmp_path / "out.jsonl", "2 requests got no result"):
        run_with(lambda requests: [BatchResult(next(requests).custom_id, 200, {})], tmp_path)
    assert len(read(tmp_path / "out.jsonl")) == 1
    run_with(lambda requests: (BatchResult(each.custom_id, 200, {}) for each in requests), tmp_path)
    assert [each["custom_id"] for each in read(tmp_path / "out.jsonl")] == ["r0", "r1", "r2"]


def test_nobody_is_asked_when_all_is_done(go, tmp_path):
    go([line(number) for number in range(3)])
    run_with(None, tmp_path)


def test_a_torn_line_is_done_again(go, tmp_path):
    lines = [line(number) for number in range(3)]
    path, _ = go(lines)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        go(lines)
        assert texts(path) == answers(3)


def test_results_of_other_requests_are_refused(go, tmp_path):
    path, _ = go([line(7)])
    before = path.read_bytes()
    with raises(path, "line 1", "'r7'"):
        go([line(1)])
    path.write_bytes(b"no JSON\n")
    with raises(path, "line 1", "not JSON"):
        go([line(1)])
    path.write_bytes(before * 2)
    with raises(path, "line 2", "twice"):
        go([line(7)])


def test_one_run_at_a_time(go, tmp_path):
    out = tmp_path / "out.jsonl"
    with out.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with raises(out, "another run writes it"):
            go([line(0)])


PROGRAM = """
    import sys
    from pathlib import Path
    from atom_jax.batch import engine_answers
    from atom_jax.batch_files import run_batch
    from atom_jax.checkpoint import load_tokenizer
    from tests.atom_jax.server.fake import FakeEngine, served

    folder, *files = map(Path, sys.argv[1:])
    model = served(load_tokenizer(folder))
    engine = FakeEngine(step_seconds=0.004)
    run_batch(lambda requests: engine_answers(engine, model, requests, ahead=6), *files, model_name="tiny")
"""


@pytest.mark.slow
def test_kill_loses_and_repeats_nothing(go, tmp_path):
    (tmp_path / TOKENIZER_FOLDER).mkdir()
    save_tokenizer(tmp_path / TOKENIZER_FOLDER)
    lines = [line(number) for number in range(120)]
    requests, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    for enough in (15, 60):
        program = [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, (tmp_path, requests, out))]
        process = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not out.exists() or out.read_bytes().count(b"\n") < enough:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert out.read_bytes().count(b"\n") < len(lines)
    assert texts(go(lines)[0]) == answers(120)


class TestCommand:
    @pytest.mark.slow
    def test_answers_are_those_of_generate(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr("atom_jax.compilation_cache.enable_compilation_cache", lambda: None)
        prompts = ["the tin", "a hut", "12 12"]
        bodies = [
            {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0} for prompt in prompts
        ]
        requests = write(tmp_path / "in.jsonl", [line(n, body=body) for n, body in enumerate(bodies)])
        options = ("--max-num-seqs", 2, "--max-model-len", 32, "--token-budget", 66)
        summary = run_json("batch", checkpoint, requests, tmp_path / "out.jsonl", *options)
        assert (summary["total"], summary["done"], summary["failed"]) == (3, 3, 0)
        alone = [
            run_json("generate", checkpoint, "--prompt", prompt, "--max-new-tokens", 6)["results"][0]["text"]
            for prompt in prompts
        ]
        assert texts(tmp_path / "out.jsonl") == {f"r{n}": text for n, text in enumerate(alone)}

    def test_what_is_wrong_is_said_before_the_model_is_loaded(self, tmp_path):
        requests = write(tmp_path / "in.jsonl", [line(0, body={"model": "gpt"})])
        fails("batch", tmp_path / "no-model", requests, tmp_path / "out.jsonl", parts=["line 1", "'gpt'"])
        fails("batch", tmp_path / "no-model", tmp_path / "none", tmp_path / "out.jsonl", parts=["none"])
