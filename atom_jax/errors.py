"""The exception a user of the library or the command line has to know, and how a wrong name is answered."""

import difflib
from collections.abc import Iterable


class AtomError(ValueError):
    """Input that cannot be used: a file, a tensor, an option, a prompt.

    The message is one line that names the culprit (file, tensor, shape expected and found) and,
    where there is one, the remedy. The command line prints it and exits with status 2.
    """


def one_line(error: BaseException) -> str:
    """The message of an exception from a library, as one line of a bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:197]}..." if len(text) > 200 else text


class WriteError(AtomError):
    """A file cannot be written, e.g. because the disk is full: nothing of the input is wrong."""


def not_one_of(what: str, value: object, choices: Iterable[object]) -> AtomError:
    """The error for a ``value`` that is none of ``choices``, with the one that was probably meant.

    Args:
      what: whose value it is, e.g. "scheme".
    """
    names = [str(choice) for choice in choices]
    return AtomError(f"{what} {value!r} is not one of {', '.join(names)}{did_you_mean(value, names)}")


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """``; did you mean NAME?``, or nothing where no name is near enough to ``value``."""
    by_lower_case, wrong = {name.lower(): name for name in names}, str(value).lower()
    begun = [name for name in by_lower_case if wrong and name.startswith(wrong)]
    near = begun or difflib.get_close_matches(wrong, by_lower_case, n=1)
    return f"; did you mean {by_lower_case[near[0]]}?" if near else ""
