"""An environment of `verifiers` with one agent, whose model is the client of our episodes.

`verifiers` runs its own loop and asks a model; here each such call is an observation, and the next
action its answer. What has no tools and takes one answer is a single turn, all else an episode.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

from verifiers import v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.utils import loaders

from rollmesh import chat
from rollmesh.environment.adapters import name_of
from rollmesh.environment.adapters.completions import Completions, message_of, tools_of
from rollmesh.environment.adapters.verifiers_chat import ID as CHAT
from rollmesh.environment.author import Environment
from rollmesh.environment.episode import Episode, NoMoreActions
from rollmesh.errors import EnvironmentFailed, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_CONCURRENT_EPISODES = 64
MAX_ANSWER_S = 10.0
MAX_CONCURRENT_WITH_PROCESSES = 8
"""Where tools run in processes of each episode: such a process takes 200 MB."""
MAX_ANSWER_WITH_PROCESSES_S = 60.0
"""An episode's first answer waits for them to start."""
HELDOUT_EVERY = 10
"""Each tenth task is held out, as tasksets have no splits."""
PROBE_S = 300.0
"""Seconds for the first call of a model, before which tools are started."""


def adapt(name: str, *, num_tasks: int, max_turns: int) -> Environment:
    """The environment of the taskset that `verifiers` knows by the id `name`.

    Raises:
        InvalidRequest: it knows none, or one of several agents, or it cannot be run here.
    """
    for noisy in ("verifiers", "httpx", "aiohttp.access"):  # They tell of every call.
        logging.getLogger(noisy).setLevel(logging.ERROR)
    played = _Played(name, num_tasks=num_tasks, max_turns=max_turns)
    tools = asyncio.run(played.probe())
    places = range(len(played.tasks))
    heldout = [place for place in places if place % HELDOUT_EVERY == HELDOUT_EVERY - 1]
    splits = {
        "train": [place for place in places if place not in set(heldout)],
        "heldout": heldout,
    }
    environment = Environment(
        name_of(name),
        version=f"{name} of verifiers {version('verifiers')}",
        description=f"The taskset {name} of verifiers.",
        tasks={
            split: [played.task(place) for place in those]
            for split, those in splits.items()
            if those
        },
        tools=tools,
        max_concurrent_episodes=(
            MAX_CONCURRENT_WITH_PROCESSES if played.has_processes else MAX_CONCURRENT_EPISODES
        ),
        max_answer_s=MAX_ANSWER_WITH_PROCESSES_S if played.has_processes else MAX_ANSWER_S,
    )
    environment.lifespan(played.serving)
    if played.is_single_turn and not tools:
        environment.score(played.score)
    else:
        environment.episode(max_turns=max_turns)(played.play)
    return environment


def _loaded(name: str, num_tasks: int, max_turns: int) -> tuple[Any, list[Any]]:
    """The environment of a taskset, whose agent chats in this process, and its first tasks."""
    roles = list(agent_config_fields(loaders.env_config_type(name)()))
    if len(roles) != 1:
        raise ValueError(f"it has the agents {', '.join(roles)}, and only one can be the model")
    agent = {"harness": {"id": CHAT}, "runtime": {"type": "subprocess"}, "max_turns": max_turns}
    config = loaders.resolve_env_config({"taskset": {"id": name}, roles[0]: agent})
    env = loaders.load_environment(config)
    tasks = list(env.taskset.take(num_tasks))
    if not tasks:
        raise ValueError("it has no tasks")
    return env, tasks


class _Played:
    """An environment of `verifiers` and what runs it."""

    def __init__(self, name: str, *, num_tasks: int, max_turns: int) -> None:
        try:
            self._env, self.tasks = _loaded(name, num_tasks, max_turns)
        # What a plugin's import, or a taskset's own configuration, may be wrong with.
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise InvalidRequest(f"spec: verifiers:{name}: {error}", field="spec") from None
        self._name = name
        self.is_single_turn = type(self._env) is vf.SingleAgentEnv
        self.has_processes = bool(type(self.tasks[0]).toolsets(self._env.taskset.config.task))
        self._completions = Completions()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """What all episodes share: `verifiers`' own servers, and the model's end."""
        self._completions = Completions()
        async with self._completions, self._env.serving():
            yield

    def task(self, place: int) -> chat.Task:
        """The task at `place`, as ours."""
        data = self.tasks[place].data
        messages = [chat.Message("system", data.system_prompt)] if data.system_prompt else []
        if isinstance(data.prompt, str):
            messages.append(chat.Message("user", data.prompt))
        else:
            messages += [message_of(message.model_dump()) for message in data.prompt or []]
        return chat.Task("", messages=tuple(messages), fields={"place": str(place)})

    async def probe(self) -> tuple[chat.Tool, ...]:
        """The tools that the first task offers its model."""
        async with self.serving(), _Run(self._env, self.tasks[0], self._completions) as run:
            try:
                async with asyncio.timeout(PROBE_S):
                    body = await run.asked()
            except TimeoutError:
                body = None
            if body is None:
                why = run.failure() or f"it asked its model nothing within {PROBE_S:g} s"
                raise InvalidRequest(f"spec: verifiers:{self._name}: {why}", field="spec")
            return tools_of(body)

    async def play(self, episode: Episode) -> chat.Response | None:
        """One episode."""
        task = self.tasks[int(episode.task.fields["place"])]
        async with _Run(self._env, task, self._completions) as run:
            known = 0
            while (body := await run.asked()) is not None:
                told = body["messages"]
                if len(told) <= known:
                    raise EnvironmentFailed("the environment rewrites the chat")
                observation = [message_of(message) for message in told[known:]]
                try:
                    run.answer(await episode.ask(observation))
                except NoMoreActions:
                    return None
                known = len(told) + 1
            return run.result()

    async def score(self, task: chat.Task, answer: chat.Message) -> chat.Scored:
        """What a single answer is worth."""
        async with _Run(self._env, self.tasks[int(task.fields["place"])], self._completions) as run:
            while await run.asked() is not None:
                run.answer(answer)
            result = run.result()
            return chat.Scored(result.reward, result.rewards, result.info.get("stopped", ""))


class _Run:
    """One episode of `verifiers` under way, ended when the block is left."""

    def __init__(self, env: Any, task: Any, completions: Completions) -> None:
        self._env = env
        self._task = task
        self._completions = completions
        # A call waits for its answer, so there is never more than one, and the end.
        self._asked: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[chat.Message]] | None]
        self._asked = asyncio.Queue()
        self._answered: asyncio.Future[chat.Message] | None = None
        self._unanswered: set[asyncio.Future[chat.Message]] = set()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        context = vf.ModelContext(
            model="rollmesh",
            client=vf.EvalClientConfig(
                base_url=self._completions.url, api_key_var="ROLLMESH_NO_KEY"
            ),
        )
        self._tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._running = self._tasks.create_task(
            self._env.run_episode(
                self._task,
                context,
                on_trace=lambda trace: self._stack.enter_context(
                    self._completions.session(trace.id, self._model)
                ),
            )
        )
        self._running.add_done_callback(lambda _: self._asked.put_nowait(None))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._running.cancel()
        for answered in self._unanswered:
            answered.cancel()  # Nobody is going to; its call ends.
        await self._stack.aclose()

    async def asked(self) -> dict[str, Any] | None:
        """The next request to the model; None: the episode is over."""
        call = await self._asked.get()
        if call is None:
            return None
        body, self._answered = call
        return body

    def answer(self, message: chat.Message) -> None:
        """What the model says to what was asked last."""
        assert self._answered is not None  # noqa: S101 - it was asked
        self._answered.set_result(message)

    def failure(self) -> str:
        """Why it is over too soon; empty: it is not, or is not at all."""
        if not self._running.done():
            return ""
        episode = self._running.result()
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        return f"{errors[0].type}: {errors[0].message}" if errors and not episode.ok else ""

    def result(self) -> chat.Response:
        """What the episode was worth.

        Raises:
            EnvironmentFailed: it failed.
        """
        episode = self._running.result()
        if not episode.ok:
            raise EnvironmentFailed(self.failure()[:500] or "the episode failed")
        (trace,) = episode.traces
        rewards = {name: each.value for name, each in trace.rewards.items() if each is not None}
        metrics = {name: f"{value:g}" for name, value in trace.metrics.items() if value is not None}
        return chat.Response(
            reward=trace.reward,
            rewards=rewards,
            truncated=trace.is_truncated,
            info={**metrics, "stopped": trace.stop_condition or ""},
        )

    async def _model(self, body: dict[str, Any]) -> chat.Message:
        answered: asyncio.Future[chat.Message] = asyncio.get_running_loop().create_future()
        self._unanswered.add(answered)
        self._asked.put_nowait((body, answered))
        try:
            return await answered
        finally:
            self._unanswered.discard(answered)
