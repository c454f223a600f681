"""Tests of the checks of backends that keep a history: each finds what it is for."""

from __future__ import annotations

import pytest

from history.keeping import KeepingBroker, KeepingBus, KeepingConnection
from starcast import testing
from starcast.testing.history import CHECKS

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_a_backend_that_is_right(anyio_backend, check):
    broker = KeepingBroker()
    await check(lambda: KeepingBus(broker))


WRONG = {
    "no position": "what_is_kept_arrives_with_its_position",
    "forgets": "what_is_kept_can_be_read",
    "always complete": "a_history_says_whether_something_is_missing",
    "ignores keys": "what_is_published_again_with_its_key_is_published_once",
    "kept first": "kept_and_other_messages_keep_their_order",
    "skips offsets": "several_connections_keep_one_history",
    "one channel": "odd_names_have_histories_of_their_own",
    "drops": "a_hub_misses_nothing",
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_backend_that_is_wrong(anyio_backend, monkeypatch, wrong):
    monkeypatch.setattr(testing, "DEADLINE", 0.5)
    broker = KeepingBroker()
    keep, read = KeepingBroker.keep, KeepingBroker.read
    publish = KeepingConnection.publish

    def badly_keep(self, message):
        if wrong == "ignores keys":
            message = message._replace(key=None)
        if wrong == "one channel":
            self.logs.setdefault(message.channel, self.log("the one"))
        if wrong == "skips offsets":
            self.log(message.channel).top += 1
        if wrong == "drops":
            self.logs.pop(message.channel, None)
        return keep(self, message)

    def badly_read(self, channel, since, limit, reverse):
        if wrong == "forgets":
            self.logs.pop(channel, None)
        stored = read(self, channel, since, limit, reverse)
        return stored._replace(complete=True) if wrong == "always complete" else stored

    def badly_publish(self, messages):
        return publish(self, messages[::-1] if wrong == "kept first" else messages)

    monkeypatch.setattr(KeepingBroker, "keep", badly_keep)
    monkeypatch.setattr(KeepingBroker, "read", badly_read)
    monkeypatch.setattr(KeepingConnection, "publish", badly_publish)
    if wrong == "no position":
        connect = KeepingBus.connect

        async def deaf(self, deliver, lost):
            return await connect(self, lambda channel, payload, *_: deliver(channel, payload), lost)

        monkeypatch.setattr(KeepingBus, "connect", deaf)
    check = next(it for it in CHECKS if it.__name__ == WRONG[wrong])
    with pytest.raises((AssertionError, TimeoutError)):
        await check(lambda: KeepingBus(broker))
