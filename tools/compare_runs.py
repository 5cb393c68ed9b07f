#!/usr/bin/env python
"""The same as `megatron-eslm compare-runs`: see megatron_eslm/commands/compare_runs.py."""

import sys

from megatron_eslm.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
