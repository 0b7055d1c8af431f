"""What the environments in other languages are about: played through, and what that is worth."""

from __future__ import annotations

import json
from collections import deque

import pytest
import pytest_asyncio

from rollmesh import chat, errors
from tests.contract.example_environments import EXAMPLES, FOLDER, built, serving

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(900),  # the first test of a language waits for its compiler
]


def assistant(content: str = "", *calls: tuple[str, str]) -> chat.Message:
    made = [chat.ToolCall(f"call_{n}", name, text) for n, (name, text) in enumerate(calls)]
    return chat.Message("assistant", content, tuple(made))


def text(response: chat.Response) -> str:
    [message] = response.observation
    assert message.role == "user"
    return message.content


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(request):
    """Of the example that the test's parameter `environment` names."""
    chosen = EXAMPLES[request.param]
    await built(chosen)
    async with serving(chosen) as running:
        yield running.client


def of(environment: str):
    return pytest.mark.parametrize("client", [environment], indirect=True)


@of("guess-the-number")
async def test_a_number_is_found_by_halving_and_worth_less_the_later(client):
    secrets = set()
    for seed in range(20):
        async with client.episode("", "train-0", seed=seed) as episode:
            assert text(episode.first) == "1-9?"
            low, high, guesses = 1, 9, 0
            while True:
                guess = (low + high) // 2
                response = await episode.act(assistant(f" {guess}\n"))
                guesses += 1
                if response.done:
                    break
                assert (response.reward, response.truncated) == (0, False)
                low, high = (guess + 1, high) if text(response) == "higher" else (low, guess - 1)
        assert not response.truncated
        assert response.reward == pytest.approx(1 - (guesses - 1) / 10)
        assert sum(response.rewards.values()) == pytest.approx(response.reward)
        assert response.info == {"secret": str(guess)}
        secrets.add(guess)
    assert len(secrets) > 5


@of("guess-the-number")
@pytest.mark.parametrize("said", ["", "0", "10", "five", "5.", "1-9", "-8"])
async def test_what_is_no_digit_costs_a_guess(client, said):
    async with client.episode("", "heldout-127") as episode:
        for _ in range(5):
            response = await episode.act(assistant(said))
            assert (text(response), response.reward) == ("digit?", 0)
        last = await episode.act(assistant(said))
    assert (last.observation, last.done, last.truncated, last.reward) == ((), True, True, 0)


@of("grid-world")
async def test_the_goal_is_reached_on_the_shortest_way_from_any_start(client):
    starts = set()
    for seed in range(20):
        async with client.episode("", "goal-2-3-distance-3", seed=seed) as episode:
            response, rewards = episode.first, []
            starts.add(text(response))
            while not response.done:
                at, goal = (part.split(",") for part in text(response)[3:].split(" go "))
                row, column = int(goal[0]) - int(at[0]), int(goal[1]) - int(at[1])
                vertical = "down" if row > 0 else "up"
                horizontal = "right" if column > 0 else "left"
                response = await episode.act(assistant(vertical if row else horizontal))
                rewards.append(response.reward)
        assert not response.truncated
        assert rewards == pytest.approx([-0.02, -0.02, 0.98])
        assert response.rewards == pytest.approx({"goal": 1, "steps": -0.02})
    assert len(starts) == 4  # as many cells as there are at that distance


@of("grid-world")
async def test_who_runs_into_the_edge_stays_and_eight_turns_are_all(client):
    async with client.episode("", "goal-4-4-distance-6") as episode:
        assert text(episode.first) == "at 1,1 go 4,4"
        for said, seen in [
            ("up", "at 1,1 go 4,4"),
            ("LEFT ", "at 1,1 go 4,4"),
            ("north", "up/down/left/right?"),
            ("", "up/down/left/right?"),
            ("down", "at 2,1 go 4,4"),
            ("right", "at 2,2 go 4,4"),
            ("up", "at 1,2 go 4,4"),
        ]:
            response = await episode.act(assistant(said))
            assert (text(response), response.reward) == (seen, -0.02)
        last = await episode.act(assistant("left"))
    assert (last.observation, last.done, last.truncated, last.reward) == ((), True, True, -0.02)


def words_between(here: str, there: str) -> list[str]:
    words = (FOLDER / "java" / "src" / "wordladder" / "words.txt").read_text().split()
    came = {here: ""}
    queue = deque([here])
    while there not in came:
        at = queue.popleft()
        for word in words:
            if word not in came and sum(a != b for a, b in zip(at, word, strict=True)) == 1:
                came[word] = at
                queue.append(word)
    way = [there]
    while came[way[0]]:
        way.insert(0, came[way[0]])
    return way[1:]


@of("word-ladder")
async def test_a_ladder_that_is_climbed_is_worth_one_both_ways(client):
    seen = set()
    for seed in range(10):
        async with client.episode("", "cold-warm", seed=seed) as episode:
            seen.add(text(episode.first))
            here, there = text(episode.first).split(" to ")
            *way, last = words_between(here, there)
            for word in way:
                response = await episode.act(assistant(word.upper()))
                assert text(response) == f"{word} to {there}"
                assert response.reward == pytest.approx(1 / (len(way) + 1))
            response = await episode.act(assistant(last))
        assert (response.done, response.truncated) == (True, False)
        assert response.reward == pytest.approx(1 / (len(way) + 1))
        assert response.info == {"fewest_steps": "4"}
    assert seen == {"cold to warm", "warm to cold"}


@of("word-ladder")
async def test_a_detour_costs_what_it_gained_and_eight_turns_are_all(client):
    async with client.episode("", "cold-warm", seed=2) as episode:
        assert text(episode.first) == "cold to warm"
        rewards = []
        for said, seen in [
            ("cord", "cord to warm"),
            ("cold", "cold to warm"),
            ("cold", "no"),
            ("warm", "no"),
            ("xold", "no"),
            ("", "no"),
            ("hold", "hold to warm"),
        ]:
            response = await episode.act(assistant(said))
            assert text(response) == seen
            rewards.append(response.reward)
        assert rewards[:6] == pytest.approx([0.25, -0.25, 0, 0, 0, 0])
        last = await episode.act(assistant("cord"))
    assert (last.observation, last.done, last.truncated, last.reward) == ((), True, True, 0)


CALL = ("calculator", '{"expression":"37+58"}')


@of("calculator")
async def test_a_question_is_answered_with_the_calculator(client):
    tasks, _ = await client.list_tasks("", "train", page_size=50)
    for task in tasks:
        question, answer = task.fields["question"], task.fields["answer"]
        async with client.episode("", task.id) as episode:
            assert text(episode.first) == question
            arguments = json.dumps({"expression": question})
            response = await episode.act(assistant("", ("calculator", arguments)))
            assert response.observation == (chat.Message("tool", answer, tool_call_id="call_0"),)
            last = await episode.act(assistant(response.observation[0].content))
        assert (last.done, last.truncated, last.reward) == (True, False, 1)
        assert last.rewards == {"correct": 1}


@of("calculator")
@pytest.mark.parametrize("said", ["", "x", "0.0", "1000"])
async def test_another_answer_is_worth_nothing(client, said):
    async with client.episode("", "heldout-3") as episode:
        last = await episode.act(assistant(said))
    assert (last.done, last.truncated, last.reward) == (True, False, 0)


@of("calculator")
@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("calculator", '{"expression":"37+58"}', "95"),
        ("calculator", '{"expression":" 2 * (3 - 10) "}', "-14"),
        ("calculator", '{"expression":"--4-1*2*3"}', "-2"),
        ("calculator", '{"expression":"9223372036854775807"}', "9223372036854775807"),
        ("calculator", '{"expression":"9223372036854775807+1"}', "bad expression"),
        ("calculator", '{"expression":"0-9223372036854775807-1-1"}', "bad expression"),
        ("calculator", '{"expression":"-(0-9223372036854775807-1)"}', "bad expression"),
        ("calculator", '{"expression":"4611686018427387904*2"}', "bad expression"),
        ("calculator", '{"expression":"99999999999999999999"}', "bad expression"),
        ("calculator", '{"expression":""}', "bad expression"),
        ("calculator", '{"expression":"1+"}', "bad expression"),
        ("calculator", '{"expression":"(1"}', "bad expression"),
        ("calculator", '{"expression":"1 2"}', "bad expression"),
        ("calculator", '{"expression":"1/2"}', "bad expression"),
        ("calculator", json.dumps({"expression": "(" * 90 + "1" + ")" * 90}), "bad expression"),
        ("calculator", json.dumps({"expression": "-" * 190 + "1"}), "bad expression"),
        ("calculator", json.dumps({"expression": "1" + "+1" * 100}), "bad expression"),
        ("calculator", '{"expression":95}', "bad arguments"),
        ("calculator", '{"expr":"1"}', "bad arguments"),
        ("calculator", '{"expression":"1","more":1}', "bad arguments"),
        ("calculator", '["1"]', "bad arguments"),
        ("calculator", "37+58", "bad arguments"),
        ("calculator", "", "bad arguments"),
        ("calculator", "[" * 900, "bad arguments"),
        ("calculator", '{"expression":"' + "1" * 2000 + '"}', "bad arguments"),
        ("python", '{"expression":"1"}', "no such tool"),
        ("", "", "no such tool"),
    ],
)
async def test_a_call_is_told_its_value_or_what_is_wrong_with_it(client, name, arguments, says):
    async with client.episode("", "train-0") as episode:
        response = await episode.act(assistant("", (name, arguments)))
    assert response.observation == (chat.Message("tool", says, tool_call_id="call_0"),)
    assert (response.reward, response.done) == (0, False)


@of("calculator")
async def test_every_call_is_answered_and_three_turns_of_calls_are_all(client):
    async with client.episode("", "train-0") as episode:
        for _ in range(3):
            response = await episode.act(assistant("", *[CALL] * 10))
            answers = [(m.role, m.content, m.tool_call_id) for m in response.observation]
            assert answers == [
                ("tool", "95" if n < 8 else "too many calls", f"call_{n}") for n in range(10)
            ]
        last = await episode.act(assistant("", CALL))
    assert (last.done, last.truncated, last.reward) == (True, True, 0)


@of("sort-letters")
async def test_answers_are_scored_in_their_order_and_as_one_by_one(client):
    tasks, _ = await client.list_tasks("", "heldout", page_size=20)
    items = []
    for task in tasks:
        [message] = task.messages
        assert message == chat.Message("user", f"sort {task.fields['letters']}")
        letters = task.fields["letters"]
        answers = ("".join(sorted(letters)), letters, "", "äö")
        items += [chat.Answered(task, [*task.messages, assistant(each)]) for each in answers]
    scored = await client.score("", items)
    assert [(await client.score("", [item]))[0] for item in items] == scored
    assert [one.reward for one in scored[::4]] == [1] * len(tasks)
    assert all(0 <= one.reward < 0.5 for one in scored[1::4])
    assert [one.reward for one in scored[2::4]] == [0] * len(tasks)
    for one in scored:
        assert sum(one.rewards.values()) == pytest.approx(one.reward)
        assert not one.failure


@of("sort-letters")
@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("abcd", 1),
        (" abcd\n", 1),
        ("abdc", 0.25),
        ("dcba", 0),
        ("abc", 0.375),
        ("abcde", 0.4),
        ("", 0),
        ("äöü", 0),
    ],
)
async def test_an_answer_is_worth_its_places_and_that_it_is_right(client, answer, reward):
    task = chat.Task("row", fields={"letters": "dbca"})
    [scored] = await client.score("", [chat.Answered(task, [assistant(answer)])])
    assert scored.reward == pytest.approx(reward)
    assert sum(scored.rewards.values()) == pytest.approx(reward)


@of("sort-letters")
async def test_tasks_of_a_jobs_own_are_scored_by_their_fields(client):
    task = chat.Task("row-7", fields={"letters": "cabz", "source": "elsewhere"})
    [scored] = await client.score("", [chat.Answered(task, [assistant(" abcz\n")])])
    assert (scored.reward, scored.feedback) == (1, "it is abcz")


@of("sort-letters")
@pytest.mark.parametrize(
    ("task", "message", "error", "says"),
    [
        (chat.Task("x"), assistant("a"), errors.NotFound, 'no "x"'),
        (chat.Task("x", fields={"letters": ""}), assistant("a"), errors.InvalidRequest, "letters"),
        (
            chat.Task("x", fields={"letters": "Ab"}),
            assistant("a"),
            errors.InvalidRequest,
            "letters",
        ),
        (
            chat.Task("x", fields={"letters": "a" * 101}),
            assistant("a"),
            errors.InvalidRequest,
            "letters",
        ),
        (chat.Task("train-0"), chat.Message("user", "a"), errors.InvalidRequest, "assistant"),
    ],
)
async def test_a_batch_with_what_cannot_be_scored_is_refused(client, task, message, error, says):
    good = chat.Answered(chat.Task("train-0"), [assistant("a")])
    with pytest.raises(error, match=says):
        await client.score("", [good, chat.Answered(task, [message])])


@of("sort-letters")
@pytest.mark.parametrize("count", [0, 1025])
async def test_a_batch_of_another_size_is_refused(client, count):
    item = chat.Answered(chat.Task("train-0"), [assistant("a")])
    with pytest.raises(errors.InvalidRequest, match=f"items: {count}"):
        await client.score("", [item] * count)


@of("sort-letters")
async def test_the_largest_batch_is_scored(client):
    item = chat.Answered(chat.Task("train-0"), [assistant("x" * 3000)])
    assert len(await client.score("", [item] * 1024)) == 1024
