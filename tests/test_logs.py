"""Lines that are logged once for each kind."""

from __future__ import annotations

from starcast import logs


def test_a_kind_is_logged_once(caplog):
    once = logs.Once()
    for name in ("one", "two"):
        once("kind", "refused %s", name)
    once("another", "refused %s", "three")
    assert [record.getMessage() for record in caplog.records] == ["refused one", "refused three"]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert {record.name for record in caplog.records} == {"starcast"}


def test_one_does_not_know_of_the_other(caplog):
    for _ in range(2):
        logs.Once()("kind", "refused")
    assert len(caplog.records) == 2


def test_what_is_remembered_has_a_bound(caplog):
    once = logs.Once()
    for _ in range(2):
        for number in range(logs.MAX_KINDS + 50):
            once(number, "refused %d", number)
    assert len(caplog.records) == logs.MAX_KINDS


def test_text_of_a_user_is_no_format(caplog):
    logs.Once()("kind", "refused %r", "%s %d\r\n")
    assert caplog.records[0].getMessage() == r"refused '%s %d\r\n'"
