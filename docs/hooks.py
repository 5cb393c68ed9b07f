"""Pages of the site that are made from other files when it is built (mkdocs hooks).

index.md is README.md, contributing.md and changelog.md are the files of these names in the root.
flags.md is written from the option dataclasses that also make the command line, so it is always
current.
"""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_eslm.config.flags import Option, field_help, options
from megatron_eslm.config.run import GROUPS, PAGES

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    readme = (ROOT / "README.md").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for name, text in {
        "index.md": _from_the_root(readme),
        "contributing.md": _from_the_root(contributing),
        "changelog.md": _from_the_root(changelog),
        "flags.md": flags_page(),
    }.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to CONTRIBUTING.md at its page."""
    return markdown.replace("](../CONTRIBUTING.md", "](contributing.md")


def _from_the_root(text: str) -> str:
    """The same page with links relative to docs/ instead of the repository."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = text.replace(f"]({name}", f"]({name.lower()}")
    return re.sub(r"\]\(docs/", "](", text)


def flags_page() -> str:
    """All flags of pretrain_gpt.py as Markdown tables, one per group."""
    parts = [
        "# Flags of pretrain_gpt.py",
        "`pretrain_gpt.py --help` prints the same. A flag may be given once. In a file for "
        "`--config` a key is a flag without its dashes (`lr: 1e-3`); flags win over the file.",
        _table([("`--config`", "FILE", "", "YAML file of flags."), *_pages()]),
    ]
    for name, cls in GROUPS.items():
        texts = field_help(cls)
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        rows = [
            (f"`{option.flag}`", _takes(option), _default(defaults[field]), _text(texts[field]))
            for field, option in options({name: cls}).items()
        ]
        parts += [f"## {(cls.__doc__ or name).rstrip('.')}", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _pages() -> list[tuple[str, str, str, str]]:
    return [(f"`{flag}`", "", "", _text(text)) for flag, (text, _) in PAGES.items()]


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    head = "| flag | value | default | meaning |\n|---|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _takes(option: Option) -> str:
    if option.kind is bool:
        return f"none; `--no-{option.flag.removeprefix('--')}` switches it off"
    if option.choices is not None:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    names = {int: "whole number", float: "number", str: "text"}
    kind = names.get(option.kind, option.kind.__name__)
    if option.several:
        return f"one or more: {kind}"
    return f"{kind}, values between commas" if option.commas else kind


def _default(value: object) -> str:
    unset = value in (None, ()) or value is dataclasses.MISSING
    if unset:
        return ""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"`{value}`"


def _text(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")
