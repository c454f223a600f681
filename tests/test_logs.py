from __future__ import annotations

import logging
import threading

from starcast import logs


def test_a_kind_is_logged_once(caplog):
    for number in range(3):
        logs.once(("door", "None"), "number %d", number)
    logs.once(("door", "False"), "another")
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("starcast", logging.WARNING, "number 0"),
        ("starcast", logging.WARNING, "another"),
    ]


def test_after_a_reset_it_is_logged_again(caplog):
    logs.once(("door",), "one")
    logs.reset()
    logs.once(("door",), "two")
    assert [record.getMessage() for record in caplog.records] == ["one", "two"]


def test_a_process_logs_a_hundred_kinds(caplog):
    for number in range(logs.MAX_KINDS + 10):
        logs.once((str(number),), "x")
    assert len(caplog.records) == logs.MAX_KINDS == 100


def test_one_cause_does_not_use_up_the_lines_of_the_others(caplog):
    for number in range(500):
        logs.once(("origin", str(number)), "x")
    assert len(caplog.records) == logs.MAX_ALIKE
    logs.once(("authorize", "None"), "is heard")
    assert caplog.records[-1].getMessage() == "is heard"


def test_from_threads_it_is_logged_once_too(caplog):
    start = threading.Barrier(8)

    def say() -> None:
        start.wait()
        for number in range(10):
            logs.once(("kind", str(number)), "x")

    threads = [threading.Thread(target=say) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caplog.records) == 10
