"""Flags of the data and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eslm.data.weights_file import expand_data_path
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import NOT_NEGATIVE, POSITIVE, Commas, Range, check_fields, flag_of

TokenizerType = Literal[
    "GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"
]


DEFAULT_SPLIT = "98,1,1"

PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data and tokenizer."""

    data_path: tuple[str, ...] = ()
    """Prefix of a Megatron .bin/.idx pair, or `weight1 prefix1 weight2 prefix2 ...` to mix domains
    by token weight, or `@FILE FOLDER` with a YAML file of lines NAME: WEIGHT for pairs in FOLDER.
    Default: the demo corpus."""

    split: Annotated[str | None, Commas()] = None
    """Shares of the documents of --data-path for training, validation and test, as Megatron reads
    them. Default: 98,1,1."""

    train_data_path: tuple[str, ...] = ()
    """Training data that are files of their own, in the forms of --data-path and instead of it and
    of --split."""

    valid_data_path: tuple[str, ...] = ()
    """Validation data beside --train-data-path, in the forms of --data-path: domains and weights
    may be others."""

    test_data_path: tuple[str, ...] = ()
    """Test data beside --train-data-path, in the forms of --data-path. Their loss is computed once,
    after the last step."""

    data_cache_path: str | None = None
    """Folder for the sample indices. Default: `cache/` beside the first prefix."""

    tokenizer_type: TokenizerType | None = None
    """Tokenizer of the data. Default: the one that tools/preprocess_data.py stored beside the data;
    any other is refused."""

    vocab_file: str | None = None
    """GPT2BPETokenizer: vocabulary (vocab.json)."""

    merge_file: str | None = None
    """GPT2BPETokenizer: merges (merges.txt)."""

    tokenizer_model: str | None = None
    """SentencePieceTokenizer: the .model file. HuggingFaceTokenizer: a tokenizer.json, a folder
    that contains one, or the name of a model on the Hugging Face hub."""

    eod_mask_loss: bool = False
    """Exclude the token directly after an end-of-document token from scores and loss."""

    reset_attention_mask: bool = False
    """Attend within the same document only. Documents end with an end-of-document token."""

    reset_position_ids: bool = False
    """Count positions from the beginning of each document."""

    label_noise: Annotated[
        float,
        Range(
            at_least=0,
            at_most=1,
            why="it is the share of targets that are permuted; the paper's experiment uses 0.05",
        ),
    ] = 0.0
    """Share of each training sequence's next-token targets to permute among themselves, for
    experiments on robustness. Inputs and validation stay clean."""

    num_workers: Annotated[int, NOT_NEGATIVE] = 2
    """Loader processes per rank; 0 loads in the training process."""

    max_epochs: Annotated[float, POSITIVE] = 1.0
    """How often any domain may be read. A run that would read one more often is refused before
    it starts; raise this to allow the repetition."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in PATHS:
            expanded = expand_data_path(getattr(self, name), flag_of(name))
            object.__setattr__(self, name, expanded)
        self._check_paths()

    def _check_paths(self) -> None:
        apart = [flag_of(name) for name in PATHS[1:] if getattr(self, name)]
        if self.data_path and apart:
            raise ConfigError(
                f"--data-path and {apart[0]} are both given. Give --data-path, whose documents "
                "--split divides, or a file for each set: --train-data-path, --valid-data-path, "
                "--test-data-path."
            )
        if apart and not self.train_data_path:
            raise ConfigError(f"{apart[0]} needs --train-data-path, which names what to train on.")
        if apart and self.split is not None:
            raise ConfigError(
                f"--split {self.split} divides the documents of --data-path; it has no meaning "
                f"with {apart[0]}, whose documents are all for training. Leave it out."
            )

    @property
    def given(self) -> bool:
        """Whether any data are named; without them a run reads the demo corpus."""
        return bool(self.data_path or self.train_data_path)
