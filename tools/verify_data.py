#!/usr/bin/env python
"""The same as `megatron-eslm verify-data`: see megatron_eslm/commands/verify_data.py."""

import sys

from megatron_eslm.commands.verify_data import main

if __name__ == "__main__":
    sys.exit(main())
