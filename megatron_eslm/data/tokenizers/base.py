"""Common interface of all tokenizers, and their storage beside the data."""

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
"""Maximum vocabulary size, several times the largest in use. A file with more is damaged, and a
model of that size would not fit into any memory."""


class Tokenizer:
    """Text to ids and back.

    Text is always taken as ordinary text: a document that contains the characters of a special
    token (say `<|endoftext|>`) never yields that token's id. Only `eod` written by preprocessing
    does. A tokenizer that produces `eod` from text all the same is refused when it does.

    Subclasses implement `_encode_batch` and `_decode`.

    Args:
        files: files that define the tokenizer, as role (the name under which it is stored) to path.
        vocab_size: ids are in [0, vocab_size).
        eod: id written at the end of a document.
        extra: other settings that affect ids; part of the identity and of the stored description.

    Raises:
        ConfigError: a file cannot be read, or there are more ids than `LARGEST_VOCABULARY`.
    """

    name: ClassVar[str]
    """The tokenizer's name on the command line (--tokenizer-type)."""

    pad = -1
    """An id that occurs in no document, so that megatron-core masks only real padding."""

    normalization = ""
    """Names of the normalizers that rewrite text before tokenization; "" if none."""

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
        """SHA-256 of kind and file contents, independent of the files' paths."""

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """Identifiers for the key of megatron-core's index cache."""
        return OrderedDict({"class": self.name, "identity": self.identity})

    @property
    def where(self) -> str:
        """Kind and files, for messages."""
        return " ".join([f"The {self.name}", *(str(path) for path in self.files.values())])

    def encode(self, text: str) -> list[int]:
        """Encode one text, without end-of-document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts, each as `encode` does.

        Raises:
            ConfigError: a text yields the end-of-document id.
        """
        encoded = self._encode_batch(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if self.eod in ids:
                self._refuse_eod(text)
        return encoded

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Like `encode_batch`, but returns integer arrays, which some libraries produce faster."""
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
            "documents would appear to end where they do not. Use one whose end-of-document "
            "token is neither a piece of text nor the stand-in for unknown characters."
        )

    def _check_eod(self, spelling: str) -> None:
        """Raise ConfigError if `spelling` (the text of the end-of-document token) or a character
        outside the vocabulary yields the end-of-document id."""
        self.encode_batch([spelling, f"a{spelling}b", f"a {spelling} b", "\U000e0fff"])

    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids`; bytes that are not UTF-8 become U+FFFD.

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
        """Copy this tokenizer's files into `directory`; `load_tokenizer` reads them back."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for role, path in self.files.items():
            shutil.copyfile(path, directory / role)
        (directory / META_FILE).write_text(json.dumps(self.describe(), indent=2) + "\n")

    def describe(self) -> dict[str, Any]:
        """Return the metadata stored beside data and models."""
        return {
            "type": self.name,
            "identity": self.identity,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            **({"extra": self.extra} if self.extra else {}),
        }


def check_vocab_size(where: str, vocab_size: int) -> None:
    """Raise ConfigError for more than `LARGEST_VOCABULARY` ids; `where` names the tokenizer."""
    if vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(
            f"{where} has ids up to {vocab_size - 1}; at most {LARGEST_VOCABULARY} ids are "
            "supported. The file is damaged or not a tokenizer file."
        )


def _read_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"The tokenizer file {path} cannot be read: {error.strerror}.") from error


def byte_characters() -> list[str]:
    """Return the character that represents each byte in byte-level BPE vocabularies.

    Printable Latin-1 characters represent themselves; the other bytes get the characters from
    U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


def clean_text(text: str) -> str:
    """Replace lone surrogates (valid in JSON, not in UTF-8) with U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
