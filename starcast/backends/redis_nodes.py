"""The nodes of a Redis cluster, of which each has the histories of some channels.

Publishing and subscribing work at any node, but a script has to be called at the node that has its
keys. The first node is asked; if the keys are elsewhere, it says where, and that is remembered. A
server that is no cluster is the only node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import MovedError, NoScriptError

from .base import MessagesRefused
from .redis_history import Call, Script, server_of
from .redis_stream import Command, Stream

# How often a call follows its keys, or the script is given to a node that has forgotten it.
MAX_TRIES = 5


class Address(NamedTuple):
    """That of a node."""

    host: str
    port: int


OpenNode = Callable[[str, int], Awaitable[AbstractConnection]]


class _Node:
    """One node, and what it was asked."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.server = ""  # what names it in the keys of channels; empty until it was asked
        self.unknown: set[str] = set()  # the digests of scripts that it may not know

    async def call(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Call a script several times, and return the answers, with an error for a refusal."""
        if not self.server:
            await self._ask()
        arguments = [call.arguments(self.server) for call in calls]
        commands: list[Command] = [("EVALSHA", script.digest, *it) for it in arguments]
        if script.digest in self.unknown:
            self.unknown.discard(script.digest)
            commands[0] = ("EVAL", script.source, *arguments[0])
        answers = await self._execute(commands)
        if NoScriptError in map(type, answers):
            # Coverage does not see this on Python 3.11, after the error that `_execute` suppresses.
            self.unknown.add(script.digest)  # pragma: no cover  # see above
        return answers

    async def _ask(self) -> None:
        answers = await self._execute([("INFO", "server"), ("INFO", "persistence")])
        # The user may not be allowed to ask.
        self.server = server_of(b"".join(it for it in answers if isinstance(it, bytes)))

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        answers: list[Any] = []
        with contextlib.suppress(MessagesRefused):  # the errors are among the answers
            await self.stream.execute(commands, answers)
        return answers


class Nodes:
    """See the module.

    Args:
        first: The stream to the node that commands go to.
        open_node: Connects to another one.
        make_stream: Makes a stream of that connection, or raises if it is too late for that.
    """

    def __init__(
        self,
        first: Stream,
        open_node: OpenNode,
        make_stream: Callable[[AbstractConnection], Stream],
    ) -> None:
        self._first = _Node(first)
        self._open_node = open_node
        self._make_stream = make_stream
        self._others: dict[Address, _Node] = {}
        self._of_slot: dict[int, _Node] = {}
        self._opening = asyncio.Lock()

    @property
    def streams(self) -> list[Stream]:
        """Those to all nodes that are connected to."""
        return [node.stream for node in (self._first, *self._others.values())]

    @property
    def silent_since(self) -> float:
        """Since when an answer of a node is due and no bytes have arrived."""
        return min(stream.silent_since for stream in self.streams)

    async def call(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Call a script several times, each where its keys are.

        Returns:
            The answers, with an error for each call that was refused.
        """
        answers: dict[int, Any] = {}
        numbers = list(range(len(calls)))
        for _ in range(MAX_TRIES):  # pragma: no branch  # nothing moves that often in a test
            found = await asyncio.gather(
                *(
                    node.call(script, [calls[number] for number in its])
                    for node, its in self._by_node(calls, numbers).items()
                )
            )
            by_node = self._by_node(calls, numbers).values()
            for its, answered in zip(by_node, found, strict=True):
                answers |= zip(its, answered, strict=True)
            numbers = [n for n in numbers if isinstance(answers[n], NoScriptError | MovedError)]
            if not numbers:
                break
            for error in {str(it): it for it in map(answers.get, numbers)}.values():
                if isinstance(error, MovedError):
                    await self._follow(error)
        return [answers[number] for number in range(len(calls))]

    def _by_node(self, calls: Sequence[Call], numbers: Sequence[int]) -> dict[_Node, list[int]]:
        if not self._of_slot:
            return {self._first: list(numbers)}
        found: dict[_Node, list[int]] = {}
        for number in numbers:
            node = self._of_slot.get(key_slot(calls[number].key), self._first)
            found.setdefault(node, []).append(number)
        return found

    async def _follow(self, error: MovedError) -> None:
        """Note which node has a slot, and connect to it."""
        self._of_slot[error.slot_id] = await self._node_at(Address(error.host, error.port))

    async def _node_at(self, address: Address) -> _Node:
        async with self._opening:
            if address in self._others:
                return self._others[address]
            socket = await self._open_node(*address)
            node = self._others[address] = _Node(self._make_stream(socket))
            return node
