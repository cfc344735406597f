"""What goes wrong when the input is at fault."""


class InputError(ValueError):
    """A file, setting or array from the user that cannot be used.

    The message says what was given, what is allowed and how to mend it. The command line prints it
    and leaves with status 2.
    """


def one_line(text: str, most: int = 300) -> str:
    """Text of another's making as a message may hold it: printable, on one line, cut to `most` characters."""
    text = " ".join(text.split())
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
