"""Folders that appear complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.aside import aside_folder


@contextmanager
def published(target: str | Path, flag: str, replace_if_holds: str | None = None) -> Iterator[Path]:
    """Yield a fresh folder beside `target` that takes its place when the block ends well.

    If the block raises, the fresh folder is removed and `target` stays as it was.

    Args:
        target: where the folder is to appear.
        flag: the command-line flag that named it, for messages.
        replace_if_holds: replace an existing folder that holds a file of this name. Other folders
            with something in them are never replaced: a mistyped path must not cost data.

    Raises:
        ConfigError: `target` is taken, or its place cannot be written.
    """
    target = Path(target).absolute()
    _is_taken(target, flag, replace_if_holds)
    with ExitStack() as stack:
        try:
            aside = stack.enter_context(aside_folder(target))
        except OSError as error:
            raise ConfigError(
                f"{flag} {target} cannot be written: {error}. Choose another place or make room."
            ) from error
        yield aside
        # Asked again: another process may have been there meanwhile.
        _put_in_place(aside, target, _is_taken(target, flag, replace_if_holds))


def _is_taken(target: Path, flag: str, replace_if_holds: str | None) -> bool:
    """Whether something must be moved away first; ConfigError if that is not allowed."""
    if not target.exists():
        return False
    if target.is_dir() and not any(target.iterdir()):
        return True
    if replace_if_holds is None:
        raise ConfigError(
            f"{flag} {target} exists already and is not empty; give a new folder or remove it."
        )
    if not (target / replace_if_holds).is_file():
        raise ConfigError(
            f"{flag} {target} exists and holds no {replace_if_holds}, so it does not look like an "
            "earlier export and is not replaced; give a new folder or remove it."
        )
    return True


def _put_in_place(aside: Path, target: Path, taken: bool) -> None:
    if not taken:
        aside.rename(target)
        return
    old = target.with_name(f"{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old)
