"""What goes wrong when the input is at fault."""


class InputError(ValueError):
    """A file, setting or array from the user that cannot be used.

    The message says what was given, what is allowed and how to mend it. The command line prints it
    and leaves with status 2.
    """
