"""Who leads and who follows, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import pytest

from rollmesh.errors import NotLeader
from services.coordinator.leadership import Leadership
from services.coordinator.store import Deposed, Leader, StoreUnavailable
from tests.fakes.virtual_time import simulate

LEASE_S = 6.0


class FakeStore:
    """The row, which can be away, or hang."""

    def __init__(self):
        self.row: Leader | None = None
        self.away = False
        self.hangs = self.hangs_once = self.deposed = False
        self.in_turn = False
        self.healed = asyncio.Event()
        self.num_asked = self.num_most_asked = 0

    async def _asked(self):
        self.num_asked += 1
        self.num_most_asked = max(self.num_most_asked, self.num_asked)
        try:
            await self._answered()
        finally:
            self.num_asked -= 1

    async def _answered(self):
        hangs, self.hangs_once = self.hangs or self.hangs_once, False
        while hangs and not self.healed.is_set():
            # As a driver does that must not be left in the middle of a transaction.
            with contextlib.suppress(asyncio.CancelledError):
                await self.healed.wait()
        if self.away:
            raise StoreUnavailable("connection refused")

    async def read(self):
        await self._asked()
        return self.row

    async def take(self, seen, *, holder, address):
        await self._asked()
        if self.row != seen:
            return None
        self.row = Leader(holder, seen.epoch + 1 if seen else 1, 0, address)
        return self.row.epoch

    async def renew(self, epoch):
        await self._asked()
        if self.deposed:
            raise Deposed("another coordinator leads by now")
        if self.row.epoch != epoch:
            return False
        self.row = dataclasses.replace(self.row, renewals=self.row.renewals + 1)
        return True

    async def give_up(self, epoch):
        await self._asked()
        if self.row.epoch == epoch:
            self.row = dataclasses.replace(self.row, holder="")


class Late:
    """Whether a leader is late with its lease, as it says, and when it says so."""

    def __init__(self):
        self.told: list[tuple[bool, float]] = []

    async def __call__(self, late):
        self.told.append((late, now()))


def leadership(store, name="a"):
    return Leadership(store, holder=name, address=f"{name}:1", lease_s=LEASE_S)


def now():
    return asyncio.get_running_loop().time()


def ignore(_leader):
    pass


async def ending(task):
    task.cancel()
    await asyncio.wait({task})


def test_the_first_one_leads_at_once_and_the_second_follows_for_as_long_as_it_renews():
    async def scenario():
        store, followed = FakeStore(), []
        assert await leadership(store).campaign(ignore) == 1
        assert now() == 0
        keeping = asyncio.create_task(leadership(store).keep(1, Late()))
        other = asyncio.create_task(leadership(store, "b").campaign(followed.append))
        await asyncio.sleep(100 * LEASE_S)
        assert not other.done()
        assert set(followed) == {"a:1"}
        await ending(keeping)
        await ending(other)

    simulate(scenario())


def test_a_leader_that_falls_silent_is_succeeded_under_a_higher_epoch_after_its_lease():
    async def scenario():
        store = FakeStore()
        keeping = asyncio.create_task(
            leadership(store).keep(await leadership(store).campaign(ignore), Late())
        )
        other = asyncio.create_task(leadership(store, "b").campaign(ignore))
        await asyncio.sleep(10 * LEASE_S + 0.1)
        await ending(keeping)
        begin = now()
        assert await other == 2
        assert LEASE_S / 2 < now() - begin <= LEASE_S + 1
        assert (store.row.holder, store.row.address) == ("b", "b:1")

    simulate(scenario())


def test_of_many_followers_one_succeeds():
    async def scenario():
        store = FakeStore()
        await leadership(store).campaign(ignore)
        names = [f"b{n}" for n in range(9)]
        others = [asyncio.create_task(leadership(store, name).campaign(ignore)) for name in names]
        await asyncio.sleep(LEASE_S + 1)
        assert [each.result() for each in others if each.done()] == [2]
        for each in others:
            await ending(each)

    simulate(scenario())


def test_a_follower_that_was_held_up_itself_does_not_take_a_living_leader_for_dead():
    async def scenario():
        store = FakeStore()
        await leadership(store).campaign(ignore)
        other = asyncio.create_task(leadership(store, "b").campaign(ignore))
        await asyncio.sleep(LEASE_S / 2)
        assert await store.renew(1)
        asyncio.get_running_loop().busy(10 * LEASE_S)
        await asyncio.sleep(1)
        assert not other.done()
        await ending(other)

    simulate(scenario())


def test_a_leader_that_gives_up_is_succeeded_at_once():
    async def scenario():
        store = FakeStore()
        first = leadership(store)
        epoch = await first.campaign(ignore)
        other = asyncio.create_task(leadership(store, "b").campaign(ignore))
        await asyncio.sleep(1)
        await first.give_up(epoch)
        begin = now()
        assert await other == 2
        assert now() - begin < 0.5

    simulate(scenario())


def test_the_next_process_in_the_same_place_waits_for_no_lease():
    async def scenario():
        store = FakeStore()
        assert await leadership(store).campaign(ignore) == 1
        assert await leadership(store).campaign(ignore) == 2
        assert now() == 0

    simulate(scenario())


@pytest.mark.parametrize("trouble", ["away", "hangs", "hangs in turn"])
def test_a_leader_that_cannot_renew_says_so_before_others_lead_and_goes_on_when_it_can(
    trouble, caplog
):
    async def scenario():
        store, late = FakeStore(), Late()
        store.in_turn = trouble == "hangs in turn"
        epoch = await leadership(store).campaign(ignore)
        keeping = asyncio.create_task(leadership(store).keep(epoch, late))
        await asyncio.sleep(2 * LEASE_S + 0.1)  # it has just renewed
        assert late.told == [(False, renewed) for renewed in (2, 4, 6, 8, 10, 12)]
        setattr(store, trouble.split()[0], True)
        begin = now()
        await asyncio.sleep(5 * LEASE_S)
        assert not keeping.done()
        said, at = late.told[-1]
        assert said
        assert LEASE_S / 3 < at - begin <= LEASE_S * 2 / 3
        store.away = False
        store.healed.set()
        begin = now()
        await asyncio.sleep(LEASE_S)
        said, at = late.told[7]
        assert not said
        assert at - begin <= LEASE_S / 6
        if store.in_turn:
            assert store.num_most_asked == 1
        await ending(keeping)

    simulate(scenario())
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_renewal_that_hangs_is_tried_again_where_that_has_a_way_of_its_own():
    async def scenario():
        store, late = FakeStore(), Late()
        epoch = await leadership(store).campaign(ignore)
        keeping = asyncio.create_task(leadership(store).keep(epoch, late))
        await asyncio.sleep(2 * LEASE_S + 0.1)
        store.hangs_once = True
        await asyncio.sleep(10 * LEASE_S)
        assert not any(said for said, _ in late.told)
        assert len(late.told) > 30
        await ending(keeping)
        store.healed.set()

    simulate(scenario())


def test_a_leader_that_others_succeeded_while_it_could_not_renew_ends():
    async def scenario():
        store, late = FakeStore(), Late()
        epoch = await leadership(store).campaign(ignore)
        keeping = asyncio.create_task(leadership(store).keep(epoch, late))
        await asyncio.sleep(LEASE_S)
        store.hangs = True
        await asyncio.sleep(2 * LEASE_S)
        store.row = Leader("b", epoch + 1, 0, "b:1")
        store.healed.set()
        with pytest.raises(NotLeader, match="another coordinator leads"):
            await keeping
        assert late.told[-1][0]

    simulate(scenario())


def test_a_leader_whose_write_is_refused_by_its_epoch_ends():
    async def scenario():
        store = FakeStore()
        epoch = await leadership(store).campaign(ignore)
        store.deposed = True
        async with asyncio.timeout(LEASE_S):
            with pytest.raises(NotLeader):
                await leadership(store).keep(epoch, Late())

    simulate(scenario())


def test_silence_counts_only_while_the_store_can_be_read():
    async def scenario():
        store = FakeStore()
        epoch = await leadership(store).campaign(ignore)
        other = asyncio.create_task(leadership(store, "b").campaign(ignore))
        await asyncio.sleep(LEASE_S / 2)
        store.away = True
        await asyncio.sleep(10 * LEASE_S)
        store.away = False
        await asyncio.sleep(LEASE_S / 2)  # in which the leader may renew
        assert not other.done()
        begin = now()
        assert await other == epoch + 1
        assert now() - begin <= LEASE_S

    simulate(scenario())


def test_a_follower_whose_look_hangs_looks_again():
    async def scenario():
        store = FakeStore()
        store.hangs_once = True
        assert await leadership(store).campaign(ignore) == 1
        assert now() <= LEASE_S + 1
        store.healed.set()

    simulate(scenario())


def test_to_give_up_in_a_store_that_hangs_takes_no_longer_than_the_lease():
    async def scenario():
        store = FakeStore()
        epoch = await leadership(store).campaign(ignore)
        store.hangs = True
        begin = now()
        await leadership(store).give_up(epoch)
        assert now() - begin <= LEASE_S
        store.healed.set()

    simulate(scenario())


def test_a_store_that_is_away_for_less_costs_nobody_the_lead():
    async def scenario():
        store = FakeStore()
        epoch = await leadership(store).campaign(ignore)
        keeping = asyncio.create_task(leadership(store).keep(epoch, Late()))
        other = asyncio.create_task(leadership(store, "b").campaign(ignore))
        for _ in range(20):
            await asyncio.sleep(LEASE_S)
            store.away = True
            await asyncio.sleep(LEASE_S / 4)
            store.away = False
        assert not keeping.done()
        assert not other.done()
        await ending(keeping)
        await ending(other)

    simulate(scenario())


def test_a_follower_waits_for_a_store_that_is_away():
    async def scenario():
        store = FakeStore()
        store.away = True
        campaign = asyncio.create_task(leadership(store).campaign(ignore))
        await asyncio.sleep(100)
        assert not campaign.done()
        store.away = False
        assert await campaign == 1

    simulate(scenario())


def test_a_leader_that_was_held_up_goes_on_if_nobody_has_taken_over_and_else_ends():
    async def scenario():
        store = FakeStore()
        epoch = await leadership(store).campaign(ignore)
        keeping = asyncio.create_task(leadership(store).keep(epoch, Late()))
        await asyncio.sleep(LEASE_S)
        asyncio.get_running_loop().busy(10 * LEASE_S)
        await asyncio.sleep(LEASE_S)
        assert not keeping.done()
        store.row = Leader("b", epoch + 1, 0, "b:1")
        with pytest.raises(NotLeader, match="another coordinator leads"):
            await keeping

    simulate(scenario())
