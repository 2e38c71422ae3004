"""A rank waits for as long as its device does, not only for as long as its own thread does."""

from __future__ import annotations

import time

import pytest

from bsa_compile.parallel.watch import Watch

TIMEOUT = 0.4


class Board:
    """Of two ranks: this one, and one that shows what it is told to."""

    ranks, rank, timeout = (0, 1), 0, TIMEOUT

    def __init__(self, moves=0, reached=0):
        self.beats = 0
        self.moves, self.reached = moves, reached
        self.alive = True

    def show(self, topic, text):
        self.shown = text

    def look(self, topic, rank):
        self.beats += self.alive
        return f"{self.beats} {self.moves} {self.reached} a.py:1 in forward"


class Device:
    """Gets as far as `reach` says."""

    def __init__(self, error=None):
        self.marks, self.reached, self.error = 0, 0, error

    def mark(self):
        self.marks += 1
        number = self.marks

        def reached():
            if self.error is not None:
                raise self.error
            return number <= self.reached

        return reached


@pytest.fixture
def watched():
    found = []

    def make(device, **far):
        board, said = Board(**far), []
        found.append(Watch(board, None if device is None else device.mark, said.append))
        return found[-1], board, said

    yield make
    for watch in found:
        watch.close()


def call(watch, blocks=2):
    with watch.inside():
        for _ in range(blocks):
            watch.move()


@pytest.mark.parametrize("alive", [True, False])
def test_a_call_that_returned_lasts_until_the_device_is_done(watched, alive):
    device = Device()
    watch, board, said = watched(device)
    board.alive = alive
    call(watch)
    time.sleep(3 * TIMEOUT)
    (message,) = said
    assert "rank 0 waited" in message
    assert "in a call of the model" in message
    wanted = "rank 1 hangs, or makes other calls" if alive else "rank 1 gave no sign of life"
    assert wanted in message


def test_of_ranks_that_gave_all_work_to_their_devices_the_one_whose_device_is_behind_is_named(watched):
    device = Device()
    watch, _, said = watched(device, moves=4, reached=1)
    device.reached = 2
    call(watch)  # four moves
    time.sleep(3 * TIMEOUT)
    (message,) = said
    assert "rank 1 hangs, or makes other calls" in message


def test_where_all_are_equally_far_nobody_is_named(watched):
    device = Device()
    watch, _, said = watched(device, moves=4, reached=2)
    device.reached = 2
    call(watch)
    time.sleep(3 * TIMEOUT)
    (message,) = said
    assert "no rank gets on, all of them are alive" in message


def test_a_device_that_gets_on_is_waited_for(watched):
    device = Device()
    watch, _, said = watched(device)
    call(watch)
    for _ in range(device.marks):
        time.sleep(0.6 * TIMEOUT)
        device.reached += 1
    time.sleep(2 * TIMEOUT)
    assert said == []


def test_without_marks_a_call_lasts_until_it_returns(watched):
    watch, _, said = watched(None)
    call(watch)
    time.sleep(2 * TIMEOUT)
    assert said == []


def test_an_error_of_the_device_is_left_to_the_main_thread(watched):
    watch, _, said = watched(Device(RuntimeError("an illegal memory access was encountered")))
    call(watch)
    time.sleep(2 * TIMEOUT)
    call(watch)
    time.sleep(2 * TIMEOUT)
    assert said == []
