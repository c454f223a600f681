"""History in Redis: a stream for each channel, and a hash with its epoch and its offset.

Each entry of a stream has the id `OFFSET-TIME`, with the time in milliseconds since 1970, and the
message as its only field. A script adds the entry, removes old ones and publishes the message, so
all of that is one step. What is published begins with two bytes that no text in UTF-8 and no
envelope begins with, then the event's id and a colon.

A server that comes back may have an older state, in which it would give the same offsets to other
messages. So a channel gets a new epoch if the server was started anew and does not write each
change to an append-only file, or if a hub knows that the channel was further than it is. With such
a file, only the last moment may be lost: the offsets go on a good deal further on, and where they
stopped is noted. Whoever is there has missed nothing. Whoever is further has got what was lost.

The names of a channel's keys have the same part in braces, so that they are in one slot of a
cluster.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any, NamedTuple

from ..exceptions import BackendUnavailable
from ..history import POSITION_TTL, History, Position, parse_id
from .base import Kept, Stored, StoredMessage

KEPT = b"\xff\x02"

# Lua 5.1 has floating-point numbers only, which hold integers up to 2 ** 53, and would write large
# ones with an exponent.
_COMMON = """
local function integer(number) return string.format('%.0f', number) end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Returns the epoch: a new one if the history was lost, or a part of it.
local function epoch_of(meta, stream, new, server, known_epoch, known_offset)
    local was = redis.call('HMGET', meta, 'epoch', 'server', 'offset')
    local offset = tonumber(was[3] or '0')
    local run, kept = string.match(server, '^(.-)(%+?)$')
    local was_run, was_kept = string.match(was[2] or '', '^(.-)(%+?)$')
    local is_same = run == was_run
    if was[1] and not is_same and kept == '+' and was_kept == '+' then
        redis.call('HSET', meta, 'stopped', integer(offset), 'went_on', integer(offset + 1e9))
        offset = redis.call('HINCRBY', meta, 'offset', 1000000000)
        is_same = true
    end
    local is_behind = was[1] == known_epoch and offset < tonumber(known_offset)
    if was[1] and is_same and not is_behind then
        if was[2] ~= server then redis.call('HSET', meta, 'server', server) end
        return was[1]
    end
    redis.call('DEL', stream, meta)
    redis.call('HSET', meta, 'epoch', new, 'server', server)
    return new
end

-- Removes the messages that are older than so many milliseconds.
local function expire(stream, ttl)
    local count = 1  -- most of the time, the first one is left
    while true do
        local entries = redis.call('XRANGE', stream, '-', '+', 'COUNT', count)
        local old = {}
        for _, entry in ipairs(entries) do
            if tonumber(string.match(entry[1], '%-(%d+)$')) >= now - ttl then break end
            table.insert(old, entry[1])
        end
        if #old > 0 then redis.call('XDEL', stream, unpack(old)) end
        if #old < #entries or #entries == 0 then return end
        count = 100
    end
end
"""

# KEYS: the stream, the hash, the idempotency key's.
# ARGV: the message, the channel, the size, the times to live of messages, of the hash and of the
# idempotency key in milliseconds, a new epoch, the server, a known epoch and its offset.
_PUBLISH = (
    _COMMON
    + """
local stream, meta, key = KEYS[1], KEYS[2], KEYS[3]
local message, channel, size, ttl, meta_ttl, key_ttl = unpack(ARGV)
local epoch = epoch_of(meta, stream, ARGV[7], ARGV[8], ARGV[9], ARGV[10])
if key then
    local id = redis.call('GET', key)  -- of another epoch, if that message is lost
    if id and string.sub(id, 1, #epoch + 1) == epoch .. '-' then return id end
end
local offset = integer(redis.call('HINCRBY', meta, 'offset', 1))
redis.call('XADD', stream, 'MAXLEN', size, offset .. '-' .. integer(now), 'm', message)
expire(stream, tonumber(ttl))
redis.call('PEXPIRE', stream, ttl)
redis.call('PEXPIRE', meta, meta_ttl)
local id = epoch .. '-' .. offset
if key then redis.call('SET', key, id, 'PX', key_ttl) end
redis.call('PUBLISH', channel, '\\255\\2' .. id .. ':' .. message)
return id
"""
)

# KEYS: the stream, the hash.
# ARGV: the offset to begin after (or before), or an empty string; how many; "1" for the newest
# first; the times to live of messages and of the hash; a new epoch, the server, a known epoch and
# its offset.
# Returns the id of the newest message, whether everything after that offset is there, the messages.
_READ = (
    _COMMON
    + """
local stream, meta = KEYS[1], KEYS[2]
local since, limit, reverse, ttl, meta_ttl = unpack(ARGV)
local epoch = epoch_of(meta, stream, ARGV[6], ARGV[7], ARGV[8], ARGV[9])
local offset = tonumber(redis.call('HGET', meta, 'offset') or '0')
-- It lives as long as somebody asks, but not much longer if nothing was ever published.
if offset == 0 then meta_ttl = math.min(meta_ttl, ttl + 600000) end
if redis.call('PTTL', meta) < meta_ttl / 2 then redis.call('PEXPIRE', meta, integer(meta_ttl)) end
expire(stream, tonumber(ttl))
since = tonumber(since)
local complete = not since or since >= offset
if not complete then  -- nothing is missing after a message that is there, or before one
    local stopped = redis.call('HMGET', meta, 'stopped', 'went_on')
    local from = since == tonumber(stopped[1] or '') and tonumber(stopped[2]) or since
    local next = redis.call('XRANGE', stream, integer(from), integer(from + 1), 'COUNT', 1)
    complete = from >= offset or #next > 0
end
local entries = {}
if tonumber(limit) == 0 then
elseif reverse == '1' then
    local last = since and integer(since - 1) or '+'
    if not since or since > 1 then
        entries = redis.call('XREVRANGE', stream, last, '-', 'COUNT', limit)
    end
else
    local start = since and integer(since + 1) or '-'
    entries = redis.call('XRANGE', stream, start, '+', 'COUNT', limit)
end
return {epoch .. '-' .. integer(offset), complete and 1 or 0, entries}
"""
)


class Script:
    """A script, and its calls."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


PUBLISH = Script(_PUBLISH)
READ = Script(_READ)


def _keys(prefix: str, channel: str) -> tuple[bytes, ...]:
    # A brace in the name of a channel would end the part that decides on the slot.
    tag = channel.replace("%", "%25").replace("}", "%7D")
    stream = f"{prefix}history:{{{tag}}}".encode()
    return stream, stream + b":position"


def _milliseconds(seconds: float) -> str:
    return str(max(1, int(seconds * 1000)))


def _known(position: Position | None) -> tuple[str, str]:
    return ("", "0") if position is None else (position.epoch, str(position.offset))


def server_of(info: bytes) -> str:
    """Return what names a server in the keys of a channel, from the answer to INFO.

    It is another one once the server was started anew. A `+` says that it keeps what is written to
    it: what was written by a server with a `+` is still there if there is one now.
    """
    found = dict(line.partition(":")[::2] for line in info.decode(errors="replace").splitlines())
    return found.get("run_id", "unknown") + "+" * (found.get("aof_enabled") == "1")


class Call(NamedTuple):
    """A call of a script, up to the name of the server that it is for.

    Attributes:
        key: One of its keys, which are all in one slot.
        before, after: The arguments before and after that name.
    """

    key: bytes
    before: tuple[str | bytes, ...]
    after: tuple[str | bytes, ...]

    def arguments(self, server: str) -> tuple[str | bytes, ...]:
        """Return the number of keys, the keys and the other arguments."""
        return (*self.before, server, *self.after)


def publish_arguments(prefix: str, message: Kept) -> Call:
    """Return a call of `PUBLISH`."""
    keys = _keys(prefix, message.channel)
    if message.key is not None:
        keys = (*keys, keys[0] + b":key:" + message.key.encode())
    history = message.history
    arguments: tuple[str | bytes, ...] = (
        str(len(keys)),
        *keys,
        message.payload,
        (prefix + message.channel).encode(),
        str(history.size),
        _milliseconds(history.ttl),
        _milliseconds(history.ttl + POSITION_TTL),
        _milliseconds(history.key_ttl),
        secrets.token_hex(6),
    )
    return Call(keys[0], arguments, _known(message.known))


def read_arguments(
    prefix: str,
    channel: str,
    history: History,
    since: int | None,
    limit: int,
    reverse: bool,
    known: Position | None,
) -> Call:
    """Return a call of `READ`."""
    keys = _keys(prefix, channel)
    arguments: tuple[str | bytes, ...] = (
        "2",
        *keys,
        "" if since is None else str(since),
        str(limit),
        "1" if reverse else "0",
        _milliseconds(history.ttl),
        _milliseconds(history.ttl + POSITION_TTL),
        secrets.token_hex(6),
    )
    return Call(keys[0], arguments, _known(known))


def stored(answer: Any) -> Stored:
    """Return what `READ` has answered."""
    place, complete, entries = answer
    messages = [
        StoredMessage(int(entry.partition(b"-")[0]), fields[1]) for entry, fields in entries
    ]
    return Stored(position(place), messages, bool(complete))


def position(answer: Any) -> Position:
    """Return the position that a script has answered.

    Raises:
        BackendUnavailable: It is none: something else has written to the keys.
    """
    found = parse_id(answer.decode(errors="replace")) if isinstance(answer, bytes) else None
    if found is None:
        raise BackendUnavailable("Redis has something else where the history should be")
    return found


def split(payload: bytes) -> tuple[bytes, Position | None]:
    """Return a message that has arrived, and its position if it was kept."""
    place, colon, message = payload[len(KEPT) :].partition(b":")
    found = parse_id(place.decode(errors="replace")) if colon else None
    return (payload if found is None else message), found
