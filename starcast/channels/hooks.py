"""Hooks: call the app's functions that decide what a client may do, and check what they return.

They fail closed: nothing is allowed by a function that returns nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket

from .. import logs, serving
from ..exceptions import CommandError, ConfigurationError
from . import codes
from .model import Client, Subscription

Hook = Callable[..., Any]

# Characters of what pydantic says about data that does not fit a model.
MAX_WORDS = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Hooks:
    """The functions of an app; None where it has none. `ChannelsEndpoint` describes them."""

    on_connect: Hook | None = None
    on_subscribe: Hook | None = None
    on_publish: Hook | None = None
    on_rpc: Hook | None = None
    on_refresh: Hook | None = None
    on_disconnect: Hook | None = None
    models: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    async def connect(self, websocket: WebSocket, token: str, data: Any) -> Client:
        """Ask who a client is."""
        if self.on_connect is None:
            return Client()
        client: Client = await ask(
            Client, codes.UNAUTHORIZED, self.on_connect, websocket, token, data
        )
        return client

    async def subscribe(
        self, websocket: WebSocket, channel: str, token: str, data: Any
    ) -> Subscription:
        """Ask whether a client may subscribe."""
        hook = self._need(self.on_subscribe, codes.PERMISSION_DENIED)
        subscription: Subscription = await ask(
            Subscription, codes.PERMISSION_DENIED, hook, websocket, channel, token, data
        )
        return subscription

    async def publish(self, websocket: WebSocket, channel: str, data: Any) -> Any:
        """Ask what a client publishes."""
        hook = self._need(self.on_publish, codes.PERMISSION_DENIED)
        data = fit(data_model(hook), data)
        return await ask(object, codes.PERMISSION_DENIED, hook, websocket, channel, data)

    async def rpc(self, websocket: WebSocket, method: str, data: Any) -> Any:
        """Call a method."""
        hook = self._need(self.on_rpc, codes.METHOD_NOT_FOUND)
        data = fit(self.models.get(method, data_model(hook)), data)
        return await call(hook, websocket, method, data)

    async def refresh(self, websocket: WebSocket, token: str) -> float:
        """Ask until when a client may stay."""
        hook = self._need(self.on_refresh, codes.NOT_AVAILABLE)
        return float(await ask((int, float), codes.TOKEN_EXPIRED, hook, websocket, token))

    async def disconnect(self, websocket: WebSocket, code: int) -> None:
        """Tell that a client has left."""
        if self.on_disconnect is not None:
            await call(self.on_disconnect, websocket, code)

    def _need(self, hook: Hook | None, code: codes.Code) -> Hook:
        if hook is None:
            raise CommandError(*code)
        return hook


async def call(hook: Hook, *args: Any) -> Any:
    """Call a hook, in a thread if it is a plain function."""
    if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(
        getattr(hook, "__call__", None)  # noqa: B004  # an object with an async __call__
    ):
        return await hook(*args)
    answer = await run_in_threadpool(hook, *args)
    return await answer if inspect.isawaitable(answer) else answer


async def ask(expected: Any, denied: codes.Code, hook: Hook, *args: Any) -> Any:
    """Call a hook that has to return something of a type.

    Raises:
        CommandError: It has returned None, which allows nothing.
        ConfigurationError: It has returned something else.
    """
    answer = await call(hook, *args)
    if isinstance(answer, expected) and answer is not None and answer is not True:
        return answer
    name = getattr(hook, "__name__", "hook")
    names = getattr(expected, "__name__", "a time")
    if answer is None:
        logs.once(
            ("hook returned None", name),
            "refused a client because %s returned None; return %s to allow it, and raise "
            "PermissionError to refuse it",
            name,
            "what is to be published" if expected is object else names,
        )
        raise CommandError(*denied)
    raise ConfigurationError(f"{name} has to return {names}, not {type(answer).__name__}")


def data_model(hook: Hook) -> Any:
    """Return the type of a hook's parameter `data`; Any if it names none."""
    return _data_model(getattr(hook, "__func__", hook))


@functools.lru_cache(maxsize=1024)
def _data_model(function: Hook) -> Any:
    try:
        return typing.get_type_hints(function).get("data", Any)
    except (NameError, TypeError):  # a name that exists for type checkers only
        return Any


def fit(model: Any, data: Any) -> Any:
    """Return a client's data as an object of a type, which pydantic checks.

    Raises:
        CommandError: It does not fit: bad request, with pydantic's words.
        ConfigurationError: pydantic is not installed.
    """
    if model in (Any, object, inspect.Parameter.empty):
        return data
    adapter = _adapter(model)
    try:
        return adapter.validate_json(json.dumps(data))
    except serving.validation_errors() as exc:
        errors: Any = exc
        words = "; ".join(
            f"{'.'.join(map(str, error['loc']))}: {error['msg']}" if error["loc"] else error["msg"]
            for error in errors.errors(
                include_url=False, include_context=False, include_input=False
            )
        )
        raise CommandError(codes.BAD_REQUEST.number, words[:MAX_WORDS]) from None


@functools.lru_cache(maxsize=1024)
def _adapter(model: Any) -> Any:
    try:
        from pydantic import TypeAdapter
    except ImportError:
        raise ConfigurationError(f"pydantic has to be installed for {model!r}") from None
    return TypeAdapter(model)
