"""Preprocess a corpus of many files, or the share of one process in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_eslm.data.bad_lines import OnBadLine
from megatron_eslm.data.document_fields import DocumentFields
from megatron_eslm.data.input_list import input_files
from megatron_eslm.data.parts.domain_names import domain_names
from megatron_eslm.data.parts.make import make_parts
from megatron_eslm.data.parts.merge import merge_parts
from megatron_eslm.data.parts.plan import parts_folder
from megatron_eslm.data.preprocess import check_numbers
from megatron_eslm.data.publish import refuse_existing
from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.output_prefix import output_prefix as parse_prefix

logger = logging.getLogger(__name__)


def preprocess_in_parts(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    *,
    split_key: str | None = None,
    domain_names_file: str | None = None,
    index: int | None = None,
    of: int | None = None,
    workers: int = 1,
    append_eod: bool = True,
    text_key: str = "text",
    on_bad_line: OnBadLine = "fail",
    overwrite: bool = False,
    log_interval_seconds: float = 10.0,
) -> list[Path]:
    """Tokenize many files, resuming what an earlier call began.

    Args:
        inputs: files, folders, patterns and `@LIST`s.
        output_prefix: pairs are `PREFIX/DOMAIN` with a split key, else `PREFIX`.
        split_key: field that names a document's domain.
        domain_names_file: YAML file of names by value.
        index, of: which share of the files; None: all, and merge at the end.
        tokenizer, workers, append_eod, text_key, on_bad_line, overwrite, log_interval_seconds: as
            for `preprocess`.

    Returns:
        Prefixes of the pairs; empty for a share, which `merge_parts` ends.

    Raises:
        ConfigError: bad input or existing output. Finished inputs are kept in `PREFIX.parts`.
    """
    check_numbers(workers, log_interval_seconds)
    prefix = Path(output_prefix) if split_key is not None else parse_prefix(output_prefix)
    names = domain_names(domain_names_file)
    files = input_files(inputs)
    if not (parts_folder(prefix) / "publishing").exists():
        for idx in prefix.glob("*.idx") if split_key is not None else ():
            refuse_existing(idx.with_suffix(""), overwrite)
        if split_key is None:
            refuse_existing(prefix, overwrite)
    if not append_eod:
        logger.warning(
            "%s: without --append-eod, nothing marks where a document ends and the next begins",
            prefix,
        )
    complete = make_parts(
        list(inputs),
        files,
        prefix,
        tokenizer,
        fields=DocumentFields(text_key=text_key, split_key=split_key),
        names=names,
        workers=workers,
        append_eod=append_eod,
        on_bad_line=on_bad_line,
        index=index or 0,
        of=of or 1,
        log_interval_seconds=log_interval_seconds,
    )
    if of is not None:
        if complete:
            logger.info("all inputs are done: tools/merge_data.py --output-prefix %s", prefix)
        return []
    try:
        return merge_parts(prefix, overwrite=overwrite)
    except OSError as error:
        raise ConfigError(
            f"--output-prefix {prefix} cannot be written: {error}. Free some space or choose "
            "another place; finished inputs are kept."
        ) from error
