"""One module a subcommand of `megatron-eslm`: its options, and a `main(argv)` that does the work.

The first line of a module's docstring is what `megatron-eslm --help` says of it.
"""

COMMANDS = (
    "pretrain",
    "preprocess",
    "merge-data",
    "verify-data",
    "train-tokenizer",
    "score-reference",
    "run-recipe",
    "compare-runs",
    "highlight-tokens",
    "token-dynamics",
    "convert-from-hf",
    "convert-to-hf",
    "generate",
    "evaluate",
    "plan",
    "doctor",
)
"""In the order of use. The module is named the same, with `_` for `-`."""
