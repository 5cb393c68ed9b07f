"""What every tokenizer offers, and how one is stored beside the data it made."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.regular import open_regular

META_FILE = "tokenizer_meta.json"

LARGEST_VOCABULARY = 1 << 22
"""Ids that a vocabulary may have: several times the largest in use. A file that claims more is
damaged, and a model of its size would not fit into any memory."""


class Tokenizer:
    """Text to ids and back.

    Text is always taken as ordinary text: a document that contains the characters of a special
    token (say `<|endoftext|>`) never yields that token's id. Only `eod` written by preprocessing
    does. A tokenizer that makes `eod` of text all the same is refused as soon as it does.

    Subclasses fill in `_encode_batch` and `_decode`.

    Args:
        files: role (the name it is stored under) to path, of the files that define the tokenizer.
        vocab_size: ids are in [0, vocab_size).
        eod: id written at the end of a document.
        extra: further facts that change ids; part of the identity and of the stored description.

    Raises:
        ConfigError: a file cannot be read, or there are more ids than `LARGEST_VOCABULARY`.
    """

    name: ClassVar[str]
    """The tokenizer's name on the command line (--tokenizer-type)."""

    pad = -1
    """An id that no document holds, so that megatron-core masks nothing but real padding."""

    normalization = ""
    """What rewrites text before it is cut into tokens, by the names its file has; "" if nothing."""

    def __init__(
        self,
        files: Mapping[str, Path],
        *,
        vocab_size: int,
        eod: int,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.files = dict(files)
        self.vocab_size = vocab_size
        self.eod = eod
        self.extra = dict(extra or {})
        check_vocab_size(self.where, vocab_size)
        digest = hashlib.sha256(json.dumps([self.name, eod, self.extra]).encode())
        for role, path in sorted(self.files.items()):
            content = _read_bytes(path)
            digest.update(f"\0{role}\0{len(content)}\0".encode())
            digest.update(content)
        self.identity = digest.hexdigest()
        """sha256 over kind and file contents: the same wherever the files lie."""

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What megatron-core writes into the key of its index cache."""
        return OrderedDict({"class": self.name, "identity": self.identity})

    @property
    def where(self) -> str:
        """Kind and files, for messages."""
        return " ".join([f"The {self.name}", *(str(path) for path in self.files.values())])

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without end-of-document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, each as `encode` gives them.

        Raises:
            ConfigError: a text yields the end-of-document id.
        """
        encoded = self._encode_batch(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if self.eod in ids:
                self._refuse_eod(text)
        return encoded

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, each as an integer array; the faster way where a library has one."""
        encoded = self._encode_arrays(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if (ids == self.eod).any():
                self._refuse_eod(text)
        return encoded

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._encode_batch(texts)]

    def _refuse_eod(self, text: str) -> NoReturn:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise ConfigError(
            f"{self.where} gives its end-of-document id {self.eod} for text ({shown!r}), so "
            "documents would seem to end where they do not. Use a tokenizer whose end-of-document "
            "token is neither a piece of text nor the stand-in for unknown characters."
        )

    def _check_eod(self, spelling: str) -> None:
        """ConfigError if `spelling` (that of the end-of-document token) or a character that the
        vocabulary lacks yields the end-of-document id."""
        self.encode_batch([spelling, f"a{spelling}b", f"a {spelling} b", "\U000e0fff"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside [0, vocab_size).
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}")
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Copy what defines this tokenizer into `directory`; `load_tokenizer` reads it back."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for role, path in self.files.items():
            shutil.copyfile(path, directory / role)
        (directory / META_FILE).write_text(json.dumps(self.describe(), indent=2) + "\n")

    def describe(self) -> dict[str, Any]:
        """The facts stored beside data and models."""
        return {
            "type": self.name,
            "identity": self.identity,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            **({"extra": self.extra} if self.extra else {}),
        }


def check_vocab_size(where: str, vocab_size: int) -> None:
    """ConfigError if there are more ids than `LARGEST_VOCABULARY`; `where` names the tokenizer."""
    if vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(
            f"{where} has ids up to {vocab_size - 1}; at most {LARGEST_VOCABULARY} ids are "
            "supported. The file is damaged, or it is no tokenizer's."
        )


def _read_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"The tokenizer file {path} cannot be read: {error.strerror}.") from error


def byte_characters() -> list[str]:
    """For each byte the character that stands for it in byte-level BPE vocabularies.

    Bytes that print as Latin-1 characters stand for themselves; the others get the characters from
    U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


def clean_text(text: str) -> str:
    """`text` with halves of surrogate pairs (JSON can hold them, UTF-8 cannot) as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
