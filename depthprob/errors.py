"""What goes wrong when the input is at fault."""

LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """A file, setting or array from the user that cannot be used.

    The message says what was given, what is allowed and how to mend it, on one line whatever was given: control characters are
    escaped and the middle of a long one is left out. The command line prints it and leaves with status 2.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")
