"""Where the text comes from and how it is cut into sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_eslm.errors import ConfigError

TokenizerType = Literal[
    "GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data and tokenizer."""

    data_path: tuple[str, ...] = ()
    """Prefix of a Megatron .bin/.idx pair, or `weight1 prefix1 weight2 prefix2 ...` to mix domains
    by token weight. Without it the demo corpus is used."""

    split: str = "98,1,1"
    """Shares of the documents for training, validation and test, as Megatron reads them."""

    data_cache_path: str | None = None
    """Folder for the sample indices; default: `cache/` beside the first prefix."""

    tokenizer_type: TokenizerType | None = None
    """Tokenizer of the data; default: the one stored beside the data by tools/preprocess_data.py.
    Given, it must be that one."""

    vocab_file: str | None = None
    """GPT2BPETokenizer: vocabulary (vocab.json)."""

    merge_file: str | None = None
    """GPT2BPETokenizer: merges (merges.txt)."""

    tokenizer_model: str | None = None
    """SentencePieceTokenizer: the .model file. HuggingFaceTokenizer: a tokenizer.json, a folder
    that holds one, or the name of a model on the Hugging Face hub."""

    eod_mask_loss: bool = False
    """Leave out of scores and loss what follows an end-of-document token directly."""

    label_noise: float = 0.0
    """Share of the next-token targets of each training sequence to permute among themselves; inputs
    and validation stay clean. For experiments on robustness."""

    num_workers: int = 2
    """Loader processes on each rank; 0 loads in the training process."""

    max_epochs: float = 1.0
    """How often any domain may be read. Training that would read one more often is refused before
    it starts; raise this to consent to the repetition."""

    def __post_init__(self) -> None:
        for name in ("data_path", "data_cache_path", "vocab_file", "merge_file", "tokenizer_model"):
            value = getattr(self, name)
            if value is not None and "\0" in "".join(value):
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value!r} holds a NUL character, which no path "
                    "can; remove it."
                )
        if self.num_workers < 0:
            raise ConfigError(f"--num-workers {self.num_workers} is negative; use 0 or more.")
        if not 0.0 <= self.label_noise <= 1.0:
            raise ConfigError(
                f"--label-noise {self.label_noise:g} is outside [0, 1]: it is the share of targets "
                "that are permuted; the paper's experiment uses 0.05."
            )
        if self.max_epochs <= 0:
            raise ConfigError(f"--max-epochs {self.max_epochs:g} must be positive.")
