"""English that comes with every CPython: its help topics, 460,000 characters of technical prose."""

from __future__ import annotations


def help_topics() -> tuple[str, str]:
    """Two halves of the text: one to calibrate on, and one that only measurements see.

    They differ between versions of Python; what a result depends on is recorded with it.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    half = len(text) // 2
    return text[:half], text[half:]
