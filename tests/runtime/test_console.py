"""What is printed: plain lines, the live display, the closing table."""

import io

import pytest

from jaxrl.runtime import console
from jaxrl.runtime.console import Console, before_after, duration, eta_seconds, sparkline, step_line

RECORD = {"step": 12, "reward/mean": 0.5312, "accuracy": 0.612, "response_length/mean": 9.84,
          "tokens_per_second": 31234.0, "time/step": 4.2, "time/rollout": 2.6, "time/grade": 0.1,
          "time/update": 1.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_line():
    assert step_line(RECORD, 100, 369.6) == (
        "step  12/100  reward 0.531  accuracy 0.612  length 9.8  31.2k tok/s  "
        "rollout 62% grade 2% update 36%  4.20 s/step  ETA 6m10s")
    assert step_line({"step": 1}, 9, None) == "step 1/9"
    assert "loss" not in step_line({"step": 1, "accuracy": None, "time/rollout": 0.0}, 9, None)


def test_plain_output_when_there_is_no_terminal(capsys):
    with Console(3) as c:
        c.note("before: 0.25")
        c.step({"step": 1, "accuracy": 0.5})
    with Console(3, enabled=False) as c:
        c.note("hidden")
        c.step({"step": 1})
    assert capsys.readouterr().out == "before: 0.25\nstep 1/3  accuracy 0.500\n"


def test_when_it_is_live(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.can_be_live(Terminal()) and not console.can_be_live(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")
    assert not console.can_be_live(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not console.can_be_live(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    assert not console.can_be_live(Terminal())


def test_live_display_shows_the_numbers():
    stream = Terminal()
    with Console(100, live=True, stream=stream) as c:
        c.step({**RECORD, "step": 11, "accuracy": 0.1})
        c.note("[bold] stays as it is")
        c.step(RECORD)
    text = stream.getvalue()
    for part in ("step 12/100", "reward 0.531", "31.2k tok/s", "rollout 62%", "ETA 6m10s", "▁█",
                 "[bold] stays as it is"):
        assert part in text, part


def test_eta_is_robust_to_a_slow_first_step():
    history = [{"step": s, "time/step": 100.0 if s == 1 else 2.0} for s in range(1, 6)]
    assert eta_seconds(history, 10) == 10.0
    assert eta_seconds([{"step": 3}], 10) is None
    assert eta_seconds([{"step": 12, "time/step": 1.0}], 10) == 0.0


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (370, "6m10s"),
                                           (3600, "1h00m"), (90000, "25h00m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_sparkline():
    assert sparkline([0, 0.5, 1]) == "▁▅█"
    assert sparkline([2, 2, None, float("nan")]) == "▁▁" and sparkline([]) == ""
    assert len(sparkline(range(100))) == 40


def test_before_after_table():
    out = io.StringIO()
    before_after([("accuracy", 0.33, 0.8123), ("length", 12.0, 9.5), ("new", None, 1.0)], out)
    assert out.getvalue().splitlines() == [
        "          before  after  change",
        "--------  ------  -----  ------",
        "accuracy   0.330  0.812  +0.482",
        "length      12.0  9.500  -2.500",
        "new            -  1.000"]
