"""The examples in Python: each is started as its README says, checked, and played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from rollmesh.chat import Answered, Message, Task, ToolCall
from rollmesh.client import EnvironmentClient
from rollmesh.environment.conformance import check
from rollmesh.rpc.channel import channel

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "environments"
NUM_EPISODES = 100


def said(content):
    return Message("assistant", content)


@contextlib.asynccontextmanager
async def started(script):
    """The address and the process of an example; it ends well when it is told to."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / script),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        line = (await process.stdout.readline()).decode()
        yield re.fullmatch(r"listening on (\S+)\n", line)[1], process
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("script", ["python/reverse.py", "python/calculator.py", "sql/sql.py"])
async def test_an_example_conforms(script):
    async with started(script) as (address, process):
        (report,) = await check(address, answer_s=60, num_episodes=NUM_EPISODES, pid=process.pid)
    assert [verdict for verdict in report.verdicts if verdict.outcome == "failed"] == []


async def test_reverse_rewards_the_letters_that_are_right():
    async with started("python/reverse.py") as (address, _), channel(address) as opened:
        client = EnvironmentClient(opened)
        task = await client.get_task("reverse", "train-0")
        word = task.messages[0].content
        answers = [word[::-1], word[::-1] + "a", ""]
        scored = await client.score("reverse", [Answered(task, [said(a)]) for a in answers])
        assert [each.reward for each in scored] == [1.0, 4 / 5, 0.0]


async def all_tasks(client, environment, split):
    tasks, token = await client.list_tasks(environment, split)
    while token:
        more, token = await client.list_tasks(environment, split, page_token=token)
        tasks += more
    return tasks


async def first_of(calculator, task):
    async with calculator.episode("calculator", task.id) as episode:
        (message,) = episode.first.observation
        return message.content


async def test_the_calculators_splits_are_disjoint_and_as_large_as_said(calculator):
    sums = {}
    for split, count in (("train", 4_096), ("heldout", 256)):
        tasks = await all_tasks(calculator, "calculator", split)
        assert len(tasks) == count
        sums[split] = set(await asyncio.gather(*(first_of(calculator, task) for task in tasks)))
        assert len(sums[split]) == count
        assert all(re.fullmatch(r"\d{1,2}\+\d{1,2}", each) for each in sums[split])
    assert not sums["train"] & sums["heldout"]


def call(arguments, name="calculator"):
    return Message("assistant", "", (ToolCall("call_0", name, arguments),))


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        ('{"expression": "37+58"}', "95"),
        ('{"expression": "-5-10+3"}', "-12"),
        ('{"expression": "2*3"}', "error: not a sum"),
        ('{"expression": "__import__(\'os\')"}', "error: not a sum"),
        ('{"expression": 37}', "error: expression: Input should be a valid string"),
        ("{}", "error: expression: Field required"),
    ],
)
async def test_the_calculator_answers_calls_and_the_right_sum_is_rewarded(
    calculator, arguments, content
):
    task = await calculator.get_task("calculator", "train-7")
    async with calculator.episode("calculator", "train-7") as episode:
        response = await episode.act(call(arguments))
        assert response.observation == (Message("tool", content, tool_call_id="call_0"),)
        response = await episode.act(said(f" {task.fields['answer']}\n"))
        assert (response.reward, response.done, response.truncated) == (1.0, True, False)


async def test_the_calculator_ends_after_four_turns(calculator):
    async with calculator.episode("calculator", "train-7") as episode:
        responses = [await episode.act(call('{"expression": "1+1"}')) for _ in range(4)]
    assert [response.done for response in responses] == [False, False, False, True]
    assert (responses[-1].reward, responses[-1].truncated) == (0.0, True)
    async with calculator.episode("calculator", "train-7") as episode:
        response = await episode.act(said("no idea"))
        assert (response.reward, response.done) == (0.0, True)


QUERY = "SELECT name FROM staff WHERE team = 'red' ORDER BY pay"


@pytest.mark.parametrize(
    ("query", "reward", "feedback"),
    [
        (QUERY, 1.0, ""),
        (f"```sql\n{QUERY}\n```", 1.0, ""),
        ("select name from staff s where s.team in ('red') order by pay asc", 1.0, ""),
        (f"{QUERY} DESC", 0.0, "other rows"),
        ("SELECT name FROM staff", 0.0, "40 other rows"),
        ("SELEC name", 0.0, "syntax error"),
        ("", 0.0, "other rows"),
        ("I do not know", 0.0, "syntax error"),
        ("SELECT 1; SELECT 2", 0.0, "one statement"),
        ("DROP TABLE staff", 0.0, "not authorized"),
        ("ATTACH DATABASE '/tmp/x.db' AS x", 0.0, "not authorized"),
        ("PRAGMA hard_heap_limit = 1", 0.0, "not authorized"),
        ("SELECT load_extension('/tmp/x.so')", 0.0, ""),
        ("SELECT readfile('/etc/passwd')", 0.0, "no such function"),
        (
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT count(*) FROM n",
            0.0,
            "interrupted",
        ),
        (
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT x FROM n",
            0.0,
            "more than 200 rows",
        ),
        ("SELECT zeroblob(1000000000)", 0.0, "too big"),
        ("SELECT replace(hex(zeroblob(4000)), '0', 'xxxxxxxxxxxx')", 0.0, "too big"),
        ("SELECT group_concat(a.name || b.name) FROM staff a, staff b, staff", 0.0, "too big"),
        (f"SELECT {'1,' * 20}1", 0.0, "too many columns"),
        ("\x00", 0.0, ""),
        ("(" * 5_000, 0.0, ""),
    ],
)
async def test_an_sql_query_is_worth_the_rows_that_it_finds(sql, query, reward, feedback):
    task = Task("own", fields={"query": QUERY})
    (scored,) = await sql.score("sql", [Answered(task, [said(query)])])
    assert scored.failure == ""
    assert scored.reward == reward
    assert feedback in scored.feedback


async def address_of(script):
    async with started(script) as (address, _):
        yield address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sql_address():
    async for address in address_of("sql/sql.py"):
        yield address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def calculator_address():
    async for address in address_of("python/calculator.py"):
        yield address


@pytest.fixture
async def sql(sql_address):
    async with channel(sql_address) as opened:
        yield EnvironmentClient(opened)


@pytest.fixture
async def calculator(calculator_address):
    async with channel(calculator_address) as opened:
        yield EnvironmentClient(opened)


async def test_every_sql_task_is_answered_by_its_own_query(sql):
    for split in ("train", "heldout"):
        tasks = await all_tasks(sql, "sql", split)
        items = [Answered(task, [said(task.fields["query"])]) for task in tasks]
        assert {each.reward for each in await sql.score("sql", items)} == {1.0}
