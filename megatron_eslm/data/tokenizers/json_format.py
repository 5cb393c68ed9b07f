"""Any `tokenizer.json`, run by the `tokenizers` library."""

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
    """A `tokenizer.json`; text that spells one of its special tokens is ordinary text."""

    name = "HuggingFaceTokenizer"

    def __init__(self, path: str | Path, *, eod_token: str | None = None):
        """
        Args:
            path: a tokenizer.json, or a folder that holds one.
            eod_token: the token that ends documents; by default `<|endoftext|>`, else the
                `eos_token` of a tokenizer_config.json beside it, else another usual name.

        Raises:
            ConfigError: no such file, no tokenizer that can be loaded, no token that ends
                documents, or one that text yields whatever is done.
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
        # Cutting and padding are the loader's business, special tokens the preprocessor's.
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
            except Exception as error:  # as where merges of ordinary pieces make such a token
                raise ConfigError(
                    f"{self.where} makes its special tokens {', '.join(sorted(spelled))} of text, "
                    f"and cannot do without ({error}). Use a tokenizer that does not."
                ) from error
        self._check_eod(self.eod_token)

    def __reduce__(self) -> Any:
        # The library's own copies find special tokens in the model by name, where `_model_without`
        # has hidden them; a copy is made of the file instead.
        rebuild = functools.partial(type(self), eod_token=self.eod_token)
        return rebuild, (self.files["tokenizer.json"],)

    def _spelled_specials(self) -> set[str]:
        """Special tokens that the model itself makes of their characters, as Unigram does."""
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
    """A tokenizer.json as the `tokenizers` library reads it."""
    from tokenizers import Tokenizer as RustTokenizer

    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(
            f"--tokenizer-model {file} is not a tokenizer.json that can be loaded: {error}."
        ) from error


def make_special(rust: RustTokenizer, token: str) -> None:
    """Let `token` be a special one, which some files leave out: it ends documents."""
    from tokenizers import AddedToken

    rust.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _model_without(spec: dict[str, Any], tokens: set[str]) -> Any:
    """The file's model in which no text matches `tokens`; their ids are kept.

    The token of unknown characters keeps its name, by which the model finds it.
    """
    from tokenizers import Tokenizer as RustTokenizer

    model = dict(spec["model"])
    tokens = tokens - {model.get("unk_token")}
    vocab = model["vocab"]
    # A noncharacter of Unicode in front: no text is spelled so.
    if isinstance(vocab, dict):
        model["vocab"] = {_hidden(t) if t in tokens else t: i for t, i in vocab.items()}
    else:
        model["vocab"] = [[_hidden(t) if t in tokens else t, score] for t, score in vocab]
    return RustTokenizer.from_str(json.dumps({"version": "1.0", "model": model})).model


def _hidden(token: str) -> str:
    return f"\ufdd0{token}"


def _types_of(spec: dict[str, Any], *parts: str) -> Iterator[str]:
    """Types of the normalizers and the like of a tokenizer.json, those in sequences too."""
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
            raise ConfigError(f"{config_file} is not a JSON object; get the file again.")
        token = config.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            return token
    for token in _END_TOKENS[1:]:
        if token in vocab:
            return token
    raise ConfigError(
        f"--tokenizer-model {file} has no token that ends documents: none of "
        f"{', '.join(_END_TOKENS)} is in it, and no tokenizer_config.json beside it names an "
        "eos_token of its vocabulary. Add one of these to the tokenizer."
    )
