"""Who goes first, with and without torch."""

from __future__ import annotations

import subprocess
import sys

from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.ranks import first_on_machine, has_group, rank, rank_zero_first
from tests.harness import run_ranks


def test_rank_zero_goes_first(tmp_path) -> None:
    def on_rank(rank: int) -> list[str]:
        def follow(fails: int | None) -> int:
            marker = tmp_path / f"{fails}"
            assert marker.exists() == (rank > 0)
            if rank == fails:
                raise ConfigError("damaged")
            marker.touch()
            return rank

        def outcome(fails: int | None) -> str:
            try:
                return f"returned {rank_zero_first(lambda: follow(fails))}"
            except ConfigError as error:
                return f"raised {error}"

        return [outcome(fails) for fails in (None, 0, 1)]

    common = ["raised damaged", "raised damaged (on rank 1)"]
    assert run_ranks(2, on_rank) == [[f"returned {rank}", *common] for rank in range(2)]
    assert rank_zero_first(lambda: 5) == 5  # without a group
    assert (rank(), first_on_machine(), has_group()) == (0, True, False)


def test_tools_that_look_at_files_do_not_wait_for_torch() -> None:
    code = "import sys, megatron_eslm.data.verify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
