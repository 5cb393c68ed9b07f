"""Tokenizers from a `tokenizer.json`, run by the `tokenizers` library."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer from a `tokenizer.json`; special tokens spelled out in text are ordinary text."""

    name = "HuggingFaceTokenizer"

    def __init__(self, path: str | Path, *, eod_token: str | None = None):
        """
        Args:
            path: a tokenizer.json, or a folder that contains one.
            eod_token: the token that ends documents; by default `<|endoftext|>`, else the
                `eos_token` of a tokenizer_config.json beside it, else another common name.

        Raises:
            ConfigError: the file is missing or cannot be loaded, there is no end-of-document
                token, or text unavoidably yields that token.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            spec = read_json(file)
        except FileNotFoundError:
            raise ConfigError(
                f"--tokenizer-model {path}: there is no tokenizer file {file}."
            ) from None
        except ConfigError as error:
            raise ConfigError(f"--tokenizer-model {error}") from error
        rust = load_rust(file)
        vocab = rust.get_vocab(with_added_tokens=True)
        self.eod_token = eod_token or _find_end_token(file, vocab)
        if self.eod_token not in vocab:
            raise ConfigError(f"{file} has no token {self.eod_token!r} to end documents with.")
        make_special(rust, self.eod_token)
        # The loader truncates and pads, and preprocessing adds special tokens.
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        self._rust = rust
        self.normalization = ", ".join(_types_of(spec, "normalizer", "pre_tokenizer"))
        super().__init__(
            {"tokenizer.json": file},
            vocab_size=max(vocab.values()) + 1,
            eod=vocab[self.eod_token],
            extra={"eod_token": self.eod_token},
        )
        if spelled := self._spelled_specials():
            try:
                rust.model = _model_without(spec, spelled)
            except Exception as error:  # e.g. if merges of ordinary pieces form such a token
                raise ConfigError(
                    f"{self.where} produces its special tokens {', '.join(sorted(spelled))} from "
                    f"text, and this cannot be disabled ({error}). Use a tokenizer that does not."
                ) from error
        self._check_eod(self.eod_token)

    def __reduce__(self) -> Any:
        # Rebuild copies from the file: the library's own copies look up special tokens in the
        # model by name, but `_model_without` has renamed them.
        rebuild = functools.partial(type(self), eod_token=self.eod_token)
        return rebuild, (self.files["tokenizer.json"],)

    def _spelled_specials(self) -> set[str]:
        """Special tokens that the model itself produces from their spelling, as Unigram does."""
        added = self._rust.get_added_tokens_decoder()
        specials = {i: token.content for i, token in added.items() if token.special}
        return {
            content
            for i, content in specials.items()
            if any(i in ids for ids in self._encode_batch([content, f"a{content}b", f" {content}"]))
        }

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{self.where} cannot encode a text: {error}.") from error
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._rust.decode(ids, skip_special_tokens=False)


def load_rust(file: Path) -> RustTokenizer:
    """Load a tokenizer.json with the `tokenizers` library."""
    from tokenizers import Tokenizer as RustTokenizer

    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(
            f"--tokenizer-model {file} is not a loadable tokenizer.json: {error}."
        ) from error


def make_special(rust: RustTokenizer, token: str) -> None:
    """Make the end-of-document token `token` special, since some files do not."""
    from tokenizers import AddedToken

    rust.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _model_without(spec: dict[str, Any], tokens: set[str]) -> Any:
    """Rebuild the file's model so that no text matches `tokens`; ids do not change.

    The unknown token keeps its name, by which the model finds it.
    """
    from tokenizers import Tokenizer as RustTokenizer

    model = dict(spec["model"])
    tokens = tokens - {model.get("unk_token")}
    vocab = model["vocab"]
    # Prefix a Unicode noncharacter, which does not occur in text.
    if isinstance(vocab, dict):
        model["vocab"] = {_hidden(t) if t in tokens else t: i for t, i in vocab.items()}
    else:
        model["vocab"] = [[_hidden(t) if t in tokens else t, score] for t, score in vocab]
    return RustTokenizer.from_str(json.dumps({"version": "1.0", "model": model})).model


def _hidden(token: str) -> str:
    return f"\ufdd0{token}"


def _types_of(spec: dict[str, Any], *parts: str) -> Iterator[str]:
    """Yield the types of the given parts of a tokenizer.json, including those in sequences."""
    for part in parts:
        value = spec.get(part)
        inner = (value or {}).get(f"{part}s")
        if inner:
            for one in inner:
                yield from _types_of({part: one}, part)
        elif value:
            yield str(value.get("type"))


def _find_end_token(file: Path, vocab: dict[str, int]) -> str:
    if _END_TOKENS[0] in vocab:
        return _END_TOKENS[0]
    config_file = file.with_name("tokenizer_config.json")
    if config_file.exists():
        config = read_json(config_file)
        if not isinstance(config, dict):
            raise ConfigError(f"{config_file} is not a JSON object; download the file again.")
        token = config.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            return token
    for token in _END_TOKENS[1:]:
        if token in vocab:
            return token
    raise ConfigError(
        f"--tokenizer-model {file} has no token to end documents with: none of "
        f"{', '.join(_END_TOKENS)} is in it, and no tokenizer_config.json beside it names an "
        "eos_token of its vocabulary. Add one of these to the tokenizer."
    )
