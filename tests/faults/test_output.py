"""Row F22: what workers print arrives, all of it, line by line, up to the last word before a death."""

from __future__ import annotations

import re

import pytest

from .programs import run

LINE = re.compile(r"      From worker (\d+):\t(.*)")

MANY = """
kind, lines = sys.argv[1], int(sys.argv[2])

def talk(who):
    for number in range(lines - 1):
        print(f"task {who} line {number} " + "x" * (number % 50))
    print(f"task {who} line {lines - 1} last words", flush=True)
    helpers.die("SIGKILL" if who % 2 else "exit 7")

runner = Runner(kind, 4)
calls = [runner.submit(talk, who) for who in range(4)]
for call in calls:
    assert isinstance(runner.error(call), distpool.ProcessExitedException)
    assert "last words" in runner.error(call).output
runner.close()
"""


@pytest.mark.time_limit(120)
def test_hundred_thousand_lines(kind: str) -> None:
    """None lost, none mixed, each task's in order."""
    outcome = run(MANY, kind, 25_000, seconds=90)
    assert outcome.stderr == ""
    found: dict[int, list[int]] = {who: [] for who in range(4)}
    for line in outcome.stdout.splitlines():
        match = LINE.fullmatch(line)
        assert match, repr(line)
        words = match[2].split()
        assert words[0] == "task" and words[2] == "line", repr(line)
        number = int(words[3])
        found[int(words[1])].append(number)
        rest = match[2].split(" ", 4)[4]
        assert rest == ("last words" if number == 24_999 else "x" * (number % 50)), repr(line)
    assert found == {who: list(range(25_000)) for who in range(4)}
    outcome.assert_clean()


ODD = """
kind = sys.argv[1]
runner = Runner(kind, 1)
runner.call(os.write, 1, b"straight to the descriptor\\n")
runner.call(lambda: print("to stderr", file=sys.stderr))
runner.call(os.system, "echo from a child process")
runner.call(os.write, 1, b"not UTF-8: \\xff\\n")
runner.call(print, "y" * 300_000)
runner.call(lambda: print("a", "b", sep="\\n"))
runner.call(lambda: print("caf\\u00e9 \\u4e16\\u754c"))

def half_a_line():
    sys.stdout.write("half a line")
    sys.stdout.flush()
    helpers.die("exit 7")

error = runner.error(runner.submit(half_a_line))
assert "half a line" in error.output, error.output
runner.close()
"""


def test_odd_lines(kind: str) -> None:
    """Descriptors, children, stderr, long ones, other encodings, and half a line before death."""
    outcome = run(ODD, kind, env={"PYTHONIOENCODING": "utf-8:replace"})
    outcome.assert_clean()
    lines = [match[2] for match in map(LINE.fullmatch, outcome.stdout.splitlines()) if match]
    assert len(lines) == len(outcome.stdout.splitlines())
    for expected in (
        "straight to the descriptor",
        "to stderr",
        "from a child process",
        "y" * 300_000,
        "a",
        "b",
        "caf\u00e9 \u4e16\u754c",
        "half a line",
    ):
        assert expected in lines
    assert any(line.startswith("not UTF-8: ") for line in lines)


def test_printing_does_not_hold_up_the_calls(kind: str) -> None:
    """A task that prints more than any pipe holds, with a slow reader, ends; so does everything else."""
    source = """
kind = sys.argv[1]
runner = Runner(kind, 2)
talk = runner.submit(lambda: [print("z" * 1000) for _ in range(5000)] and None)
for number in range(100):
    assert runner.call(helpers.square, number) == number * number
runner.value(talk)
runner.close()
"""
    outcome = run(source, kind)
    outcome.assert_clean()
    assert outcome.stdout.count("z" * 1000) == 5000
