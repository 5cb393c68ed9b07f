#!/usr/bin/env python
"""The same as `megatron-eslm merge-data`: see megatron_eslm/commands/merge_data.py."""

import sys

from megatron_eslm.commands.merge_data import main

if __name__ == "__main__":
    sys.exit(main())
