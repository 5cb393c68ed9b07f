"""The one exception that means "the user can mend this"."""


class ConfigError(ValueError):
    """Bad input: a flag, file, shape, layout or checkpoint that cannot be used.

    The message is one paragraph that names the flag or file, says what is wrong and what to do.
    Command lines print it without a traceback and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough to be quoted within a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
