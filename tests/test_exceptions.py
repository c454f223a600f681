from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import re

import pytest
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from starcast import exceptions
from starcast.backends.base import LoginRefused, MessagesRefused, SubscriptionRevoked
from starcast.backends.nats_jetstream import JetStreamError
from starcast.exceptions import (
    BackendUnavailable,
    ClientGone,
    CommandError,
    ConfigurationError,
    DisconnectClient,
    EncodingError,
    InvalidChannel,
    InvalidMessage,
    NotConnected,
    OriginRefused,
    PayloadTooLarge,
    PublishQueueFull,
    StarcastError,
    SubscriberLagged,
)
from starcast.sync.bounded import BoundedQueue, Full

ERRORS = {
    name: cls
    for name, cls in vars(exceptions).items()
    if inspect.isclass(cls) and cls.__module__ == exceptions.__name__
}

# "    ├── Name   (Base, 1008)" -> {"Name": "Base, 1008"}
TREE = dict(re.findall(r"^    (?:[├└]── )?(\w+)(?: +\((.+?)\))?", exceptions.__doc__, re.MULTILINE))


def test_the_docstring_draws_every_error_of_the_module():
    assert set(TREE) == set(ERRORS)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_an_error_is_what_the_tree_says(name):
    cls = ERRORS[name]
    assert issubclass(cls, StarcastError)
    named = set(re.findall(r"[A-Z]\w+", TREE[name]))
    for other in (ValueError, WebSocketDisconnect):
        assert issubclass(cls, other) is (other.__name__ in named)
    statuses = [int(number) for number in re.findall(r"\b\d{3}\b", TREE[name])]
    codes = [int(number) for number in re.findall(r"\b\d{4}\b", TREE[name])]
    assert issubclass(cls, WebSocketException) is bool(codes and not statuses)
    if statuses:
        assert [cls.status_code, cls.code] == statuses + codes


def test_an_error_is_caught_by_the_base_only_if_it_is_starcasts():
    assert StarcastError.__bases__ == (Exception,)


@pytest.mark.parametrize(
    ("error", "code", "reason", "says"),
    [
        (OriginRefused("'http://x' may not"), 1008, "origin not allowed", "'http://x' may not"),
        (InvalidMessage(1007, "not valid JSON"), 1007, "not valid JSON", "not valid JSON (1007)"),
        (InvalidMessage(1003, "text only"), 1003, "text only", "text only (1003)"),
    ],
)
def test_an_error_with_a_close_code(error, code, reason, says):
    assert isinstance(error, WebSocketException)
    assert error.code == code
    assert error.reason == reason
    assert str(error) == says


@pytest.mark.parametrize(
    "cls",
    [
        StarcastError,
        ConfigurationError,
        EncodingError,
        NotConnected,
        PublishQueueFull,
        SubscriberLagged,
        InvalidChannel,
        BackendUnavailable,
        PayloadTooLarge,
    ],
)
def test_an_error_without_a_close_code_says_its_message(cls):
    assert str(cls("what was wrong")) == "what was wrong"


def test_a_client_that_is_gone_has_the_code_it_left_with():
    assert ClientGone(1006).code == 1006
    assert ClientGone(4000, "bye").reason == "bye"


def subclasses(cls):
    return [cls, *(each for sub in cls.__subclasses__() for each in subclasses(sub))]


EVERY_ERROR = [
    *(OriginRefused("what was wrong"), OriginRefused(message="what was wrong")),
    *(InvalidMessage(1007, "what was wrong"), InvalidMessage(code=1007, reason="what was wrong")),
    *(ClientGone(4000, "what was wrong"), ClientGone(code=4000, reason="what was wrong")),
    *(CommandError(400, "what was wrong"), CommandError(code=400, message="what was wrong")),
    *(
        DisconnectClient(4500, "what was wrong"),
        DisconnectClient(code=4500, reason="what was wrong"),
    ),
    Full("what was wrong", BoundedQueue(contextlib.nullcontext(), 1)),
    *(
        cls("what was wrong")
        for cls in [
            *ERRORS.values(),
            *(LoginRefused, MessagesRefused, SubscriptionRevoked, JetStreamError),
        ]
        if cls not in (OriginRefused, InvalidMessage, ClientGone, CommandError, DisconnectClient)
    ),
]


def test_these_are_all_errors():
    import starcast.backends.nats
    import starcast.backends.postgres
    import starcast.backends.redis

    assert starcast.backends.nats
    assert starcast.backends.postgres
    assert starcast.backends.redis
    public = {cls for cls in subclasses(StarcastError) if "_public" not in vars(cls)}
    assert {type(error) for error in EVERY_ERROR} == public


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_what_celery_and_sentry_print_of_an_error_has_its_message(error):
    assert repr(error) == f"{type(error).__name__}({str(error)!r})"
    assert "what was wrong" in str(error)


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_an_error_can_be_pickled_and_copied(error, again):
    same = again(error)
    if not isinstance(error, Full):  # a queue cannot be sent to another process
        assert type(same) is type(error)
        assert vars(same) == vars(error)
    assert isinstance(same, StarcastError)
    assert str(same) == str(error)
    assert same.args == error.args
    assert str(type(same)(*same.args)) == str(error)  # what Celery makes of it without pickle


def test_what_a_client_gave_as_its_reason_begins_no_line():
    assert str(ClientGone(4000, "bye\nERROR")) == r"the client has left (4000, 'bye\nERROR')"
    assert str(ClientGone(1006)) == "the client has left (1006)"


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidChannel("no"), 1008),
        (OriginRefused("no"), 1008),
        (InvalidMessage(1007, "no"), 1007),
    ],
)
def test_raised_in_a_route_it_closes_the_client_and_nothing_else(error, code, accept):
    async def endpoint(websocket):
        if accept:
            await websocket.accept()
        raise error

    with TestClient(Starlette(routes=[WebSocketRoute("/", endpoint)])) as client:
        with pytest.raises(WebSocketDisconnect) as raised, client.websocket_connect("/") as socket:
            socket.receive_text()
        assert raised.value.code == code
