"""The exceptions that users of the library and the command line see, and helpers for their messages."""

import difflib
from collections.abc import Iterable


class AtomError(ValueError):
    """Some input cannot be used: a file, a tensor, an option, a prompt.

    The message is one line that says what is wrong (file, tensor, shape expected and found) and, if there is
    one, the remedy. The command line prints it and exits with status 2.
    """


def one_line(error: BaseException) -> str:
    """The message of an exception from a library, as one line of a bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:197]}..." if len(text) > 200 else text


class WriteError(AtomError):
    """A file cannot be written, e.g. because the disk is full. The input itself is not at fault."""


def not_one_of(what: str, value: object, choices: Iterable[object]) -> AtomError:
    """The error for a ``value`` that is none of ``choices``; it suggests the choice that was probably meant.

    Args:
      what: name of the setting that has the value, e.g. "scheme".
      value: the wrong value.
      choices: all values that are allowed.
    """
    names = [str(choice) for choice in choices]
    return AtomError(f"{what} {value!r} is not one of {', '.join(names)}{did_you_mean(value, names)}")


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """``; did you mean NAME?`` with the name most similar to ``value``; empty if no name is similar."""
    by_lower_case, wrong = {name.lower(): name for name in names}, str(value).lower()
    begun = [name for name in by_lower_case if wrong and name.startswith(wrong)]
    near = begun or difflib.get_close_matches(wrong, by_lower_case, n=1)
    return f"; did you mean {by_lower_case[near[0]]}?" if near else ""
