"""What the threads of all ranks tell each other of a checkpoint's files, through the job's store.

No collective, so that a thread can tell while its rank waits in one, or has failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict

import torch.distributed as dist

from megatron_eslm.checkpoint.manifest import Entry

_POLL_SECONDS = 0.1


class WrittenFiles:
    """The files that each rank has written of one draft.

    written = WrittenFiles(draft.path.name)
    written.tell(entries)                        # each rank, once
    files = written.of_all_ranks(going_on)       # rank 0
    written.tell_outcome(complete)               # rank 0, once
    complete = written.outcome(going_on)         # any rank
    """

    def __init__(self, draft: str) -> None:
        """Args:
        draft: a name that no other draft of the job has; the same on all ranks.
        """
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"checkpoint/{draft}", store)

    def tell(self, entries: dict[str, Entry] | None) -> None:
        """Tell sizes and checksums of this rank's files; None if they could not be written."""
        plain = None
        if entries is not None:
            plain = {name: asdict(entry) for name, entry in entries.items()}
        self._store.set(str(dist.get_rank()), json.dumps(plain))

    def of_all_ranks(self, going_on: Callable[[], bool]) -> dict[str, Entry] | None:
        """Wait for all ranks; their files, or None if any could not write or nobody waits."""
        ranks = [str(rank) for rank in range(dist.get_world_size())]
        if not self._come(ranks, going_on):
            return None
        found: dict[str, Entry] = {}
        for rank in ranks:
            plain = json.loads(self._store.get(rank))
            if plain is None:
                return None
            found |= {name: Entry(**entry) for name, entry in plain.items()}
        for rank in ranks:
            self._store.delete_key(rank)
        return found

    def tell_outcome(self, complete: bool) -> None:
        """Tell whether the checkpoint has been published."""
        self._store.set("complete", json.dumps(complete))

    def outcome(self, going_on: Callable[[], bool]) -> bool:
        """Wait for rank 0; whether it has published the checkpoint."""
        return self._come(["complete"], going_on) and json.loads(self._store.get("complete"))

    def _come(self, keys: list[str], going_on: Callable[[], bool]) -> bool:
        """Wait for keys; not `store.wait`, which would keep others from the store meanwhile."""
        while not self._store.check(keys):
            if not going_on():
                return False
            time.sleep(_POLL_SECONDS)
        return True
