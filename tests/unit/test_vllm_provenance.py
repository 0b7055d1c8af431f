"""Is every row of a batch computed with what its request asked for?"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from services.sampler.backends.vllm_draws import stream
from services.sampler.backends.vllm_provenance import (
    Asked,
    BlockLedger,
    IdentityError,
    Provenance,
)

BLOCK = 4


def asked(number: int, project: str = "p", **changes) -> Asked:
    values = {"seed": 5, "indices": [0], "place": 0, "sampled_logprobs": False, **changes}
    return Asked(number=number, digest=f"digest{number}" * bool(number), project=project, **values)


def new(request_id: str, what: Asked, blocks: list[int], num_cached: int = 0):
    return SimpleNamespace(
        req_id=request_id,
        sampling_params=SimpleNamespace(extra_args=what.extra_args()),
        block_ids=(blocks,),
        num_computed_tokens=num_cached,
    )


def output(*begun, more=(), resumed=(), finished=()):
    """A scheduler's output; `more`: (request, new blocks, computed tokens)."""
    return SimpleNamespace(
        scheduled_new_reqs=list(begun),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[request_id for request_id, _, _ in more],
            resumed_req_ids=set(resumed),
            new_block_ids=[blocks and (blocks,) for _, blocks, _ in more],
            num_computed_tokens=[computed for _, _, computed in more],
        ),
        finished_req_ids=set(finished),
    )


@dataclass
class Slots:
    """Numbers in slots, and which slot each token got."""

    numbers: list[int]
    used: list[int] = field(default_factory=list)
    changes: int = 0

    def slot_of(self, number: int, digest: str) -> int:
        if number and number not in self.numbers:
            raise IdentityError("no slot holds it")
        return self.numbers.index(number) if number else -1

    def used_by_tokens(self):
        return np.array(self.used)


def provenance(slots=None) -> Provenance:
    return Provenance(BlockLedger(100, [BLOCK]), slots or Slots([1, 2]))


def batch(*rows):
    """Rows of (request, prompt length, computed tokens)."""
    return SimpleNamespace(
        req_ids=[row[0] for row in rows],
        num_prompt_tokens=np.array([row[1] for row in rows]),
        num_computed_tokens_cpu=np.array([row[2] for row in rows]),
    )


def test_blocks_of_the_same_policy_and_project_are_shared():
    steps = provenance()
    steps.begin(output(new("a", asked(1), [10, 11, 12])))
    steps.begin(output(new("b", asked(1), [10, 11, 13], num_cached=2 * BLOCK)))


@pytest.mark.parametrize(
    "reader", [asked(2), asked(0), asked(1, "q")], ids=["version", "base model", "project"]
)
def test_blocks_of_another_policy_or_project_are_a_violation(reader):
    steps = provenance()
    steps.begin(output(new("a", asked(1), [10, 11, 12]), new("own", reader, [20])))
    with pytest.raises(IdentityError, match="request b reads keys and values"):
        steps.begin(output(new("b", reader, [20, 11, 13], num_cached=2 * BLOCK)))
    # The blocks of which it reads nothing are its own to write.
    steps.begin(output(new("c", reader, [11, 12])))


def test_a_block_that_nobody_wrote_is_a_violation():
    with pytest.raises(IdentityError):
        provenance().begin(output(new("a", asked(1), [10, 11], num_cached=BLOCK)))


def test_the_same_version_pulled_again_is_the_same_policy():
    steps = provenance()
    steps.begin(output(new("a", asked(1), [10, 11])))
    again = Asked(**{**asked(1).extra_args()["rollmesh"], "number": 9})
    steps.begin(output(new("b", again, [10, 12], num_cached=BLOCK)))


def test_blocks_that_a_request_gets_later_are_its_own():
    steps = provenance()
    steps.begin(output(new("a", asked(1), [10]), new("b", asked(2), [20])))
    steps.begin(output(more=[("a", [11], 4), ("b", None, 4)]))
    steps.begin(output(new("c", asked(1), [10, 11, 12], num_cached=2 * BLOCK)))
    with pytest.raises(IdentityError):
        steps.begin(output(new("d", asked(2), [20, 11, 13], num_cached=2 * BLOCK)))


def test_a_request_may_read_what_another_writes_in_the_same_step():
    steps = provenance()
    steps.begin(
        output(new("b", asked(1), [10, 12], num_cached=BLOCK), new("a", asked(1), [10, 11]))
    )


def test_a_resumed_request_reads_what_is_cached_by_then():
    steps = provenance()
    steps.begin(output(new("a", asked(1), [10, 11])))
    steps.begin(output(new("b", asked(2), [10, 11])))
    with pytest.raises(IdentityError, match="request a"):
        steps.begin(output(more=[("a", [10, 12], BLOCK)], resumed=["a"]))


def test_placeholder_blocks_are_read_by_nobody():
    provenance().begin(output(new("a", asked(1), [0, 0, 10], num_cached=2 * BLOCK)))


def test_a_request_that_does_not_say_what_it_asks_for_is_a_violation():
    request = new("a", asked(1), [10])
    request.sampling_params.extra_args = None
    with pytest.raises(IdentityError, match="does not say"):
        provenance().begin(output(request))


ROWS = {"a": asked(1), "b": asked(0), "c": asked(2)}


def begun(slots: Slots) -> Provenance:
    steps = provenance(slots)
    starts = (new(name, what, [10 + i]) for i, (name, what) in enumerate(ROWS.items()))
    steps.begin(output(*starts))
    return steps


THREE = batch(("a", 3, 0), ("b", 2, 0), ("c", 3, 0))
NUM_SCHEDULED = {"a": 3, "b": 2, "c": 1}


def test_a_batch_whose_tokens_use_the_slots_of_their_requests_is_in_order():
    begun(Slots([1, 2], used=[0, 0, 0, -1, -1, 1])).check(THREE, NUM_SCHEDULED)


@pytest.mark.parametrize(
    ("used", "told"),
    [
        ([-1, -1, -1, -1, -1, 1], "request a is computed with slot -1"),
        ([0, 0, 0, -1, -1, 0], "request c is computed with slot 0"),
        ([0, 0, 0, -1, 1, 1], "request b is computed with slot 1"),
        ([0, 0, 1, -1, -1, 1], "request a is computed with slot 1"),
        ([0, 0, 0, -1, -1], "5 tokens have slots, 6 are computed"),
    ],
)
def test_a_token_in_another_slot_is_a_violation(used, told):
    with pytest.raises(IdentityError, match=told):
        begun(Slots([1, 2], used=used)).check(THREE, NUM_SCHEDULED)


def test_a_slot_that_changes_while_a_request_runs_is_looked_at_again():
    slots = Slots([1, 2], used=[0, 0, 0, -1, -1, 1])
    steps = begun(slots)
    steps.check(THREE, NUM_SCHEDULED)
    slots.numbers = [3, 2]
    slots.changes += 1
    with pytest.raises(IdentityError):
        steps.check(THREE, NUM_SCHEDULED)


def test_rows_draw_at_the_place_that_follows_what_is_computed():
    """Whatever is computed again after a preemption, the place is the same."""
    slots = Slots([1, 2], used=[-1] * 4)
    steps = provenance(slots)
    requests = {
        "0_a-1": asked(0, indices=[6, 4]),
        "1_a-1": asked(0, indices=[6, 4], sampled_logprobs=True),
        "7-b": asked(0, indices=[3], place=10, seed=8),
    }
    steps.begin(output(*(new(name, what, [10]) for name, what in requests.items())))
    rows = steps.check(
        batch(("1_a-1", 5, 7), ("7-b", 30, 29), ("0_a-1", 5, 4)), {"1_a-1": 2, "7-b": 1, "0_a-1": 1}
    )
    assert rows.places.tolist() == [4, 10, 0]
    assert rows.streams.tolist() == [stream(5, 4), stream(8, 3), stream(5, 6)]
    assert rows.sampled.tolist() == [True, False, False]


def test_nothing_is_kept_of_finished_requests():
    steps = begun(Slots([1, 2]))
    steps.begin(output(finished=["a", "b", "c"]))
    assert not steps._asked
    assert not steps._stream_of
