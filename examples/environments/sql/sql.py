"""Write an SQL query: rewarded when it finds the rows that the question asks for."""

import contextlib
import random
import sqlite3
import time
from collections import Counter

from rollmesh.environment import Environment, Scored, Task, serve, task_of

MAX_S, MAX_ROWS, MAX_CELL_BYTES, MAX_COLUMNS = 1.0, 200, 10_000, 16
TEAMS, CITIES = ("red", "blue", "green"), ("Rome", "Oslo", "Lima", "Cairo")
SCHEMA = "staff(name TEXT, team TEXT, city TEXT, pay INTEGER)"
QUESTIONS = (  # What is asked, and a query that answers it.
    ("names in team {team}", "SELECT name FROM staff WHERE team = '{team}'"),
    ("how many live in {city}", "SELECT count(*) FROM staff WHERE city = '{city}'"),
    ("names with pay above {pay}", "SELECT name FROM staff WHERE pay > {pay}"),
    ("mean pay in {city}", "SELECT avg(pay) FROM staff WHERE city = '{city}'"),
    ("names in team {team} by pay", "SELECT name FROM staff WHERE team = '{team}' ORDER BY pay"),
    ("teams with pay above {pay}", "SELECT DISTINCT team FROM staff WHERE pay > {pay}"),
)
ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}

draw = random.Random(0)
ROWS = [
    (f"p{n:02}", draw.choice(TEAMS), draw.choice(CITIES), 1_000 + 10 * n + draw.randrange(10))
    for n in draw.sample(range(40), 40)
]
asked = {
    question.format(team=team, city=city, pay=pay): query.format(team=team, city=city, pay=pay)
    for question, query in QUESTIONS
    for team in TEAMS
    for city in CITIES
    for pay in range(1_000, 1_400, 10)
}
tasks = [task_of(f"{SCHEMA}\n{text}", query=query) for text, query in asked.items()]
draw.shuffle(tasks)

environment = Environment(
    "sql",
    version="1",
    description="The user says a schema and a question; the assistant answers with a query.",
    tasks={"train": tasks[20:], "heldout": tasks[:20]},
    deterministic=True,
)


def rows_of(query: str) -> list[tuple[object, ...]]:
    """What `query` finds in a database of its own; sqlite3.Error where it is wrong or too much."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"CREATE TABLE {SCHEMA}")
        database.executemany("INSERT INTO staff VALUES (?, ?, ?, ?)", ROWS)
        # From here on it can only be read, and only so much.
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)
        database.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
        until = time.monotonic() + MAX_S
        database.set_progress_handler(lambda: time.monotonic() > until, 10_000)
        database.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY
        )
        rows = database.execute(query).fetchmany(MAX_ROWS + 1)
        if len(rows) > MAX_ROWS:
            raise sqlite3.DataError(f"more than {MAX_ROWS} rows")
        return rows


@environment.score
def score(task: Task, answer: str) -> Scored:
    right = rows_of(task.fields["query"])
    try:
        found = rows_of(answer.strip().removeprefix("```sql").removesuffix("```"))
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return Scored(0.0, {"runs": 0.0}, feedback=str(error))
    ordered = "ORDER BY" in task.fields["query"]
    same = found == right if ordered else Counter(found) == Counter(right)
    return Scored(float(same), {"runs": 1.0}, feedback="" if same else f"{len(found)} other rows")


if __name__ == "__main__":
    serve(environment)
