#!/usr/bin/env python
"""The same as `megatron-eslm preprocess`: see megatron_eslm/commands/preprocess.py."""

import sys

from megatron_eslm.commands.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
