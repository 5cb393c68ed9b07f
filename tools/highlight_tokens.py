#!/usr/bin/env python
"""The same as `megatron-eslm highlight-tokens`: see megatron_eslm/commands/highlight_tokens.py."""

import sys

from megatron_eslm.commands.highlight_tokens import main

if __name__ == "__main__":
    sys.exit(main())
