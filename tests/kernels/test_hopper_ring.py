"""The barrier protocol of `kernels/hopper_ring.py`, simulated: no deadlock, and every read finds the fill it expects.

Roles are coroutines that yield wherever a GPU thread could be delayed; a scheduler steps a random one of them at a
time, and a copy lands at a random later time. The arithmetic of slots, parities and fill order is that of the kernels;
where a consumer looks for its blocks is computed by their `next_fill` itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from bsa_compile.kernels import hopper_ring

ROUNDS = 60
# The kernels' function, on Python's integers.
next_fill: Callable[..., tuple[int, bool, int, int, int]] = FunctionType(
    hopper_ring.next_fill.fn.__code__, {"gl": SimpleNamespace(where=lambda which, yes, no: yes if which else no)}
)
Role = Iterator[Callable[[], bool] | None]  # yields what it waits for


class Barrier:
    """An mbarrier: `completed` counts finished phases, `wait(parity)` passes once the phase of that parity is over."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.completed = count, count, 0, 0

    def _settle(self) -> None:
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.completed += 1
            self.pending = self.count

    def arrive(self) -> None:
        self.pending -= 1
        self._settle()

    def expect(self, copies: int) -> None:
        self.bytes += copies
        self.arrive()

    def landed(self) -> None:
        self.bytes -= 1
        self._settle()

    def passed(self, parity: int) -> Callable[[], bool]:
        return lambda: self.completed & 1 != parity


@dataclass
class Group:
    """Counts of the two lists of a group."""

    common: int
    own: tuple[int, int]


@dataclass
class Machine:
    """One program: its shared memory, and the copies under way."""

    groups: list[Group]
    stages: int
    through_ring: bool  # The tiles of a group come through the ring too (dq); else steps overlap (dk, dv).
    copies: list[Callable[[], None]] = field(default_factory=list)
    reads: int = 0

    def __post_init__(self) -> None:
        self.slots: list[Any] = [None] * self.stages
        self.full = [Barrier(1) for _ in range(3 * self.stages)]
        self.empty = [Barrier(2) for _ in range(self.stages)]
        self.tiles: list[Any] = [None, None]
        self.own_full = [Barrier(1) for _ in range(2)]
        self.own_empty = [Barrier(1) for _ in range(2)]

    def copy(self, target: list[Any], at: int, value: Any, barrier: Barrier) -> None:
        def land() -> None:
            target[at] = value
            barrier.landed()

        target[at] = "being written"
        self.copies.append(land)

    def fill(self, position: int, kind: int, value: Any) -> Role:
        slot = position % self.stages
        yield self.empty[slot].passed((position // self.stages & 1) ^ 1)
        if kind:
            self.empty[slot].arrive()
            yield None
        barrier = self.full[slot + kind * self.stages]
        barrier.expect(1)
        self.copy(self.slots, slot, value, barrier)
        yield None

    def produce(self) -> Role:
        position = 0
        for number, group in enumerate(self.groups):
            if self.through_ring:
                for which in (0, 1):
                    yield from self.fill(position, 1 + which, (number, which, "tile"))
                    position += 1
            rounds = min(group.own)
            stride = group.common // (rounds + 1)
            shared = 0
            for turn in range(rounds + 1):
                for _ in range(stride if turn < rounds else group.common - shared):
                    yield from self.fill(position, 0, (number, "common", shared))
                    position += 1
                    shared += 1
                if turn < rounds:
                    for which in (0, 1):
                        yield from self.fill(position, 1 + which, (number, which, group.common + turn))
                        position += 1
            which = 0 if group.own[0] > rounds else 1
            for i in range(rounds, max(group.own)):
                yield from self.fill(position, 1 + which, (number, which, group.common + i))
                position += 1

    def bring_tiles(self, which: int) -> Role:
        for number in range(len(self.groups)):
            yield self.own_empty[which].passed((number & 1) ^ 1)
            self.own_full[which].expect(1)
            self.copy(self.tiles, which, (number, which), self.own_full[which])
            yield None

    def consume(self, which: int) -> Role:
        start = uses = 0
        for number, group in enumerate(self.groups):
            common, own, other = group.common, group.own[which], group.own[1 - which]
            rounds = min(own, other)
            stride = common // (rounds + 1)
            place = turn = since = 0

            def wait(barrier: int) -> Role:
                nonlocal uses
                yield self.full[barrier].passed(uses >> barrier & 1)
                uses ^= 1 << barrier

            def check(slot: int, block: Any, number: int = number, common: int = common) -> None:
                kind = "common" if block != "tile" and block < common else which
                assert self.slots[slot] == (number, kind, block), (self.slots[slot], (number, kind, block))
                self.reads += 1

            if self.through_ring:
                slot = (start + which) % self.stages
                yield from wait(slot + (1 + which) * self.stages)
                check(slot, "tile")
                yield None
                own_slot = slot
                if common + own == 0:
                    self.empty[slot].arrive()
                start += 2
            else:
                yield self.own_full[which].passed(number & 1)
                assert self.tiles[which] == (number, which)
            held: list[tuple[int, int]] = []
            for step in range(common + own):
                had = step - common if step >= common + rounds else turn
                at, single, place, turn, since = next_fill(step, place, turn, since, common, rounds, stride, which)
                block = common + had if single else step - had  # of the consumer's load program
                slot = (start + at) % self.stages
                yield from wait(slot + ((1 + which) * self.stages if single else 0))
                check(slot, block)
                held.append((slot, block))
                yield None
                while len(held) > (0 if self.through_ring else 1):
                    check(*held[0])
                    self.empty[held.pop(0)[0]].arrive()
                    yield None
                if self.through_ring and step == 0:
                    # Only after the first products has the tile surely arrived in registers.
                    check(own_slot, "tile")
                    self.empty[own_slot].arrive()
                    yield None
            if not self.through_ring:
                assert self.tiles[which] == (number, which)
                self.own_empty[which].arrive()
            for slot, block in held:
                check(slot, block)
                self.empty[slot].arrive()
                yield None
            start += common + own + other

    def run(self, rng: random.Random) -> None:
        roles: list[Role] = [self.produce(), self.consume(0), self.consume(1)]
        if not self.through_ring:
            roles += [self.bring_tiles(0), self.bring_tiles(1)]
        weights = [rng.choice((1, 1, 5, 50)) for _ in roles]  # some roles are much slower than others
        waits: dict[int, Callable[[], bool] | None] = dict.fromkeys(range(len(roles)))
        while waits:
            ready = [i for i, condition in waits.items() if condition is None or condition()]
            if self.copies and (not ready or rng.random() < 0.3):
                self.copies.pop(rng.randrange(len(self.copies)))()
                continue
            assert ready, f"deadlock: {len(waits)} roles wait"
            chosen = rng.choices(ready, [weights[i] for i in ready])[0]
            try:
                waits[chosen] = next(roles[chosen])
            except StopIteration:
                del waits[chosen]
        assert not self.copies


def random_groups(rng: random.Random) -> list[Group]:
    limit = rng.choice((0, 1, 2, 5, 20))
    return [
        Group(
            rng.choice((0, 0, rng.randint(0, limit))),
            (rng.choice((0, rng.randint(0, limit))), rng.choice((0, rng.randint(0, limit)))),
        )
        for _ in range(rng.randint(1, 6))
    ]


@pytest.mark.parametrize("stages", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("through_ring", [False, True], ids=["dk-dv", "dq"])
def test_protocol(stages: int, through_ring: bool) -> None:
    for seed in range(ROUNDS):
        rng = random.Random(f"{stages} {through_ring} {seed}")
        Machine(random_groups(rng), stages, through_ring).run(rng)
