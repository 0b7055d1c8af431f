"""code_tests: what passes, and that nothing which a completion does to its tests makes it pass."""

from __future__ import annotations

import json
import textwrap

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.types import ScoreItem
from services.reward.functions.code import CodeTests, code_tests
from services.reward.sandbox import Sandbox
from services.reward.sandbox.runtime import runtime
from tests.fakes.sandboxes import first_tool


@pytest.fixture(scope="module")
def sandbox():
    with runtime() as made:
        yield Sandbox(first_tool(made), max_runs=1, max_cpu_s=10, max_memory_bytes=1 << 29)


@pytest.fixture
def worth(sandbox):
    class Means:
        def __init__(self):
            self.sandbox = sandbox

    async def worth(completion, reference, **parameters):
        checked = CodeTests.parse(parameters, source="parameters")
        if not isinstance(reference, str):
            reference = json.dumps(reference)
        item = ScoreItem(textwrap.dedent(completion), reference)
        return await code_tests(item, checked, Means())

    return worth


ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("completion", "reference", "parameters", "expected"),
    [
        pytest.param(ADD, "assert add(1, 2) == 3\nassert add(2, 2) == 5", {}, 0.5, id="asserts"),
        pytest.param(
            ADD, {"tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 5"]}, {}, 0.5, id="a list"
        ),
        pytest.param(
            ADD, "assert add(1, 2) == 3\nassert add(2, 2) == 5", {"reward": "all"}, 0, id="not all"
        ),
        pytest.param(ADD, "assert add(1, 2) == 3", {"reward": "all"}, 1, id="all"),
        pytest.param(
            ADD,
            "def test_ones(): assert add(1, 1) == 2\ndef test_twos():\n  assert add(2, 2) == 5",
            {},
            0.5,
            id="functions",
        ),
        pytest.param(
            ADD,
            "x = 1\nassert add(x, 1) == 2\nassert add(x, 2) == 4",
            {},
            0,
            id="anything else is one test",
        ),
        pytest.param(
            ADD,
            {"setup": "from math import isclose", "tests": ["assert isclose(add(.1, .2), .3)"]},
            {},
            1,
            id="a setup",
        ),
        pytest.param(
            ADD,
            "def check(candidate):\n  for n in range(5): assert candidate(n, n) == 2 * n\n"
            "check(add)",
            {},
            1,
            id="a checker that is handed the function",
        ),
        pytest.param(
            f"So:\n```python\n{ADD}```\nthat is it", "assert add(1, 2) == 3", {}, 1, id="fence"
        ),
        pytest.param(f"```\nx\n```\n```py\n{ADD}", "assert add(1, 2) == 3", {}, 1, id="cut off"),
        pytest.param(
            f"```python\n{ADD}```", "assert add(1, 2) == 3", {"find": "whole"}, 0, id="whole"
        ),
        pytest.param("", "assert add(1, 2) == 3", {}, 0, id="nothing"),
        pytest.param("def add(a, b:", "assert add(1, 2) == 3", {}, 0, id="no Python"),
        pytest.param("def sub(a, b): pass", "assert add(1, 2) == 3", {}, 0, id="another name"),
        pytest.param("def add(a): pass", "assert add(1, 2) == 3", {}, 0, id="other arguments"),
        pytest.param("def add(a, b): 1 / 0", "assert add(1, 2) == 3", {}, 0, id="an exception"),
        pytest.param("add = 3", "assert add == 3", {}, 1, id="a value"),
        pytest.param(
            "def f(x): return x", "assert f(1)", {}, 1, id="an assert without a comparison"
        ),
        pytest.param(
            "def total(x): return 7", "assert total([3, 4]) == 7", {"names": ["sum"]}, 1, id="names"
        ),
        pytest.param(
            "def sum(x): return 8", "assert sum([3, 4]) == 7", {"names": ["sum"]}, 0, id="a builtin"
        ),
        pytest.param(
            "def div(a, b):\n  if b == 0: raise ValueError('b')\n  return a / b",
            "try:\n  div(1, 0)\n  assert False\nexcept ValueError as e:\n  assert str(e) == 'b'",
            {},
            1,
            id="an exception that is wanted",
        ),
        pytest.param(
            "class Stack(list):\n  push = list.append\n"
            "  @property\n  def size(self): return len(self)",
            "s = Stack()\ns.push(1)\ns.push(2)\nassert s.size == 2",
            {},
            0,
            id="a list is a value, not an object",
        ),
        pytest.param(
            """
            class Stack:
                def __init__(self): self.items = []
                def push(self, x): self.items.append(x)
                def pop(self): return self.items.pop()
                def __len__(self): return len(self.items)
                def __iter__(self): return iter(self.items)
                def __getitem__(self, i): return self.items[i]
                def __setitem__(self, i, x): self.items[i] = x
                def __repr__(self): return f"Stack({self.items})"
            """,
            """s = Stack(); s.push(1); s.push(2); s[0] = 5; s.name = "x"
assert (len(s), list(s), s[1], str(s), s.name) == (2, [5, 2], 2, "Stack([5, 2])", "x")
assert s.pop() == 2 and s.items == [5] and 5 in s and bool(s)
try: s[7]
except IndexError: pass
else: assert False""",
            {},
            1,
            id="an object",
        ),
        pytest.param(
            "def numbers(n):\n  for x in range(n): yield x",
            "assert list(numbers(3)) == [0, 1, 2]",
            {},
            1,
            id="a generator",
        ),
        pytest.param(
            "def twice(f): return lambda x: f(f(x))",
            "assert twice(lambda x: x * 3)(2) == 18",
            {},
            1,
            id="functions as values",
        ),
        pytest.param(
            "def f(x): return x",
            "from decimal import Decimal\nfrom fractions import Fraction\n"
            "for x in [None, True, 2**100, -0.5, float('inf'), 'ü\\n', b'\\x00', 1j, (1, [2]),"
            " {1: {2}},"
            " frozenset([3]), range(3), Decimal('1.10'), Fraction(1, 3), [], {}, set()]:\n"
            "  assert f(x) == x and type(f(x)) is type(x), x\n"
            "assert f(float('nan')) != f(float('nan'))",
            {},
            1,
            id="every plain value as it is",
        ),
        pytest.param(
            "from collections import Counter\ndef f(x): return Counter(x)",
            "assert f('aab') == {'a': 2, 'b': 1}",
            {},
            1,
            id="a subclass is what it is of",
        ),
        pytest.param(
            "def f(x): x.append(1)", "x = []\nf(x)\nassert x == [1]", {}, 0, id="by value"
        ),
        pytest.param(
            "def f(x, y, z): x.append(1); y[2] = 3; z.clear()",
            "x, y, z = [], {}, {1}\nf(x, y, z)\nassert (x, y, z) == ([1], {2: 3}, set())",
            {"in_place": True},
            1,
            id="in place",
        ),
        pytest.param(
            "import sys\nsys.n = 0 if not hasattr(sys, 'n') else sys.n\n"
            "def f():\n  sys.n += 1\n  return sys.n",
            {"tests": ["assert f() == 1", "assert f() == 1 and f() == 2"]},
            {},
            1,
            id="each test has a completion of its own",
        ),
        pytest.param(
            "print('at first', flush=True)\ndef f():\n  print('then', flush=True)\n  return 1",
            "assert f() == 1",
            {},
            1,
            id="printing does no harm",
        ),
        pytest.param("def f(): return input()", "assert f() == ''", {}, 0, id="nothing to read"),
        pytest.param(
            "print(int(input()) + 1)",
            {"cases": [{"stdin": "1\n", "stdout": "2"}, {"stdin": "2\n", "stdout": "4\n"}]},
            {},
            0.5,
            id="a program",
        ),
        pytest.param(
            "print('a  ')\nprint('b')\nprint()", {"cases": [{"stdout": "a\nb"}]}, {}, 1, id="spaces"
        ),
        pytest.param(
            "print('a b')", {"cases": [{"stdout": "a  b"}]}, {}, 0, id="spaces within a line count"
        ),
        pytest.param(
            "print('a')\nraise SystemExit(1)",
            {"cases": [{"stdout": "a"}]},
            {},
            0,
            id="exit status 1",
        ),
        pytest.param(
            "if __name__ == '__main__': print('a')", {"cases": [{"stdout": "a"}]}, {}, 1, id="main"
        ),
        pytest.param(
            f"{ADD}if __name__ == '__main__': exit()", "assert add(1, 1) == 2", {}, 1, id="no main"
        ),
        pytest.param(
            "x = 3\nprint(x)",
            {"tests": ["assert x == 3"], "cases": [{"stdout": "3"}, {"stdout": "4"}]},
            {},
            2 / 3,
            id="tests and cases",
        ),
    ],
)
async def test_the_share_of_tests_that_pass(worth, completion, reference, parameters, expected):
    scored = await worth(completion, reference, **parameters)
    assert scored.reward == pytest.approx(expected), scored.feedback
    assert bool(scored.feedback) == (expected < 1)


WRONG = {"tests": ["assert add(1, 2) == 3", "assert add(20, 22) == 42"]}


@pytest.mark.parametrize(
    "trick",
    [
        pytest.param("import os\nos._exit(0)", id="leaving at once"),
        pytest.param("import sys\nsys.exit(0)", id="leaving politely"),
        pytest.param("raise SystemExit", id="leaving by an exception"),
        pytest.param("def add(a, b):\n  import os\n  os._exit(0)", id="leaving when called"),
        pytest.param("def add(a, b): raise SystemExit(0)", id="leaving politely when called"),
        pytest.param("def add(a, b): raise KeyboardInterrupt", id="an interrupt"),
        pytest.param("def add(a, b): raise GeneratorExit", id="the end of a generator"),
        pytest.param("def add(a, b): raise AssertionError", id="an assertion of its own"),
        pytest.param(
            "class Equal:\n  def __eq__(self, other): return True\n  __hash__ = None\n"
            "def add(a, b): return Equal()",
            id="a value that is equal to all",
        ),
        pytest.param(
            "class Equal(int):\n  def __eq__(self, other): return True\n"
            "def add(a, b): return Equal(0)",
            id="a number that is equal to all",
        ),
        pytest.param(
            "class Equal:\n  def __eq__(self, other): return True\n"
            "  def __bool__(self): return True\n  def __contains__(self, x): return True\n"
            "  def __iter__(self): return self\n  def __next__(self): return Equal()\n"
            "  def __len__(self): return 3\ndef add(a, b): return Equal()",
            id="a value that is everything",
        ),
        pytest.param(
            "import builtins\nbuiltins.AssertionError = SystemExit\n"
            "builtins.isinstance = lambda *a: True\ndef add(a, b): return 0",
            id="other builtins",
        ),
        pytest.param(
            "import sys\nsys.excepthook = lambda *a: None\nsys.settrace(lambda *a: None)\n"
            "def add(a, b): return 0",
            id="hooks",
        ),
        pytest.param(
            "import json\njson.dumps = lambda *a, **k: '[\"answer\", 3]'\ndef add(a, b): return 0",
            id="another json",
        ),
        pytest.param(
            "import peer, sys\n"
            "peer.Peer._say = lambda self, *message: self._send('[\"answer\", true]')\n"
            "def add(a, b): return 0",
            id="another peer",
        ),
        pytest.param(
            "import os\nfor fd in range(3, 20):\n  try:\n"
            '    os.write(fd, b\'R["tests[0]", ""]\\nR["tests[1]", ""]\\nT0\\n\')\n'
            "  except OSError: pass\ndef add(a, b): return 0",
            id="verdicts of its own on every file",
        ),
        pytest.param(
            "print('R[\"tests[0]\", \"\"]')\nprint('ok')\ndef add(a, b): print('3'); return 0",
            id="printing",
        ),
        pytest.param(
            "import os\nfor root, _, files in os.walk('/'):\n  for f in files:\n"
            "    if f not in ('main.py', 'peer.py', 'completion.py') and root == '/work':\n"
            "      text = open(os.path.join(root, f)).read()\n"
            "      def add(a, b): return 3 if '== 3' in text else 42\n"
            "def add(a, b): return open('order.json').read()",
            id="looking for the tests",
        ),
        pytest.param(
            "import gc, sys\ndef add(a, b):\n"
            "  found = [o for o in gc.get_objects() if isinstance(o, (list, dict, str, tuple))]\n"
            "  text = str(found)\n  return 3 if ' == '.join(['add(1, 2)', '3']) in text else 0",
            id="looking through its memory",
        ),
        pytest.param(
            "import sys\ndef add(a, b):\n  frame = sys._getframe()\n"
            "  while frame:\n    for name, value in frame.f_locals.items():\n"
            "      if name == '__right__': return value\n    frame = frame.f_back\n  return 0",
            id="looking at who calls",
        ),
        pytest.param(
            "import threading, os, time\n"
            "late = lambda: (time.sleep(0.01), os._exit(0))\n"
            "threading.Thread(target=late, daemon=True).start()\n"
            "def add(a, b):\n  time.sleep(5)",
            id="leaving in the middle",
        ),
        pytest.param(
            'def add(a, b): return \'["answer", 3]\\n["answer", 42]\\n\'', id="lines in a string"
        ),
        pytest.param("def add(a, b): return add", id="itself"),
        pytest.param("def add(a, b): return None", id="nothing"),
        pytest.param("def add(a, b): return float('nan')", id="no number"),
        pytest.param(
            "def add(a, b):\n  x = []\n  x.append(x)\n  return x", id="a list that holds itself"
        ),
        pytest.param(
            "def add(a, b):\n  x = []\n  for _ in range(100000): x = [x]\n  return x", id="depth"
        ),
        pytest.param("def add(a, b): return 'x' * (1 << 24)", id="a text too long"),
        pytest.param("def add(a, b): return 1 << (1 << 22)", id="a number too long"),
        pytest.param("def add(a, b):\n  while True: pass", id="for ever"),
        pytest.param("x = []\nwhile True: x.append('x' * 1000)", id="all memory"),
        pytest.param("import os\nos.kill(os.getppid(), 9); os.kill(-1, 9)", id="killing"),
        pytest.param("import os\nos.close(0); os.close(1)", id="closing"),
        pytest.param(
            "import os\nfor fd in range(20):\n  try: os.close(fd)\n  except OSError: pass",
            id="closing all",
        ),
        pytest.param(
            "def add(a, b):\n  class T: pass\n"
            "  T.__name__, T.__module__ = 'Decimal', 'decimal'\n  return T()",
            id="a number that is none",
        ),
    ],
)
async def test_no_trick_passes_a_test_that_the_code_does_not(worth, trick):
    scored = await worth(trick, WRONG, cpu_s=1)
    assert scored.reward == 0
    assert len(scored.feedback.splitlines()) >= 2
    # The sandbox is as good as before.
    assert (await worth(ADD, WRONG)).reward == 1


async def test_a_program_is_judged_by_its_output_alone(worth):
    cases = {"cases": [{"stdin": "1", "stdout": "2"}, {"stdin": "1", "stdout": "3"}]}
    echo = "import os\nfor f in os.listdir('.'): print(open(f).read())\nprint(input())"
    assert (await worth(echo, cases)).reward == 0
    assert (await worth("print(2)", cases)).reward == 0.5


async def test_arguments_that_a_completion_changes_do_not_change_what_it_is_compared_with(worth):
    cheat = "def sort(x):\n  x.clear()\n  return x"
    test = "x = [2, 1]\nassert sort(x) == sorted(x)"
    assert (await worth(cheat, test)).reward == 0
    insist = "import __main__\n__main__.peer.in_place = True\n"
    assert (await worth(insist + cheat, test)).reward == 0
    # Where they are to be seen, they are.
    assert (await worth(cheat, test, in_place=True)).reward == 1


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        pytest.param("", "neither tests nor cases", id="nothing"),
        pytest.param("{}", "neither tests nor cases", id="an empty object"),
        pytest.param({"tests": []}, "neither tests nor cases", id="an empty list"),
        pytest.param({"test": ["x"]}, "did you mean 'tests'", id="an unknown key"),
        pytest.param({"cases": [{"stdin": "x"}]}, r"cases\[0\].stdout: required", id="half a case"),
        pytest.param({"tests": ["x"] * 257}, "tests", id="too many"),
        pytest.param("assert f(", "not Python", id="no Python"),
        pytest.param(
            {"tests": ["assert f()", "assert g("]}, r"tests\[1\]: not Python", id="one of"
        ),
        pytest.param({"tests": "assert f()", "setup": "("}, "setup: not Python", id="a setup"),
        pytest.param("assert 1 == 1", "uses nothing that a completion could", id="of itself"),
        pytest.param(
            "assert sum([1]) == 1", "uses nothing that a completion could", id="a builtin"
        ),
        pytest.param(
            "class T:\n  def test(self): assert f() == 1",
            "passes without asking anything",
            id="a test that never runs",
        ),
        pytest.param("# nothing", "none", id="a comment"),
        pytest.param("(" * 5000, "not Python", id="nested too deeply"),
    ],
)
async def test_a_reference_that_tests_nothing_is_refused(worth, reference, match):
    with pytest.raises(InvalidRequest, match=match) as caught:
        await worth("def f(): return 1\ndef g(): return 1", reference)
    assert caught.value.context["field"] == "reference"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [({"cpu_s": 11}, "parameters.cpu_s"), ({"memory_mib": 513}, "parameters.memory_mib")],
)
async def test_no_caller_takes_more_than_the_service_allows(worth, parameters, field):
    with pytest.raises(InvalidRequest, match="more than this service allows") as caught:
        await worth(ADD, "assert add(1, 1) == 2", **parameters)
    assert caught.value.context["field"] == field


async def test_what_is_too_long_is_not_run(worth):
    comment = "#" * (1 << 20)
    assert (await worth(f"{comment}\n{ADD}", WRONG)).feedback == "longer than 1048576 characters"
    assert (await worth(f"{ADD}{comment[: 1 << 19]}", WRONG)).reward == 1
    long = {"tests": ["assert add(1, 2) == 3"], "setup": comment * 4}
    with pytest.raises(InvalidRequest, match="longer than 4194304 characters"):
        await worth(ADD, long)
    assert (await worth(ADD, long | {"setup": comment * 3})).reward == 1


async def test_failures_are_told(worth):
    scored = await worth(
        ADD, "assert add(1, 2) == 4\nassert add(1, '2') == 3\nassert add(1, 2) == 3"
    )
    assert scored.feedback.splitlines() == [
        "line 1: AssertionError: 3 and 4",
        "line 2: TypeError: unsupported operand type(s) for +: 'int' and 'str'",
    ]
    scored = await worth(
        "print(1)\nprint(2)", {"cases": [{"stdout": "1\n3"}, {"stdout": "1\n2\n3"}]}
    )
    assert scored.feedback.splitlines() == [
        "cases[0]: line 2 is '2', not '3'",
        "cases[1]: line 3 is missing, not '3'",
    ]
