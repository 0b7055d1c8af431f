"""Relays one episode: an observation to the caller, its action to the environment, and so on.

Nothing is held but the message that is on its way, and no task of ours belongs to an episode. When
either side leaves, the other one is told at once.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from rollmesh import chat
from rollmesh.errors import EnvironmentFailed, InvalidRequest, MeshError
from services.reward.environments.run import Run, StreamOver

if TYPE_CHECKING:
    from services.reward.environments.ports import EpisodePort, Requests, Tell

END_S = 1.0
"""For the environment to end the stream when an episode is done: then its place there is free."""


async def play(
    run: Run,
    episode: EpisodePort,
    requests: Requests,
    tell: Tell,
    answer_s: float,
) -> None:
    """Tell the first observation of `episode`, then what comes of each action in `requests`.

    Raises:
        InvalidRequest: a second start, or a message that is not the assistant's.
        EnvironmentUnavailable, EnvironmentTimeout, EnvironmentFailed: the episode is lost.
    """
    episode.on_end(run.ended)
    response: chat.Response | None = _possible(run, episode.first)
    while response is not None and not response.done:
        await run.caller(partial(tell, response))
        response = await _next(run, episode, requests, answer_s)
    run.settle(None)
    if response is not None:
        await run.caller(partial(tell, response))
        with contextlib.suppress(MeshError):
            await run.asked(episode.end, END_S)


async def _next(
    run: Run,
    episode: EpisodePort,
    requests: Requests,
    answer_s: float,
) -> chat.Response | None:
    """What comes of the caller's next action; None: it has no more, and nothing came of that."""
    try:
        request = await run.idle(lambda: anext(requests, None))
    except StreamOver:
        await run.asked(episode.end, END_S)  # which tells why, unless it thinks that all is well
        raise _failed(run, "it ended the episode before that was done") from None
    if request is None:
        last = await run.asked(episode.give_up, answer_s)
        if last is not None and not last.done:
            raise _failed(run, "it went on with an episode that was given up")
        return last
    action = _action(request)
    return _possible(run, await run.asked(lambda: episode.act(action), answer_s))


def _action(request: chat.Start | chat.Message) -> chat.Message:
    if isinstance(request, chat.Start):
        raise InvalidRequest(
            "start: the episode has begun already", field="start", allowed="actions"
        )
    if request.role != "assistant":
        raise InvalidRequest(
            f"action.role: an action is the assistant's, this one is of {request.role!r}",
            field="action.role",
            value=request.role,
            allowed="assistant",
        )
    return request


def _possible(run: Run, response: chat.Response) -> chat.Response:
    if not response.observation and not response.done:
        raise _failed(run, "it answered nothing, in an episode that is not done")
    return response


def _failed(run: Run, problem: str) -> EnvironmentFailed:
    replica = run.replica
    return EnvironmentFailed(
        f"environment {replica.environment!r} at {replica.place}: {problem}",
        environment=replica.environment,
        replica=replica.place,
    )
