"""What is published is the JSON that FastAPI would return, key for key."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import ipaddress
import json
import math
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pydantic
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, SecretBytes, SecretStr
from pydantic import dataclasses as pydantic_dataclasses

from starcast import Broadcast, ConnectionManager, codec
from support import Peer, examples

UID = uuid.UUID("12345678-1234-5678-1234-567812345678")
NOON = datetime.datetime(2024, 2, 29, 12, 30, 15, 250)
NOON_UTC = NOON.replace(tzinfo=datetime.UTC)
NOON_HERE = NOON.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=-5, minutes=-30)))
PAUSE = datetime.timedelta(days=400, seconds=90, microseconds=5)


class Author(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    full_name: str = Field("Ann", alias="fullName")


class Book(BaseModel):
    """Every type that people put into models, with aliases of each kind."""

    written_by: Author = Field(default_factory=Author, serialization_alias="writtenBy")
    more: dict[str, list[Author]] = Field({"x": [Author()]}, alias="andMore")
    tags: set[int] = {1}
    frozen: frozenset[str] = frozenset("a")
    price: decimal.Decimal = decimal.Decimal("1.10")
    file: pathlib.Path = pathlib.Path("/tomes/1")
    loan: datetime.timedelta = PAUSE
    blob: bytes = b"xx"
    queue: collections.deque[int] = collections.deque([1, 2])
    address: ipaddress.IPv4Address = ipaddress.IPv4Address("127.0.0.1")
    uid: uuid.UUID = UID
    secret: SecretStr = SecretStr("hush")
    at: datetime.datetime = NOON_UTC
    anything: Any = None
    hidden: int = Field(1, exclude=True)


class Shelf(RootModel[list[Author]]):
    pass


class Square(BaseModel):
    side: int = 2

    @pydantic.computed_field(alias="theArea")
    @property
    def area(self) -> int:
        return self.side**2

    @pydantic.field_serializer("side")
    def shown(self, side: int) -> str:
        return f"<{side}>"


class Money(BaseModel):
    cents: int = 250

    @pydantic.model_serializer
    def shown(self) -> str:
        return f"{self.cents / 100:.2f} EUR"


class Base64(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", ser_json_timedelta="float")

    blob: bytes = b"\xff"
    pause: datetime.timedelta = PAUSE


class ByName(BaseModel):
    model_config = ConfigDict(serialize_by_alias=False, populate_by_name=True)

    full_name: str = Field("Ann", alias="fullName")


class Novelist(Author):
    prizes: int = 3


@dataclasses.dataclass
class Loan:
    book: Book
    by: Author


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int = 1


@pydantic_dataclasses.dataclass
class Reader:
    full_name: str = Field("Ann", serialization_alias="fullName")


class Club(BaseModel):
    loan: Loan
    reader: Reader


class Place(NamedTuple):
    shelf: int
    row: str


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


class Word(enum.StrEnum):
    HELLO = "hello"


class Level(enum.IntEnum):
    HIGH = 3


CLUB = Club(loan=Loan(Book(), Author()), reader=Reader())

# What FastAPI writes in the same way with and without a return annotation.
SAME: list[tuple[Any, Any]] = [
    (Author(), Author),
    (Book(), Book),
    ([Book(anything=Author())], list[Book]),
    ({"a": Author(), "b": Author()}, dict[str, Author]),
    ({"deep": [{"in": (Author(),)}]}, dict[str, list[dict[str, tuple[Author]]]]),
    (Shelf([Author()]), Shelf),
    (Square(), Square),
    (Money(), Money),
    (Base64(), Base64),
    (ByName(), ByName),
    (Loan(Book(), Author()), Loan),
    ([Loan(Book(), Author())], list[Loan]),
    (Point(), Point),
    (CLUB, Club),
    (Place(1, "a"), Place),
    ([Colour.RED, Colour.PAIR], list[Colour]),
    ([Word.HELLO, Level.HIGH], list[Word | Level]),
    ({1, 2, 3}, set[int]),
    (frozenset([1]), frozenset[int]),
    (collections.deque([1, 2]), collections.deque[int]),
    ({"a": {1}, "b": collections.deque(["x"])}, dict[str, Any]),
    ([pathlib.Path("/a"), pathlib.PurePosixPath("b")], list[pathlib.PurePosixPath]),
    (pathlib.PureWindowsPath("C:\\a"), pathlib.PureWindowsPath),
    ([b"ab", b""], list[bytes]),
    (ipaddress.ip_address("::1"), ipaddress.IPv6Address),
    (ipaddress.ip_network("10.0.0.0/8"), ipaddress.IPv4Network),
    (ipaddress.ip_interface("10.0.0.1/8"), ipaddress.IPv4Interface),
    (UID, uuid.UUID),
    ([SecretStr("hush")], list[SecretStr]),
    (pydantic.AnyUrl("https://example.com"), pydantic.AnyUrl),
    ([NOON, NOON_HERE], list[datetime.datetime]),
    (NOON.date(), datetime.date),
    (NOON.time(), datetime.time),
    ({UID: 1}, dict[uuid.UUID, int]),
    ({Colour.RED: 1}, dict[Colour, int]),
    ({NOON.date(): Author()}, dict[datetime.date, Author]),
    ({7: 1, 1.5: 2, True: 3}, dict[Any, int]),
    (collections.OrderedDict(a=1), dict[str, int]),
    (collections.defaultdict(list, a=[1]), dict[str, list[int]]),
    ({"a": [1, 2.5, None, True, "h\xe9\n"]}, dict[str, Any]),
    ([0.1, 1e-7, 1e22, 5e-324, 10**30], list[float | int]),
]

# Where a return annotation makes a difference: the value, what pydantic writes (and a route with
# an annotation, and we), what a route without one writes.
DIFFERENT: list[tuple[Any, Any, Any]] = [
    (decimal.Decimal("1.10"), "1.10", 1.1),
    (decimal.Decimal("1"), "1", 1),
    (datetime.timedelta(seconds=90), "PT1M30S", 90.0),
    (NOON_UTC, "2024-02-29T12:30:15.000250Z", "2024-02-29T12:30:15.000250+00:00"),
    (Reader(), {"fullName": "Ann"}, {"full_name": "Ann"}),
    (SecretBytes(b"hush"), "**********", "b'**********'"),
    ({"_sa_state": 1}, {"_sa_state": 1}, {}),
    ({(1, 2): 3}, {"1,2": 3}, None),
]


def parsed(text: str | bytes) -> Any:
    """JSON with the order of its keys."""
    return json.loads(text, object_pairs_hook=lambda pairs: ("object", pairs))


class Program:
    """A FastAPI app: a value returned by its routes, and the same value published."""

    def __init__(self) -> None:
        self.hub = Broadcast()
        self.app = FastAPI(lifespan=self.hub.lifespan)
        self.app.mount("/live", self.hub)
        self.app.get("/without")(self.without)
        self.app.get("/any")(self.any)
        self.app.post("/publish")(self.publish)

    def without(self):
        return self.value

    def any(self) -> Any:
        return self.value

    async def publish(self) -> None:
        await self.hub.publish("news", self.value, encoding="json")

    def returned(self, client: TestClient, annotation: Any) -> str:
        def route():
            return self.value

        route.__annotations__["return"] = annotation
        self.app.get("/annotated")(route)
        response = client.get("/annotated")
        del self.app.router.routes[-1]
        assert response.status_code == 200
        return response.text


@pytest.fixture(scope="module")
def program() -> Program:
    return Program()


@pytest.fixture(scope="module")
def client(program: Program) -> Iterator[TestClient]:
    with TestClient(program.app) as client:
        yield client


def published(client: TestClient) -> str:
    with client.websocket_connect("/live/news") as websocket:
        assert client.post("/publish").status_code == 200
        return websocket.receive_text()


@pytest.mark.parametrize(("value", "annotation"), SAME, ids=lambda v: type(v).__name__)
def test_a_message_is_the_json_of_a_route_with_and_without_an_annotation(
    program, client, value, annotation
):
    program.value = value
    message = parsed(published(client))
    assert message == parsed(client.get("/without").text)
    assert message == parsed(program.returned(client, annotation))


@pytest.mark.parametrize(
    ("value", "annotated", "not_annotated"), DIFFERENT, ids=lambda v: type(v).__name__
)
def test_where_fastapis_routes_differ_a_message_is_that_of_the_annotated_one(
    program, client, value, annotated, not_annotated
):
    program.value = value
    assert json.loads(published(client)) == annotated
    assert json.loads(program.returned(client, type(value))) == annotated
    if not_annotated is not None:
        assert client.get("/without").json() == not_annotated


def test_a_message_holds_all_that_an_object_holds(program, client):
    """A route filters by its annotation; `publish` has none."""
    program.value = Novelist()
    assert json.loads(published(client)) == {"fullName": "Ann", "prizes": 3}
    assert json.loads(program.returned(client, Author)) == {"fullName": "Ann"}


@pytest.mark.parametrize(
    "kind", [types.MappingProxyType, collections.UserDict, collections.Counter]
)
def test_a_mapping_is_an_object(program, client, kind):
    program.value = [kind({"at": 1})]
    assert json.loads(published(client)) == client.get("/without").json() == [{"at": 1}]


def test_a_pattern_is_its_source(program, client):
    program.value = {"pattern": re.compile("a+")}
    assert json.loads(published(client)) == client.get("/without").json() == {"pattern": "a+"}


@pytest.mark.parametrize("inside", [lambda value: value, lambda value: {"items": value}])
def test_a_generator_is_an_array(program, client, inside):
    program.value = inside(author for author in [Author()])
    message = published(client)
    program.value = inside(author for author in [Author()])
    assert message == client.get("/without").text


# Mixtures

authors = st.builds(Author, full_name=st.text(st.characters(codec="utf-8"), max_size=5))
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=5),
)
times = st.one_of(
    st.datetimes(timezones=st.sampled_from([None, datetime.UTC, NOON_HERE.tzinfo])),
    st.dates(),
    st.times(),
    st.timedeltas(),
)
words = st.one_of(
    plain,
    times,
    st.uuids(),
    st.decimals(allow_nan=False),
    st.sampled_from([*Colour, *Word, *Level]),
    st.ip_addresses(),
    st.binary(max_size=3).filter(bytes.isascii),
    st.sets(st.integers(), max_size=3),
    st.builds(pathlib.Path, st.text("ab/.", min_size=1, max_size=5)),
)
models = st.one_of(
    authors,
    st.builds(Book, more=st.dictionaries(st.text("ab", min_size=1), st.lists(authors, max_size=2))),
    st.builds(Square, side=st.integers()),
    st.builds(Loan, book=st.builds(Book), by=authors),
    st.builds(Reader),
    st.just(CLUB),
)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Containers of these, and models and dataclasses that hold them."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(collections.deque),
            st.tuples(inner, inner),
            st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
            st.builds(Book, anything=inner),
            st.builds(Loan, book=inner, by=authors),
        ),
        max_leaves=8,
    )


@settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=nested(words | models))
def test_any_mixture_is_the_json_of_a_route(program, client, value):
    program.value = value
    response = client.get("/any")
    assert response.status_code == 200
    assert parsed(published(client)) == parsed(response.text)


# Without pydantic in the process


@pytest.fixture
def without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pydantic_core")


def containers(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(collections.deque),
            st.builds(Loan, inner, inner),
            st.dictionaries(st.text("abc"), inner, max_size=3),
        ),
        max_leaves=8,
    )


@settings(max_examples=examples(150))
@given(value=containers(words))
def test_the_form_of_a_message_does_not_depend_on_whether_pydantic_is_loaded(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "pydantic_core")
        without = codec.dumps(value)
    assert parsed(without) == parsed(codec.dumps(value))


@pytest.mark.parametrize(
    "value",
    [
        datetime.timedelta(seconds=seconds)
        for seconds in (0, 1e-6, 0.5, 1, 59, 60, 61.25, 3600, 3661, 86_400, 90_000, 31_536_000, 1e9)
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_duration_has_pydantics_form_without_pydantic(value, sign):
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "pydantic_core")
        without = codec.dumps(sign * value)
    assert without == codec.dumps(sign * value)


@pytest.mark.usefixtures("without_pydantic")
@pytest.mark.parametrize(
    ("value", "written"),
    [
        (types.MappingProxyType({"a": 1}), '{"a":1}'),
        (pathlib.Path("/a"), '"/a"'),
        (ipaddress.ip_interface("10.0.0.1/8"), '"10.0.0.1/8"'),
        (ipaddress.ip_network("10.0.0.0/8"), '"10.0.0.0/8"'),
        (re.compile("a+"), '"a+"'),
        (bytearray(b"ab"), '"ab"'),
        ((number for number in range(2)), "[0,1]"),
        (Place(1, "a"), '[1,"a"]'),
        (NOON.time().replace(tzinfo=datetime.UTC), '"12:30:15.000250Z"'),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_written_without_pydantic(value, written):
    assert codec.dumps(value) == written


@pytest.mark.usefixtures("without_pydantic")
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "object cannot be written as JSON"),
        (Point, "type cannot be written as JSON"),
        ({UID: 1}, "keys must be str"),
        ({"a": float("nan")}, "not JSON compliant"),
        ([b"\xff"], "can't decode"),
        ([1j], "complex cannot be written as JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_refused_without_pydantic(value, says):
    with pytest.raises((TypeError, ValueError), match=says):
        codec.dumps(value)


def test_a_pydantic_that_is_just_being_imported_is_left_alone(monkeypatch):
    """Another thread imports it: the module is there, and its functions are not yet."""
    monkeypatch.setitem(sys.modules, "pydantic_core", types.ModuleType("pydantic_core"))
    assert codec.dumps([NOON_UTC]) == '["2024-02-29T12:30:15.000250Z"]'


# The manager writes a message once


@pytest.mark.anyio
@pytest.mark.parametrize("registered", [True, False])
async def test_a_generator_reaches_one_client_whole(registered):
    manager = ConnectionManager()
    peer = Peer()
    await peer.websocket.accept()
    if registered:
        await manager.connect(peer.websocket)
    await manager.send_personal_message((number for number in range(2)), peer.websocket)
    assert peer.got == ["[0,1]"]
    await manager.hub.disconnect()


# Errors


class Measured(BaseModel):
    value: float
    of: list[Any] = []


@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (-math.inf, "-Infinity")])
def test_numbers_that_are_not_json_are_refused_in_models_and_among_other_types(value, name):
    with pytest.raises(ValueError, match="not JSON"):
        codec.dumps(Measured(value=value))
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        codec.dumps(collections.deque([value]))


def test_an_error_in_a_model_names_what_cannot_be_written():
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        codec.dumps(Measured(value=1.0, of=[object()]))


def test_an_error_that_the_second_attempt_does_not_meet_is_raised_all_the_same():
    """The first attempt has used up the items of the generator, up to the one that failed."""

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("the generator failed")

    with pytest.raises(ValueError, match="the generator failed"):
        codec.dumps(Measured(value=1.0, of=[failing()]))
