import sys

import pytest

from tests.atom_jax.command import fails


@pytest.mark.parametrize("options", [(), ("--text", "a.txt", "--tasks", "arc_easy")])
def test_text_and_tasks_are_alternatives(options):
    fails("eval", "ckpt", *options, parts=["--text", "--tasks"])


def test_tasks_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.api.model", raising=False)
    monkeypatch.delitem(sys.modules, "atom_jax.lm_eval_adapter", raising=False)
    assert fails("eval", "ckpt", "--tasks", "arc_easy", parts=["pip install 'atom-jax[eval]'"])
    assert "atom_jax.lm_eval_adapter" not in sys.modules
