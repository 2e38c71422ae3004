"""Short texts that ranks show each other through the job's store, beside the tensors.

The store works where the ranks' collectives do not any more: so it can tell who is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from ..errors import ParallelError, must

_PAUSES = (0.0005, 0.05)  # seconds between two looks, at first and at most


def _pauses() -> Iterator[float]:
    pause = _PAUSES[0]
    while True:
        yield pause
        pause = min(2 * pause, _PAUSES[1])


class Board:
    """One place per rank and topic.

    Args:
        ranks: global ranks of those who take part.
        timeout: seconds after which a rank that showed nothing counts as lost.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        self.ranks = tuple(ranks)
        self.rank = dist.get_rank()
        self.timeout = timeout
        # A connection of its own, where torch can make one: the main thread's may be blocked in a collective's set-up.
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone() if hasattr(store, "clone") else store
        prefix = f"bsa_compile/{'.'.join(map(str, self.ranks))}"
        # These ranks make their boards in the same order, whatever others a rank may be part of.
        number = store.add(f"{prefix}/boards of {self.rank}", 1)
        self._store = dist.PrefixStore(f"{prefix}/{number}", store)

    def show(self, topic: str, text: str) -> None:
        """Put up this rank's text, in place of its earlier one."""
        self._store.set(f"{topic}/{self.rank}", text)

    def take_down(self, topic: str) -> None:
        """Remove this rank's text."""
        self._store.delete_key(f"{topic}/{self.rank}")

    def look(self, topic: str, rank: int) -> str | None:
        """A rank's text, None if it shows nothing."""
        key = f"{topic}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def wait(self, topic: str, what: str) -> dict[int, str]:
        """Everybody's text.

        Args:
            topic: of the texts.
            what: what a rank that shows none has not done, for the error.

        Raises:
            ParallelError: after the timeout, naming those.
        """
        found: dict[int, str] = {}
        end = time.monotonic() + self.timeout
        pauses = _pauses()
        while True:
            for rank in self.ranks:
                if rank not in found and (text := self.look(topic, rank)) is not None:
                    found[rank] = text
            missing = [r for r in self.ranks if r not in found]
            if not missing:
                return found
            if time.monotonic() > end:
                got = f"nothing from {named(missing)} for {self.timeout:g} s"
                todo = "See what that rank logged last; it died, hangs, or makes other calls than the others."
                raise ParallelError(must("every rank of the mesh", what, got, todo))
            time.sleep(next(pauses))


def named(ranks: Sequence[int]) -> str:
    """`rank 2`, or `ranks 1, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
