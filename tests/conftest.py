"""What holds for every test: the CPU, one thread a process, and a process group where asked for."""

import os

# Before torch is imported: processes are forked from this one, and a fork does not survive a pool
# of threads that has worked.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one rank, for tests that build a mesh in this process.

    Not together with `harness.run_ranks`, which forks: its ranks make groups of their own.
    """
    from megatron_eslm.launch.bootstrap import single_process

    with single_process():
        yield
