"""History: how much of a channel's past is kept, and how a place in it is named."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from .exceptions import ConfigurationError
from .internal import is_internal
from .tuning import check_positive

# A publish that is tried again with the same idempotency key is recognised for this long, in
# seconds, or for the history's `ttl` if that is less.
MAX_KEY_TTL = 300.0

# How long a broker remembers the position of a channel on which nothing is published, in seconds
# beyond the history's `ttl`. A client of a quiet channel is told for a day that it has missed
# nothing.
POSITION_TTL = 24 * 3600

# Channels whose setting is remembered, so that the patterns are not compared for each message.
_MAX_FOUND = 4096

_ID = re.compile(r"([A-Za-z0-9]{1,32})-(0|[1-9][0-9]{0,17})")


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """How much is kept of what was published to a channel: `Broadcast(url, history=History())`.

    Args:
        size: Messages of each channel at most, 1 to 100,000; 100 by default.
        ttl: For how many seconds a message is kept, more than 0; 300 by default.
        max_channels: In memory, how many channels with this setting may have a history; 10,000 by
            default. Beyond that, those go first that were not used for the longest time. Not used
            with a broker, which forgets a channel a day after its last message.

    Raises:
        ConfigurationError: A value is not valid.
    """

    size: int = 100
    ttl: float = 300.0
    max_channels: int = 10_000

    def __post_init__(self) -> None:
        for name, largest in (("size", 100_000), ("max_channels", 10_000_000)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
                raise ConfigurationError(f"{name} is a number from 1 to {largest}, not {value!r}")
        check_positive("ttl", self.ttl)

    @property
    def key_ttl(self) -> float:
        """For how many seconds an idempotency key is recognised."""
        return min(self.ttl, MAX_KEY_TTL)


class Position(NamedTuple):
    """A place in a channel's history. Its `str()` is the id of the event at that place.

    Attributes:
        epoch: 1 to 32 ASCII letters and digits. It is another one once the history was lost.
        offset: Within one epoch, it grows with each event of the channel; 0 before the first.
    """

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"


def parse_id(text: object) -> Position | None:
    """Return the position that an id names; None if it is none, whoever has sent it."""
    found = _ID.fullmatch(text) if isinstance(text, str) else None
    return None if found is None else Position(found[1], int(found[2]))


class Wish(NamedTuple):
    """What is asked for of a channel's past.

    Attributes:
        since: The id of the last event that is known; None for none.
        last: How many of the newest events to get if there is no `since`, or it is not recovered.
    """

    since: str | None = None
    last: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return self.since is None and not self.last


@dataclasses.dataclass(frozen=True, slots=True)
class Resumed:
    """Where a client or a subscriber begins on a channel that has a history.

    Attributes:
        id: The id of the newest event when it joined. What it gets after its past comes after this.
        recovered: Whether it gets everything since the event that it named. If not, something may
            be missing, and it gets no part of it. None if it named none.
    """

    id: str
    recovered: bool | None = None


def check_count(name: str, count: object) -> int:
    """Return a number of events, or raise `ConfigurationError`."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        hint = "; it belongs in Broadcast(history=...)" if isinstance(count, History) else ""
        raise ConfigurationError(f"{name} is a number of events, not {count!r}{hint}")
    return count


class Histories:
    """Which channels have a history. From any thread.

    Args:
        setting: The hub's `history`: one for all channels, or a mapping of names. A name that ends
            with `*` stands for all channels that begin with what is before it. The longest name
            that fits decides.

    Raises:
        ConfigurationError: It is something else.
    """

    def __init__(self, setting: History | Mapping[str, History | None] | None) -> None:
        if setting is None or isinstance(setting, History):
            setting = {"*": setting}
        if not isinstance(setting, Mapping):
            raise ConfigurationError(
                f"history must be a History or a dict of them by channel, not {setting!r}"
            )
        for name, history in setting.items():
            if not isinstance(name, str) or not name or "*" in name[:-1]:
                raise ConfigurationError(
                    "a name in history is that of a channel or the beginning of one with a * at "
                    f"its end, not {name!r}"
                )
            if not (history is None or isinstance(history, History)):
                raise ConfigurationError(
                    f"history[{name!r}] must be a History or None, not {history!r}"
                )
        self._exact = {name: it for name, it in setting.items() if not name.endswith("*")}
        prefixes = {name[:-1]: it for name, it in setting.items() if name.endswith("*")}
        self._prefixes = sorted(prefixes.items(), key=lambda item: -len(item[0]))
        self._found: dict[str, History | None] = {}
        self.any = any(setting.values())  # whether any channel may have one

    def find(self, channel: str) -> History | None:
        """Return the setting of a channel; None if it has no history."""
        if not self.any or is_internal(channel):
            return None
        try:
            return self._found[channel]
        except KeyError:
            pass
        if len(self._found) >= _MAX_FOUND:
            self._found = {}
        found = self._exact.get(channel)
        if channel not in self._exact:
            fitting = (it for prefix, it in self._prefixes if channel.startswith(prefix))
            found = next(fitting, None)
        self._found[channel] = found
        return found
