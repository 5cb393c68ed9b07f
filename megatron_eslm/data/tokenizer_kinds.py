"""The other tokenizers: SentencePiece, any tokenizer.json, bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_eslm.data.tokenizer_base import Tokenizer
from megatron_eslm.errors import ConfigError

_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; its end-of-sentence token ends documents.

    Most such models normalize white space, so decoding need not give back the exact text.
    """

    name = "SentencePieceTokenizer"

    def __init__(self, model_file: str | Path):
        import sentencepiece

        path = Path(model_file)
        if not path.is_file():
            raise ConfigError(f"--tokenizer-model {path} is not a file.")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"--tokenizer-model {path} is not a SentencePiece model: {error}."
            ) from error
        if self._model.eos_id() < 0:
            raise ConfigError(
                f"--tokenizer-model {path} defines no end-of-sentence token, which ends documents."
            )
        super().__init__(
            {"tokenizer.model": path},
            vocab_size=self._model.vocab_size(),
            eod=self._model.eos_id(),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """Any `tokenizer.json`, run by the `tokenizers` library."""

    name = "HuggingFaceTokenizer"

    def __init__(self, path: str | Path, *, eod_token: str | None = None):
        """
        Args:
            path: a tokenizer.json, or a folder that holds one.
            eod_token: the token that ends documents; by default `<|endoftext|>`, else the
                `eos_token` of a tokenizer_config.json beside it, else another usual name.
        """
        from tokenizers import Tokenizer as RustTokenizer

        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"--tokenizer-model {path}: there is no tokenizer file {file}.")
        try:
            self._rust = RustTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(
                f"--tokenizer-model {file} is not a tokenizer.json that can be loaded: {error}."
            ) from error
        # Cutting and padding are the loader's business, special tokens the preprocessor's.
        self._rust.no_truncation()
        self._rust.no_padding()
        self._rust.encode_special_tokens = True
        vocab = self._rust.get_vocab(with_added_tokens=True)
        self.eod_token = eod_token or _find_end_token(file, vocab)
        if self.eod_token not in vocab:
            raise ConfigError(f"{file} has no token {self.eod_token!r} to end documents with.")
        super().__init__(
            {"tokenizer.json": file},
            vocab_size=max(vocab.values()) + 1,
            eod=vocab[self.eod_token],
            extra={"eod_token": self.eod_token},
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._rust.decode(ids, skip_special_tokens=False)


def _find_end_token(file: Path, vocab: dict[str, int]) -> str:
    if _END_TOKENS[0] in vocab:
        return _END_TOKENS[0]
    config_file = file.with_name("tokenizer_config.json")
    if config_file.is_file():
        try:
            token = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{config_file} is not valid JSON: {error}.") from error
        token = token.get("content") if isinstance(token, dict) else token
        if token in vocab:
            return token
    for token in _END_TOKENS[1:]:
        if token in vocab:
            return token
    raise ConfigError(
        f"--tokenizer-model {file} has no token that ends documents: none of "
        f"{', '.join(_END_TOKENS)} is in it, and no tokenizer_config.json beside it names an "
        "eos_token of its vocabulary. Add one of these to the tokenizer."
    )


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0-255; 256 ends documents. Needs no file."""

    name = "ByteTokenizer"

    def __init__(self) -> None:
        super().__init__({}, vocab_size=257, eod=256)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        parts, start = [], 0
        for i, token in enumerate([*ids, self.eod]):
            if token == self.eod:
                parts.append(bytes(ids[start:i]).decode("utf-8", "replace"))
                start = i + 1
        return "<|endoftext|>".join(parts)
