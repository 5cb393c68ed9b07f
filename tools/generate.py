#!/usr/bin/env python
"""The same as `megatron-eslm generate`: see megatron_eslm/commands/generate.py."""

import sys

from megatron_eslm.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
