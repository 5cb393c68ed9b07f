#!/usr/bin/env python
"""The same as `megatron-eslm evaluate`: see megatron_eslm/commands/evaluate.py."""

import sys

from megatron_eslm.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
