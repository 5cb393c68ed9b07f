"""GPT-2's byte-level BPE from a local vocab.json and merges.txt, run by tiktoken."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eslm.data.tokenizers.base import (
    Tokenizer,
    byte_characters,
    check_vocab_size,
    clean_text,
)
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json, read_text

END_OF_TEXT = "<|endoftext|>"

# GPT-2's pre-tokenization: contractions, letters, digits, other signs, space. The possessive
# quantifiers change no match but keep the regex engine from filling its backtracking stack.
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s+"

# `\s+(?!\S)` has to backtrack, and a run of a million spaces overflows the engine's stack.
_LONG_SPACE = 65536
_SPACE_RUN = re.compile(
    r"[\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{65536,}"
)


class GPT2BPETokenizer(Tokenizer):
    """Byte-level BPE as GPT-2 defines it; ids equal those of the `tokenizers` library."""

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str | Path, merge_file: str | Path, *, checked: bool = False):
        """
        Args:
            vocab_file: JSON object, token to id.
            merge_file: one merge per line, most frequent first.
            checked: the files have passed `_check_merges` and have not changed since.

        Raises:
            ConfigError: a file is missing or malformed, there is no `<|endoftext|>`, or tiktoken
                could not reproduce the merges.
        """
        import tiktoken

        self.vocab = _read_vocab(Path(vocab_file))
        self.merges = _read_merges(Path(merge_file))
        if END_OF_TEXT not in self.vocab:
            raise ConfigError(
                f"--vocab-file {vocab_file} has no {END_OF_TEXT} token, which ends documents."
            )
        ranks, specials = self._split_vocab(Path(vocab_file), Path(merge_file))
        if not checked:
            self._check_merges(Path(vocab_file), Path(merge_file))
        self._encoding = tiktoken.Encoding(
            "gpt2-bpe", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=specials
        )
        super().__init__(
            {"vocab.json": Path(vocab_file), "merges.txt": Path(merge_file)},
            vocab_size=max(self.vocab.values()) + 1,
            eod=self.vocab[END_OF_TEXT],
        )
        self._check_eod(END_OF_TEXT)

    def _split_vocab(
        self, vocab_file: Path, merge_file: Path
    ) -> tuple[dict[bytes, int], dict[str, int]]:
        """Split ids into bytes and merged tokens (tiktoken merges lower ids first) and the rest."""
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        try:
            ranks = {bytes([byte]): self.vocab[character] for character, byte in byte_of.items()}
        except KeyError as error:
            raise ConfigError(
                f"--vocab-file {vocab_file} is not a byte-level vocabulary: it lacks the token "
                f"{error.args[0]!r} of a single byte. Use --tokenizer-type HuggingFaceTokenizer "
                "with a tokenizer.json instead."
            ) from error
        last = -1
        for number, (left, right) in enumerate(self.merges):
            token = left + right
            try:
                rank = self.vocab[token]
                ranks[bytes(byte_of[c] for c in token)] = rank
            except KeyError as error:
                raise ConfigError(
                    f"Merge {number + 1} of --merge-file {merge_file} makes {token!r}, which "
                    f"--vocab-file {vocab_file} does not contain: the files do not belong together."
                ) from error
            if rank <= last:
                raise ConfigError(
                    f"The ids in --vocab-file {vocab_file} do not follow the order of --merge-file "
                    f"{merge_file} (at {token!r}), so merging by id would give other ids. Use "
                    "--tokenizer-type HuggingFaceTokenizer with a tokenizer.json instead."
                )
            last = rank
        merged = set(ranks.values())
        return ranks, {token: i for token, i in self.vocab.items() if i not in merged}

    def _check_merges(self, vocab_file: Path, merge_file: Path) -> None:
        """Check that BPE encodes every merged token as a single token.

        tiktoken joins any two neighbours whose union is in the vocabulary, but BPE joins only the
        pairs in the merges. With this property both give the same ids: within a token's
        boundaries, the merges are those of the token encoded alone, which end in that token.
        """
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers import models

        bpe = RustTokenizer(models.BPE(vocab=self.vocab, merges=self.merges))
        tokens = [left + right for left, right in self.merges]
        for token, encoding in zip(tokens, bpe.encode_batch(tokens), strict=True):
            if len(encoding.ids) != 1:
                raise ConfigError(
                    f"The merges in {merge_file} never produce {token!r} of {vocab_file}; the two "
                    "files are not from one training. Use --tokenizer-type HuggingFaceTokenizer "
                    "with a tokenizer.json instead."
                )

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(_has_long_space(text) for text in texts):
            return [ids.tolist() for ids in self._encode_arrays(texts)]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=4)

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_array(text) for text in texts]

    def _encode_array(self, text: str) -> np.ndarray:
        if _has_long_space(text):
            return np.concatenate([self._one(part) for part in _split_long_space(text)])
        return self._one(text)

    def _one(self, text: str) -> np.ndarray:
        # Special tokens are neither recognized nor refused: everything is ordinary text. Avoids the
        # Python list of ints that encode_ordinary builds.
        return self._encoding.encode_to_numpy(clean_text(text), disallowed_special=())

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


def _has_long_space(text: str) -> bool:
    return len(text) > _LONG_SPACE and _SPACE_RUN.search(text) is not None


def _split_long_space(text: str) -> list[str]:
    """Cut before the last character of every long run of space that is followed by text.

    GPT-2's rule makes a piece of the run without its last character, so this cut is already a
    boundary between pieces.
    """
    cuts = [m.end() - 1 for m in _SPACE_RUN.finditer(text) if m.end() < len(text)]
    edges = [0, *cuts, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges) if a < b]


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read("--vocab-file", path, read_json)
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ConfigError(
            f"--vocab-file {path} is not a vocabulary: expected a JSON object of token to id. (A "
            "tokenizer.json goes with --tokenizer-type HuggingFaceTokenizer --tokenizer-model.)"
        )
    ids = set(vocab.values())
    if len(ids) < len(vocab) or min(ids, default=0) < 0 or len(vocab) == 0:
        raise ConfigError(
            f"--vocab-file {path} is not a vocabulary: every token needs a unique id of at least "
            "0. The file is damaged; download it again."
        )
    check_vocab_size(f"--vocab-file {path}", max(ids) + 1)
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read("--merge-file", path, read_text).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise ConfigError(f"--merge-file {path}, line {number} is not a pair of tokens.")
        merges.append((pair[0], pair[1]))
    return merges


def _read(flag: str, path: Path, read: Callable[[Path], Any]) -> Any:
    """Call `read` on a file; its errors name the flag."""
    try:
        return read(path)
    except FileNotFoundError:
        raise ConfigError(f"{flag} {path} cannot be read: there is no such file.") from None
    except ConfigError as error:
        raise ConfigError(f"{flag} {error}") from error
