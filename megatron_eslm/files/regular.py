"""Opening a file without believing that it is one."""

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

    A named pipe that nobody writes to would keep `open` waiting for ever; here it is refused.

    Raises:
        FileNotFoundError: nothing is there. The caller knows what that means.
        ConfigError: it is no regular file, or it cannot be opened.
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
        raise ConfigError(f"{path} must be a regular file and is {kind}.")
    return os.fdopen(descriptor, "rb")
