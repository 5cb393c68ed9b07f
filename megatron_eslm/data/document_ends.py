"""Check that documents are separated by the end-of-document id."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from megatron_eslm.data.index_file import IndexFile
from megatron_eslm.data.meta import DataMeta
from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

_LOOK_AT_IDS = 1 << 22


def check_document_ends(
    domains: Iterable[tuple[IndexFile, DataMeta | None]], eod: int, relying: Sequence[str]
) -> None:
    """Warn of domains that were written without --append-eod.

    A pair without metadata counts as such if there is no `eod` among its first few million ids.

    Args:
        domains: the pairs and their metadata.
        eod: the tokenizer's end-of-document id.
        relying: flags of the run that rely on that id.

    Raises:
        ConfigError: the run relies on the id, but the flag would have no effect in such a
            domain.
    """
    without = [index.prefix for index, meta in domains if not _has_ends(index, meta, eod)]
    if not without:
        return
    what = f"{', '.join(without)}: no end-of-document id ({eod}) follows the documents"
    remedy = "preprocess again with --append-eod"
    if relying:
        raise ConfigError(f"{relying[0]} has no effect on {what}. Leave the flag out, or {remedy}.")
    logger.warning("%s, so a model cannot tell where one ends; to change that, %s", what, remedy)


def _has_ends(index: IndexFile, meta: DataMeta | None, eod: int) -> bool:
    if meta is not None:
        return meta.append_eod
    return bool((index.ids()[:_LOOK_AT_IDS] == eod).any())
