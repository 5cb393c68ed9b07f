"""Open regular files only; refuse pipes, devices and folders."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from megatron_eslm.errors import ConfigError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading.

    Refuses anything else: `open` on a named pipe without a writer, for example, blocks forever.

    Raises:
        FileNotFoundError: the file does not exist. The caller decides what that means.
        ConfigError: it is not a regular file, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except ValueError as error:  # a NUL character
        raise ConfigError(f"{str(path)!r} is not a path: {error}.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ConfigError(f"{path} must be a regular file but is {kind}.")
    return os.fdopen(descriptor, "rb")
