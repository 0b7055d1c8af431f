"""sql_match: what is equal, and that a query can do nothing but read a little."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.types import ScoreItem
from services.reward.functions import sql
from services.reward.functions.sql import SqlMatch, sql_match

DATABASE = """
CREATE TABLE person (name TEXT, age INTEGER, height REAL);
INSERT INTO person VALUES ('Ada', 36, 1.65), ('Alan', 41, 1.78), ('Grace', 85, NULL);
"""


def worth(completion, reference, **parameters):
    parameters = {"database": DATABASE} | parameters
    checked = SqlMatch.parse(parameters, source="parameters")
    return sql_match(ScoreItem(completion, reference), checked)


@pytest.mark.parametrize(
    ("completion", "reference", "parameters", "expected"),
    [
        pytest.param(
            "SELECT name FROM person WHERE age > 40",
            "SELECT name FROM person WHERE age >= 41",
            {},
            1,
            id="the same rows",
        ),
        pytest.param(
            "SELECT name FROM person", "SELECT name FROM person WHERE age > 40", {}, 0, id="more"
        ),
        pytest.param(
            "SELECT name FROM person ORDER BY age",
            "SELECT name FROM person ORDER BY age DESC",
            {},
            1,
            id="order does not count",
        ),
        pytest.param(
            "SELECT name FROM person ORDER BY age",
            "SELECT name FROM person ORDER BY age DESC",
            {"ordered": True},
            0,
            id="unless it does",
        ),
        pytest.param(
            "SELECT 1 FROM person", "SELECT 1", {}, 0, id="how often a row comes does count"
        ),
        pytest.param(
            "SELECT age, name FROM person", "SELECT name, age FROM person", {}, 0, id="columns"
        ),
        pytest.param("SELECT age AS a FROM person", "SELECT age FROM person", {}, 1, id="names"),
        pytest.param("SELECT 0.1 + 0.2", "SELECT 0.3", {}, 1, id="numbers to ten digits"),
        pytest.param("SELECT 2.0", "SELECT 2", {}, 1, id="a whole number"),
        pytest.param("SELECT height FROM person WHERE age=85", "SELECT NULL", {}, 1, id="NULL"),
        pytest.param("SELECT '1'", "SELECT 1", {}, 0, id="text is no number"),
        pytest.param("```sql\nSELECT 1;\n```", "SELECT 1", {}, 1, id="in a fence"),
        pytest.param("```sql\nSELECT 1;\n```", "SELECT 1", {"find": "whole"}, 0, id="whole"),
        pytest.param("SELEC 1", "SELECT 1", {}, 0, id="no SQL"),
        pytest.param("", "SELECT 1", {}, 0, id="nothing"),
        pytest.param("SELECT 1; SELECT 1", "SELECT 1", {}, 0, id="two queries"),
        pytest.param("SELECT x FROM nowhere", "SELECT 1", {}, 0, id="an unknown table"),
        pytest.param("SELECT 1 \x00", "SELECT 1", {}, 0, id="a null character"),
        pytest.param("SELECT '\ud800'", "SELECT 1", {}, 0, id="half a character"),
        pytest.param(
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION SELECT x+1 FROM n WHERE x<3) SELECT x FROM n",
            "SELECT 1 UNION SELECT 2 UNION SELECT 3",
            {},
            1,
            id="recursion",
        ),
    ],
)
def test_what_finds_the_same_is_worth_1(completion, reference, parameters, expected):
    assert worth(completion, reference, **parameters).reward == expected


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO person VALUES ('Eve', 1, 1)",
        "UPDATE person SET age = 0",
        "DELETE FROM person",
        "DROP TABLE person",
        "CREATE TABLE x (y)",
        "CREATE TEMP TABLE x (y)",
        "CREATE VIEW x AS SELECT 1",
        "ATTACH 'FILE' AS other",
        "VACUUM INTO 'FILE'",
        "PRAGMA writable_schema = 1",
        "PRAGMA temp_store_directory = 'FILE'",
        "SELECT load_extension('FILE')",
        "SELECT writefile('FILE', 'x')",
        "SELECT readfile('/etc/passwd')",
        "SELECT fts3_tokenizer('simple')",
        "BEGIN",
        "ANALYZE",
        "SELECT * FROM pragma_database_list",
    ],
)
def test_a_query_that_does_more_than_read_is_worth_0(query, tmp_path):
    file = tmp_path / "file"
    scored = worth(query.replace("FILE", str(file)), "SELECT name FROM person")
    assert scored.reward == 0
    assert "Error" in scored.feedback
    assert not file.exists()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        pytest.param(
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT max(x) FROM n",
            "interrupted",
            id="a recursion without end",
        ),
        pytest.param(
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT x FROM n",
            "more than 10000 rows",
            id="rows without end",
        ),
        pytest.param("SELECT zeroblob(2000000000)", "too big", id="a value too large"),
        pytest.param(
            "SELECT length(group_concat(hex(zeroblob(400000)))) FROM person, person",
            "Error",
            id="a text too long",
        ),
        pytest.param("SELECT " + "(" * 5000 + "1" + ")" * 5000, "Error", id="nested too deeply"),
        pytest.param(
            "SELECT count(*) FROM " + ", ".join(f"person p{n}" for n in range(40)),  # noqa: S608
            "interrupted",
            id="a product of tables",
        ),
    ],
)
def test_a_query_that_takes_too_much_is_worth_0_and_says_so(query, said):
    scored = worth(query, "SELECT 1")
    assert scored.reward == 0
    assert said in scored.feedback


def worth_with_little_memory():
    sql._MAX_HEAP_BYTES = 1 << 20
    many = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n LIMIT 9000)"
    rows = f"{many} SELECT hex(zeroblob(1000)) || x FROM n ORDER BY 1 DESC"  # noqa: S608
    return worth(rows, "SELECT 1")


def test_memory_is_bounded():
    # SQLite's bound is the whole process's, and cannot be raised again.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        scored = other.submit(worth_with_little_memory).result()
    assert scored.reward == 0
    assert "Error" in scored.feedback


def test_a_reference_brings_its_own_database():
    reference = json.dumps({"database": "CREATE TABLE t AS SELECT 7 x", "query": "SELECT 7"})
    assert worth("SELECT x FROM t", reference, database="").reward == 1


@pytest.mark.parametrize(
    ("reference", "parameters", "match"),
    [
        pytest.param("SELECT 1", {"database": ""}, "not a JSON object", id="no database"),
        pytest.param('{"query": "SELECT 1"}', {"database": ""}, "not a JSON", id="half of it"),
        pytest.param("SELEC", {}, "cannot be run", id="a reference that is no query"),
        pytest.param("DROP TABLE person", {}, "cannot be run", id="a reference that writes"),
        pytest.param("SELECT 1", {"database": "CREATE"}, "cannot be made", id="a broken database"),
        pytest.param(
            "SELECT 1",
            {
                "database": "CREATE TABLE t AS WITH RECURSIVE n(x) AS "
                "(SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT max(x) FROM n;"
            },
            "cannot be made: interrupted",
            id="a database without end",
        ),
        pytest.param(
            "SELECT 1", {"database": "ATTACH 'x' AS y"}, "cannot be made", id="an attached file"
        ),
    ],
)
def test_what_the_caller_got_wrong_is_refused(reference, parameters, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match=match):
        worth("SELECT 1", reference, **parameters)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script",
    ["VACUUM INTO 'made'", "PRAGMA temp_store_directory = '/'; VACUUM INTO 'made'"],
)
def test_a_database_writes_no_file_either(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be made"):
        worth("SELECT 1", "SELECT 1", database=script)
    assert list(tmp_path.iterdir()) == []
