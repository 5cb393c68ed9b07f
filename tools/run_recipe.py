#!/usr/bin/env python
"""The same as `megatron-eslm run-recipe`: see megatron_eslm/commands/run_recipe.py."""

import sys

from megatron_eslm.commands.run_recipe import main

if __name__ == "__main__":
    sys.exit(main())
