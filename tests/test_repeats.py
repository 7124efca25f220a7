import logging

import pytest

from hub_magmax import hub
from hub_magmax.cli.display import PAUSE_SECONDS, LogOptions, Repeats, displayed

LOST = "a request failed ('the network is unreachable')"


@pytest.fixture
def lost(monkeypatch):
    """Requests to a Hub that is lost, until it is found again."""
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)

    def ask(times):
        answers = iter([ConnectionError("the network is unreachable")] * times)

        def call():
            for error in answers:
                raise error
            return "found"

        return hub.retry(call, lambda error: isinstance(error, ConnectionError))

    return ask


def test_of_many_equal_failures_the_first_is_told_and_the_end(capsys, lost):
    with displayed(LogOptions()):
        for _ in range(9):
            with pytest.raises(ConnectionError):
                lost(100)
        assert lost(6) == "found"
    assert capsys.readouterr().err.splitlines() == [
        f"{LOST}; asking again in 2 s",
        "requests are answered again, after 60 that failed",
    ]


def test_short_failures_are_details(capsys, lost):
    with displayed(LogOptions()):
        assert lost(2) == "found"
    assert capsys.readouterr().err == ""
    with displayed(LogOptions(verbose=True)):
        assert lost(6) == "found"
    assert capsys.readouterr().err.count("asking again") == 6


def test_failures_that_last_are_counted_now_and_then():
    told, kept = Repeats(), []
    for second in range(0, 130, 10):
        record = logging.makeLogRecord(
            {"msg": "%s; again", "args": (LOST,), "levelno": logging.INFO, "fails": LOST, "created": second}
        )
        if told.filter(record):
            kept.append((second, record.getMessage()))
    assert PAUSE_SECONDS == 60
    assert kept == [
        (0, f"{LOST}; again"),
        (60, f"{LOST}; 7 requests failed by now, and are sent again"),
        (120, f"{LOST}; 13 requests failed by now, and are sent again"),
    ]


def test_failures_that_come_and_go_are_not_told_each_time():
    told, kept = Repeats(), []
    for second in range(5):
        for more in ({"fails": LOST, "levelno": logging.INFO}, {"passes": True, "levelno": logging.DEBUG}):
            record = logging.makeLogRecord({"msg": "said", "created": second, **more})
            if told.filter(record) and record.levelno >= logging.INFO:
                kept.append(record.getMessage())
    assert kept == ["said", "requests are answered again, after 1 that failed"]
