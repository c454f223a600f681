"""Listener: calls a function with what arrives on internal channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .event import Event, Gap
from .history import Resumed, Wish
from .outbox import Close, Item, Outbox
from .subscriber import Subscription


class Listener(Subscription):
    """Calls a function with what arrives on internal channels, in order, on its event loop.

    Pass it to `Hub.join`, and to `Registry.unsubscribe` in the end. Its functions neither block nor
    raise.

    Args:
        channels: The channels.
        on_event: Called with each event.
        on_gap: Called when the broker is back after an outage: events before that may be missing.
        on_close: Called when the hub is closed.
    """

    gaps = True

    def __init__(
        self,
        channels: Iterable[str],
        on_event: Callable[[Event], None],
        on_gap: Callable[[Gap], None] = lambda gap: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        # Nothing ever waits in the outbox: the functions take everything at once.
        super().__init__({channel: Wish() for channel in channels}, Outbox())
        self._on_event = on_event
        self._on_gap = on_gap
        self._on_close = on_close

    def begin(self, channel: str, past: Iterable[Event], resumed: Resumed) -> None:
        """Not called: internal channels have no history."""
        raise NotImplementedError  # pragma: no cover  # see above

    def offer(self, items: Sequence[Item]) -> None:
        """Pass items on."""
        for item in items:
            if isinstance(item, Event):
                self._on_event(item)
            elif isinstance(item, Gap):
                self._on_gap(item)
            else:
                assert isinstance(item, Close)
                self._on_close()

    def lose(self, *, drop: bool = False) -> None:
        """Not called: it belongs to no client."""
        raise NotImplementedError  # pragma: no cover  # see above
