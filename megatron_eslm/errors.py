"""The one exception that means "the user can mend this"."""


class ConfigError(ValueError):
    """Bad input: a flag, file, shape, layout or checkpoint that cannot be used.

    The message is one paragraph that names the flag or file, says what is wrong and what to do.
    Command lines print it without a traceback and exit with code 2.
    """
