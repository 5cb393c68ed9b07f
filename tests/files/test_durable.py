import errno
import logging
import os
from pathlib import Path

import pytest

from megatron_eslm.files import durable


def _no_folder_sync(number: int):
    real = os.fsync

    def fsync(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(number, os.strerror(number))
        real(file)

    return fsync


def test_a_folder_that_cannot_be_synced_is_said_once(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(durable, "_warned", False)
    monkeypatch.setattr(os, "fsync", _no_folder_sync(errno.EINVAL))
    with caplog.at_level(logging.WARNING):
        durable.write_whole(tmp_path / "a", b"1")
        durable.write_whole(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2" and len(caplog.records) == 1


def test_other_errors_are_errors(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", _no_folder_sync(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        durable.sync_folder(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a"
    durable.write_whole(path, b"1")

    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        durable.write_whole(path, b"2")
    assert path.read_bytes() == b"1" and os.listdir(tmp_path) == ["a"]
