"""Turn text into Megatron .bin/.idx files.

    megatron-eslm preprocess --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt \\
        --workers 8 --append-eod

A corpus of many files whose lines name their domain becomes a pair for each domain:

    megatron-eslm preprocess --input 'slimpajama/**/*.jsonl.zst' --output-prefix data/slimpajama \\
        --split-key meta.redpajama_set_name --workers 64 --append-eod ...

docs/data.md says what is read and what is written.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.data.bad_lines import OnBadLine
from megatron_eslm.data.data_options import TokenizerType
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import Flag, check_fields

if TYPE_CHECKING:
    from megatron_eslm.data.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to read, how to tokenize it and where to write."""

    input: Annotated[tuple[str, ...], Flag(metavar="INPUT")]
    """.jsonl/.json (also .gz, .bz2, .xz, .zst), .parquet or .txt files (a .txt file is one
    document), folders of those, - for JSON lines from standard input, folders of Hugging Face
    datasets, or data set names as NAME[:CONFIG[:SPLIT]]. Patterns ('chunk*/**/*.jsonl.zst') and
    @LIST, a text file of inputs, stand for the files they name."""

    output_prefix: Annotated[str, Flag(metavar="PREFIX")]
    """Path of the output without ending."""

    tokenizer_type: TokenizerType
    """Which tokenizer."""

    vocab_file: Annotated[str, Flag(metavar="FILE")] | None = None
    """GPT2BPETokenizer: vocab.json."""

    merge_file: Annotated[str, Flag(metavar="FILE")] | None = None
    """GPT2BPETokenizer: merges.txt."""

    tokenizer_model: Annotated[str, Flag(metavar="FILE")] | None = None
    """SentencePieceTokenizer: the .model file; HuggingFaceTokenizer: a tokenizer.json, a folder
    with one, or the name of a model on the hub."""

    workers: int = 1
    """Processes that tokenize."""

    append_eod: bool = False
    """End each document with the end-of-document id."""

    text_key: Annotated[str, Flag(metavar="KEY", also="--json-keys")] = "text"
    """Field or column that holds the text."""

    split_key: Annotated[str, Flag(metavar="KEY")] | None = None
    """Field that names a document's domain, such as meta.redpajama_set_name: a pair for each
    domain below --output-prefix."""

    domain_names: Annotated[str, Flag(metavar="FILE")] | None = None
    """YAML file of lines VALUE: NAME for the values of --split-key; any other is refused. Default:
    names for SlimPajama's values, other values name themselves."""

    index: Annotated[int, Flag(metavar="I")] | None = None
    """With --of: of N processes, the one with this number, from 0. tools/merge_data.py ends it."""

    of: Annotated[int, Flag(metavar="N")] | None = None
    """Divide the input files among N processes."""

    mpi: bool = False
    """Divide them among the processes of mpirun or srun: rank and size are --index and --of. Needs
    mpi4py."""

    on_bad_line: OnBadLine = "fail"
    """End the run at a document that cannot be read, or leave it out and count it."""

    overwrite: bool = False
    """Replace existing output."""

    log_interval: float = 10.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mpi and (self.index is not None or self.of is not None):
            raise ConfigError("--mpi sets --index and --of itself; leave them out.")
        if (self.index is None) != (self.of is None):
            raise ConfigError(
                "--index and --of belong together: --index 0 --of 4 is the first quarter."
            )
        if self.index is not None and self.of is not None and not 0 <= self.index < self.of:
            raise ConfigError(
                f"--index {self.index} --of {self.of}: the index runs from 0 to --of - 1."
            )
        if (self.of is not None or self.mpi) and self.overwrite:
            raise ConfigError(
                "--overwrite has no meaning with --of or --mpi: give it to tools/merge_data.py."
            )
        if self.domain_names is not None and self.split_key is None:
            raise ConfigError("--domain-names has no meaning without --split-key. Add it.")


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(PreprocessOptions, argv, __doc__)
    if options.mpi:
        from megatron_eslm.data.parts.mpi_share import mpi_share

        index, of = mpi_share()
        options = dataclasses.replace(options, mpi=False, index=index, of=of)
    from megatron_eslm.data.input_list import expand_inputs
    from megatron_eslm.data.preprocess import preprocess
    from megatron_eslm.data.tokenizers.build import build_tokenizer
    from megatron_eslm.files.stopped import stopped_by_signals

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with stopped_by_signals():
        tokenizer = build_tokenizer(
            options.tokenizer_type,
            options.vocab_file,
            options.merge_file,
            options.tokenizer_model,
        )
        if options.split_key is not None or options.of is not None:
            _in_parts(options, tokenizer)
            return 0
        preprocess(
            expand_inputs(options.input),
            options.output_prefix,
            tokenizer,
            workers=options.workers,
            append_eod=options.append_eod,
            text_key=options.text_key,
            on_bad_line=options.on_bad_line,
            overwrite=options.overwrite,
            log_interval_seconds=options.log_interval,
        )
    return 0


def _in_parts(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    """Make a part of each input; a process on its own also merges them."""
    from megatron_eslm.data.parts.preprocess import preprocess_in_parts

    pairs = preprocess_in_parts(
        options.input,
        options.output_prefix,
        tokenizer,
        split_key=options.split_key,
        domain_names_file=options.domain_names,
        index=options.index,
        of=options.of,
        workers=options.workers,
        append_eod=options.append_eod,
        text_key=options.text_key,
        on_bad_line=options.on_bad_line,
        overwrite=options.overwrite,
        log_interval_seconds=options.log_interval,
    )
    for pair in pairs:
        print(pair)


if __name__ == "__main__":
    sys.exit(main())
