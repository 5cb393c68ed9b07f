"""Continue a text with a trained model.

    megatron-eslm generate --load runs/eslm --prompt "def main(" --temperature 0.8

Without --prompt the text is read from standard input; an empty one starts a new document.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_groups
from megatron_eslm.interop.generation import Sampling, generate, open_model
from megatron_eslm.limits import Flag


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The model and the text."""

    load: Annotated[str, Flag(metavar="DIR")]
    """Folder of checkpoints, or an exported Hugging Face folder."""

    tag: str | None = None
    """Which checkpoint; default: the newest complete one."""

    prompt: Annotated[tuple[str, ...], Flag(repeated=True, metavar="TEXT")] = ()
    """Text to continue; may be repeated."""


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    groups = {"options": GenerateOptions, "sampling": Sampling}
    parsed = parse_groups(groups, argv, __doc__, config_file=False)
    options: GenerateOptions = parsed["options"]
    sampling: Sampling = parsed["sampling"]
    prompts = options.prompt or (sys.stdin.read().removesuffix("\n"),)
    model, tokenizer = open_model(options.load, options.tag)
    for prompt in prompts:
        for number, text in enumerate(generate(model, tokenizer, prompt, sampling), start=1):
            if len(prompts) > 1 or sampling.num_samples > 1:
                print(f"--- {prompt!r}, sample {number}")
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
