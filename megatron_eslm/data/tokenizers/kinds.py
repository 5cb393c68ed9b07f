"""The simple tokenizers: SentencePiece and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.errors import ConfigError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; its end-of-sentence token ends documents.

    Most such models normalize white space, so decoding may not return the exact text.
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
        self.eod_token: str = self._model.id_to_piece(self.eod)
        self.normalization = _normalization(self.normalizer_spec)
        self._check_eod(self.eod_token)

    @property
    def normalizer_spec(self) -> Any:
        """The model's NormalizerSpec (sentencepiece_model.proto)."""
        from sentencepiece import sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2  # generated without types
        proto = messages.ModelProto.FromString(self._model.serialized_model_proto())
        return proto.normalizer_spec

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def _normalization(spec: Any) -> str:
    """List the settings of a NormalizerSpec that change text."""
    rules = [spec.name] if spec.precompiled_charsmap else []
    rules += ["remove_extra_whitespaces"] if spec.remove_extra_whitespaces else []
    return ", ".join(rules)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0-255; 256 ends documents. Needs no file."""

    name = "ByteTokenizer"

    def __init__(self) -> None:
        super().__init__({}, vocab_size=257, eod=256)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        parts, start = [], 0
        for i, token in enumerate([*ids, self.eod]):
            if token == self.eod:
                parts.append(bytes(ids[start:i]).decode("utf-8", "replace"))
                start = i + 1
        return "<|endoftext|>".join(parts)
