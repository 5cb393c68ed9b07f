"""Flags of the data and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eslm.data.weights_file import expand_data_path
from megatron_eslm.limits import NOT_NEGATIVE, POSITIVE, Commas, Range, check_fields

TokenizerType = Literal[
    "GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data and tokenizer."""

    data_path: tuple[str, ...] = ()
    """Prefix of a Megatron .bin/.idx pair, or `weight1 prefix1 weight2 prefix2 ...` to mix domains
    by token weight, or `@FILE FOLDER` with a YAML file of lines NAME: WEIGHT for pairs in FOLDER.
    Default: the demo corpus."""

    split: Annotated[str, Commas()] = "98,1,1"
    """Shares of the documents for training, validation and test, as Megatron reads them."""

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
        object.__setattr__(self, "data_path", expand_data_path(self.data_path))
