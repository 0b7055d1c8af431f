"""Many random schedules with crashes: nothing stale, nothing discarded, nobody starved or over."""

import os
import time

from tests.fakes.schedules import faults, random_schedule

SCHEDULES = int(os.environ.get("CHAOS_SCHEDULES", "3000"))
FIRST_SEED = int(os.environ.get("CHAOS_FIRST_SCHEDULE", "0"))


def test_nobody_is_stopped_for_one_whose_turn_has_not_come():
    # A small request stood behind one of its project that its quota held back.
    assert not faults(random_schedule(52263))


def test_random_schedules_keep_every_promise():
    start = time.perf_counter()
    for seed in range(FIRST_SEED, FIRST_SEED + SCHEDULES):
        found = faults(random_schedule(seed))
        assert not found, f"seed {seed}: {found[:5]}"
    seconds = time.perf_counter() - start
    print(f"{SCHEDULES} schedules, {1000 * seconds / SCHEDULES:.2f} ms each")
