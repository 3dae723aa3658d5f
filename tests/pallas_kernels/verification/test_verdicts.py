"""Verdicts: how long they hold, where they are kept, and what is checked when there are none."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from pallas_kernels.verification import verdicts
from pallas_kernels.verification.checks import all_checks
from pallas_kernels.verification.device import verify_device
from pallas_kernels.verification.verdicts import FAILED, GOOD, UNCHECKED, UNSUPPORTED
from pallas_kernels.verification.verify import Result
from tests.pallas_kernels.verification.hopper import DEVICE, KERNEL, children, forgotten, hopper, on

OPS = list(dict.fromkeys(check.op for check in all_checks().values()))


def good(op: str) -> Result:
    return Result(GOOD, "")


@pytest.fixture
def cache(tmp_path: Path):
    with hopper(tmp_path):
        yield tmp_path


def test_a_verdict_is_kept_and_used_by_the_next_process(cache):
    said: list[str] = []
    with children(good) as asked:
        found = verify_device(announce=said.append)
        assert found is not None and {v.outcome for v in found.verdicts} == {GOOD}
        assert asked == [list(all_checks())]
        assert len(said) == 1 and DEVICE in said[0]
        with forgotten():
            again = verify_device(announce=said.append)
            assert again is not None and again.verdicts == found.verdicts
            assert verdicts.objection(DEVICE, "quantize", KERNEL) is None
        assert verify_device() is found
    assert len(asked) == 1 and len(said) == 1
    assert [path.parent.name for path in cache.rglob("*.json")] == ["verdicts"]
    assert list(cache.rglob("*.partial")) == []


def test_only_what_is_not_known_is_checked_and_all_on_request(cache):
    verdicts.write(on("quantize"))
    with children(good) as asked:
        verify_device()
        verify_device(again=True)
    assert {all_checks()[name].op for name in asked[0]} == set(OPS) - {"quantize"}
    assert asked[1] == list(all_checks())


@pytest.mark.parametrize("what", ["jax", "device", "sources"])
def test_a_verdict_holds_for_one_jax_device_and_source(cache, what, monkeypatch):
    with children(good) as asked:
        verify_device()
        assert verdicts.objection(DEVICE, "quantize", KERNEL) is None
        if what == "jax":
            monkeypatch.setattr(jax, "__version__", "99.0")
        if what == "sources":
            monkeypatch.setattr(verdicts, "sources_hash", lambda: "0" * 64)
        with hopper(cache, kind="NVIDIA H100" if what == "device" else DEVICE):
            kind = "NVIDIA H100" if what == "device" else DEVICE
            assert verdicts.objection(kind, "quantize", KERNEL) == verdicts.NOT_VERIFIED
            verify_device()
    assert len(asked) == 2
    assert len(list(cache.rglob("*.json"))) == 2


def test_the_hash_is_of_every_source_file(tmp_path, monkeypatch):
    def of(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.py").write_text(content)
        (folder / "notes.txt").write_text(str(folder))
        monkeypatch.setattr(verdicts, "_SOURCES", folder)
        return verdicts.sources_hash.__wrapped__()

    assert len(verdicts.sources_hash()) == 64
    first = of(a="1", b="2")
    assert of(a="1", b="2") == first
    assert len({first, of(a="1", b="3"), of(a="1", c="2"), of(a="12", b=""), of(a="1")}) == 5


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "{}",
        b"\xff",
        {"verdicts": None},
        {"verdicts": [1]},
        {"verdicts": [{"op": "quantize"}]},
        {"verdicts": [["quantize", KERNEL, GOOD, "", 1]]},
        {"verdicts": [{**on("quantize").verdicts[0]._asdict(), "outcome": "fine"}]},
        {"verdicts": [{**on("quantize").verdicts[0]._asdict(), "op": 3}]},
        {"device": "another"},
        {"sources": "1" * 64},
    ],
)
def test_a_damaged_file_is_absent_and_written_anew(cache, damage):
    file = verdicts.write(on("quantize"))
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(file.read_text()) | damage)
    file.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert verdicts.objection(DEVICE, "quantize", KERNEL) == verdicts.NOT_VERIFIED
    said: list[str] = []
    with children(good) as asked:
        verify_device(announce=said.append)
    assert asked == [list(all_checks())]
    assert str(file) in said[0] and "anew" in said[0]
    found = verdicts.read(DEVICE)
    assert found is not None and {v.op for v in found.verdicts} == set(OPS)


def test_what_could_not_be_checked_is_tried_again_by_the_next_process(cache):
    late = Result(UNCHECKED, "not reached within 60 s")
    with children(lambda op: late if op == "kv_append" else good(op)) as asked:
        verify_device()
        verify_device()  # not in this one
        objection = verdicts.objection(DEVICE, "kv_append", KERNEL)
        assert objection is not None and "not verified" in objection and "not reached" in objection
        with forgotten():
            verify_device()
    assert [{all_checks()[name].op for name in names} for names in asked] == [set(OPS), {"kv_append"}]


def test_failures_are_kept_with_their_reason(cache):
    with children(lambda op: Result(FAILED, "hang") if op == "quantize" else Result(UNSUPPORTED, "old jax")):
        verify_device()
    with forgotten(), children(good) as asked:
        verify_device()
        assert asked == []
        for op, said in (("quantize", "failed on this device: hang"), ("kv_append", "unsupported")):
            objection = verdicts.objection(DEVICE, op, KERNEL)
            assert objection is not None and said in objection and "atom-jax doctor" in objection


def test_a_folder_that_cannot_be_written_is_told(cache, monkeypatch):
    (cache / "atom-jax").write_text("a file where the folder should be")
    said: list[str] = []
    with children(good):
        found = verify_device(announce=said.append)
    assert found is not None and verdicts.adopted(DEVICE) is found
    assert "cannot be kept" in said[-1]


def test_there_is_nothing_to_check_on_a_cpu(tmp_path):
    with children(good) as asked:
        assert verify_device(again=True) is None
    assert asked == []
