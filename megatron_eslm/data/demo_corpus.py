"""Demo corpus from Python's own standard library; nothing is downloaded.

Two domains: `python_source` is the code of the standard library without docstrings, `python_docs`
is pydoc's topics and these docstrings.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_eslm.data.meta import read_meta
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.shared_folder import shared_folder
from megatron_eslm.data.tokenizers.build import HuggingFaceTokenizer
from megatron_eslm.data.tokenizers.train_bpe import train_bpe
from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

_SOURCE_BYTES = 12_000_000
_DOCS_BYTES = 4_000_000
# Tests are repetitive, encodings are tables, pydoc_data belongs to the other domain.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_DOMAINS = ("python_source", "python_docs")


def prepare_demo_corpus(directory: str, vocab_size: int = 4096) -> list[str]:
    """Build the demo corpus in `directory`, unless it is already there.

    Trains a byte-level BPE tokenizer on the text and preprocesses both domains with it. A second
    call only verifies the checksums of the files. Several jobs may call this at once. Within a
    job, rank 0 must call it first (`rank_zero_first`).

    Args:
        directory: created if missing.
        vocab_size: vocabulary size of the tokenizer.

    Returns:
        Words for `--data-path`: weight and prefix of each domain. The weights are token counts, so
        that all text is read equally often.

    Raises:
        ConfigError: the library's source is not installed, or `directory` cannot be written.
    """
    folder = Path(directory)
    where = "start in a folder that they share, or give your own text with --data-path"
    try:
        shared_folder(
            folder, lambda aside: _build(aside, vocab_size), where, f"vocabulary of {vocab_size}"
        )
    except OSError as error:
        raise ConfigError(f"The demo corpus cannot be written to {folder}: {error}.") from error
    prefixes = [str(folder / name) for name in _DOMAINS]
    return [word for prefix in prefixes for word in (str(_tokens(prefix)), prefix)]


def _tokens(prefix: str) -> int:
    meta = read_meta(prefix)
    assert meta is not None
    return meta.tokens


def _build(folder: Path, vocab_size: int) -> None:
    source: list[str] = []
    docs = [*_topics()]
    source_bytes, docs_bytes = 0, sum(map(len, docs))
    for module, text in _library_files():
        code, docstrings = split_docstrings(module, text)
        if code.strip() and source_bytes < _SOURCE_BYTES:
            source.append(code)
            source_bytes += len(code)
        if docstrings and docs_bytes < _DOCS_BYTES:
            docs.append(docstrings)
            docs_bytes += len(docstrings)
    # Sort by content hash: the splits are consecutive documents and should look alike.
    domains = {
        name: sorted(t, key=_digest) for name, t in zip(_DOMAINS, (source, docs), strict=True)
    }
    train_bpe(
        (text for texts in domains.values() for text in texts), vocab_size, folder / "bpe.json"
    )
    tokenizer = HuggingFaceTokenizer(folder / "bpe.json")
    for name, texts in domains.items():
        preprocess(
            [f"python {name.removeprefix('python_')}"],
            str(folder / name),
            tokenizer,
            documents=texts,
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _library_files() -> Iterator[tuple[str, str]]:
    """Yield module name and text of the standard library's files, in hash order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")  # contains paths of this machine
    ]
    if not files:
        raise ConfigError(
            f"The demo corpus is made from Python's standard library, but there is no source in "
            f"{root}. Use a Python that includes it, or give your own text with --data-path."
        )
    names = {path.relative_to(root).as_posix(): path for path in files}
    for name in sorted(names, key=_digest):
        try:
            text = names[name].read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), text


def _topics() -> list[str]:
    """Return pydoc's topics, which some distributions package separately."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        logger.warning("pydoc_data is not installed: python_docs has docstrings only")
        return []
    return [topics[name] for name in sorted(topics)]


def split_docstrings(module: str, text: str) -> tuple[str, str]:
    """Split a module into its code and its docstrings, each with its qualified name.

    Text that does not parse is returned unchanged, without docstrings.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return text, ""
    lines = text.encode().split(b"\n")
    documentation: list[str] = []
    cuts: list[tuple[ast.Expr, bool]] = []
    for name, node in _definitions(tree, module):
        docstring = ast.get_docstring(node)
        if docstring:
            documentation.append(f"{name}\n\n{docstring}\n")
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            cuts.append((first, len(node.body) > 1))
    for first, has_more in sorted(cuts, key=lambda cut: cut[0].lineno, reverse=True):
        begin, end = first.lineno - 1, (first.end_lineno or first.lineno) - 1
        before, after = lines[begin][: first.col_offset], lines[end][first.end_col_offset :]
        whole_lines = not before.strip() and not after.strip()
        # A body with only a docstring still needs a statement.
        lines[begin : end + 1] = [] if has_more and whole_lines else [before + b"..." + after]
    return b"\n".join(lines).decode(), "\n".join(documentation)


def _definitions(
    tree: ast.Module, module: str
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the module, its classes and its functions with their qualified names."""
    yield module, tree
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in ast.iter_child_nodes(parent):
            name = prefix
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}.{node.name}"
                yield name, node
            stack.append((name, node))
