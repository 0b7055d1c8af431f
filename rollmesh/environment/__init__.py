"""Serve an environment that is written in Python.

reverse = Environment("reverse", version="1", tasks={"train": ["abc", "xyz"]})

@reverse.score
def score(task: Task, answer: str) -> float:
    return float(answer == task.messages[0].content[::-1])

serve(reverse)
"""

from rollmesh.chat import Message, Response, Scored, Task, Tool, ToolCall
from rollmesh.environment.author import Environment
from rollmesh.environment.episode import Episode, NoMoreActions
from rollmesh.environment.server import run, serve, serving
from rollmesh.environment.tasks import Generated, task_of

__all__ = [
    "Environment",
    "Episode",
    "Generated",
    "Message",
    "NoMoreActions",
    "Response",
    "Scored",
    "Task",
    "Tool",
    "ToolCall",
    "run",
    "serve",
    "serving",
    "task_of",
]
