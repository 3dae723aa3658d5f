"""Markdown tables, and their places in the pages of the documentation."""

from __future__ import annotations

import re


def table_row(*cells: str) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def with_table(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` in the place of the table of bench.``name``.

    The place is between the comments "table of bench.NAME" and "end of table".

    Raises:
      ValueError: the page has no such place.
    """
    place = re.compile(rf"(<!-- table of bench\.{name} -->\n).*?(<!-- end of table -->\n)", re.DOTALL)
    if place.search(page) is None:
        raise ValueError(f"there is no place for the table of bench.{name}")
    return place.sub(lambda found: f"{found[1]}{text}{found[2]}", page)
