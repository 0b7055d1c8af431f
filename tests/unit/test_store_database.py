"""What the store's database does when its users go away."""

import asyncio

from sqlalchemy import text

from services.coordinator.store.database import Database

SLOW = text(
    "with recursive n(i) as (select 1 union all select i + 1 from n where i < 300000) "
    "select count(*) from n"
)


async def test_a_user_that_is_cancelled_twice_leaves_no_task_that_hangs(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.sqlite")

    async def work(connection):
        begun.set()
        await connection.execute(SLOW)

    before = asyncio.all_tasks()
    for pauses in range(12):
        begun = asyncio.Event()
        user = asyncio.ensure_future(database.transact(work))
        await begun.wait()
        user.cancel()
        for _ in range(pauses):  # the second comes at each moment of what the first led to
            await asyncio.sleep(0)
        user.cancel()
        await asyncio.wait([user])
    async with asyncio.timeout(20):
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)
    await database.close()
