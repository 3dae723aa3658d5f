"""English text that comes with CPython: its help topics, 460,000 characters of technical prose."""

from __future__ import annotations


def help_topics() -> tuple[str, str]:
    """The two halves of the text: the first for calibration, the second only for measurements.

    The text differs between versions of Python, so results are stored with the version of Python.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    half = len(text) // 2
    return text[:half], text[half:]
