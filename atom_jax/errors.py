"""The one exception a user of the library or the command line has to know."""


class AtomError(ValueError):
    """Input that cannot be used: a file, a tensor, an option, a prompt.

    The message is one line that names the culprit (file, tensor, shape expected and found) and,
    where there is one, the remedy. The command line prints it and exits with status 2.
    """


def one_line(error: BaseException) -> str:
    """The message of an exception from a library, as one line of a bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:197]}..." if len(text) > 200 else text
