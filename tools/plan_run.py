#!/usr/bin/env python
"""The same as `megatron-eslm plan`: see megatron_eslm/commands/plan.py."""

import sys

from megatron_eslm.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
