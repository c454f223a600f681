"""Schema: the messages of the client protocol in Protobuf, as classes.

Their field numbers are those of Centrifugo's protocol, version 2. Messages and fields that no part
of this server reads or sends are left out: whoever parses a message skips those that it does not
know. The classes are made when this module is imported, rather than generated beforehand, because
generated code only works with runtimes that are at least as new as its generator. They are in a
pool of their own, so that an app can also import other classes for the same protocol.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

# In the language of `.proto` files. All `bytes` are JSON.
SOURCE = """
message Command {
  uint32 id = 1;
  ConnectRequest connect = 4;
  SubscribeRequest subscribe = 5;
  UnsubscribeRequest unsubscribe = 6;
  PublishRequest publish = 7;
  PresenceRequest presence = 8;
  PresenceStatsRequest presence_stats = 9;
  HistoryRequest history = 10;
  PingRequest ping = 11;
  SendRequest send = 12;
  RPCRequest rpc = 13;
  RefreshRequest refresh = 14;
  SubRefreshRequest sub_refresh = 15;
}

message ConnectRequest {
  string token = 1;
  bytes data = 2;
  map<string, SubscribeRequest> subs = 3;
  string name = 4;
  string version = 5;
  map<string, string> headers = 6;
  int64 flag = 7;
}

message SubscribeRequest {
  string channel = 1;
  string token = 2;
  bool recover = 3;
  string epoch = 6;
  uint64 offset = 7;
  bytes data = 8;
  bool positioned = 9;
  bool recoverable = 10;
  bool join_leave = 11;
  string delta = 12;
  int64 flag = 14;
}

message HistoryRequest {
  string channel = 1;
  int32 limit = 7;
  StreamPosition since = 8;
  bool reverse = 9;
}

message StreamPosition { uint64 offset = 1; string epoch = 2; }
message UnsubscribeRequest { string channel = 1; }
message PublishRequest { string channel = 1; bytes data = 2; }
message PresenceRequest { string channel = 1; }
message PresenceStatsRequest { string channel = 1; }
message PingRequest { }
message SendRequest { bytes data = 1; }
message RPCRequest { bytes data = 1; string method = 2; }
message RefreshRequest { string token = 1; }
message SubRefreshRequest { string channel = 1; string token = 2; }

message Reply {
  uint32 id = 1;
  Error error = 2;
  Push push = 4;
  ConnectResult connect = 5;
  SubscribeResult subscribe = 6;
  UnsubscribeResult unsubscribe = 7;
  PublishResult publish = 8;
  PresenceResult presence = 9;
  PresenceStatsResult presence_stats = 10;
  HistoryResult history = 11;
  PingResult ping = 12;
  RPCResult rpc = 13;
  RefreshResult refresh = 14;
  SubRefreshResult sub_refresh = 15;
}

message Error { uint32 code = 1; string message = 2; bool temporary = 3; }

message ConnectResult {
  string client = 1;
  string version = 2;
  bool expires = 3;
  uint32 ttl = 4;
  bytes data = 5;
  map<string, SubscribeResult> subs = 6;
  uint32 ping = 7;
  bool pong = 8;
  string session = 9;
  string node = 10;
  int64 time = 11;
}

message SubscribeResult {
  bool expires = 1;
  uint32 ttl = 2;
  bool recoverable = 3;
  string epoch = 6;
  repeated Publication publications = 7;
  bool recovered = 8;
  uint64 offset = 9;
  bool positioned = 10;
  bytes data = 11;
  bool was_recovering = 12;
}

message HistoryResult {
  repeated Publication publications = 1;
  string epoch = 2;
  uint64 offset = 3;
}

message UnsubscribeResult { }
message PublishResult { }
message PresenceResult { map<string, ClientInfo> presence = 1; }
message PresenceStatsResult { uint32 num_clients = 1; uint32 num_users = 2; }
message PingResult { }
message RPCResult { bytes data = 1; }
message RefreshResult { string client = 1; string version = 2; bool expires = 3; uint32 ttl = 4; }
message SubRefreshResult { bool expires = 1; uint32 ttl = 2; }

message Push {
  string channel = 2;
  Publication pub = 4;
  Join join = 5;
  Leave leave = 6;
  Unsubscribe unsubscribe = 7;
  Message message = 8;
  Subscribe subscribe = 9;
  Disconnect disconnect = 11;
  Refresh refresh = 12;
}

message Publication {
  bytes data = 4;
  ClientInfo info = 5;
  uint64 offset = 6;
  map<string, string> tags = 7;
  int64 time = 9;
  string channel = 10;
}

message ClientInfo { string user = 1; string client = 2; bytes conn_info = 3; bytes chan_info = 4; }
message Join { ClientInfo info = 1; }
message Leave { ClientInfo info = 1; }
message Unsubscribe { uint32 code = 2; string reason = 3; }
message Message { bytes data = 1; }
message Disconnect { uint32 code = 1; string reason = 2; bool reconnect = 3; }
message Refresh { bool expires = 1; uint32 ttl = 2; }

message Subscribe {
  bool recoverable = 1;
  string epoch = 4;
  uint64 offset = 5;
  bool positioned = 6;
  bytes data = 7;
}
"""

_MESSAGE = re.compile(r"message (\w+) \{([^}]*)\}")
_FIELD = re.compile(r"(?:(repeated) |(map)<string, )?(\w+)>? (\w+) = (\d+);")

_PACKAGE = "starcast.channels"


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """A field of a message.

    Attributes:
        name, number: What the protocol calls it.
        type: The name of another message, or of a type that Protobuf knows.
        of: Whether it is one such value, a list of them, or a dict of them by strings.
    """

    name: str
    number: int
    type: str
    of: Literal["one", "list", "dict"]


def _parse(source: str) -> dict[str, dict[str, Field]]:
    """Return the fields of each message by their names."""
    return {
        message: {
            name: Field(name, int(number), type, "list" if many else "dict" if map else "one")
            for many, map, type, name, number in _FIELD.findall(body)
        }
        for message, body in _MESSAGE.findall(source)
    }


def _describe(messages: dict[str, dict[str, Field]]) -> FileDescriptorProto:
    """Return what Protobuf needs to know of the messages."""
    file = FileDescriptorProto(name="starcast/channels.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field in fields.values():
            if field.of == "dict":
                entry = f"{field.name.capitalize()}Entry"  # the name that Protobuf expects
                pair = message.nested_type.add(name=entry)
                pair.options.map_entry = True
                _add(pair, Field("key", 1, "string", "one"))
                _add(pair, Field("value", 2, field.type, "one"))
                _add(message, dataclasses.replace(field, type=f"{name}.{entry}", of="list"))
            else:
                _add(message, field)
    return file


def _add(message: DescriptorProto, field: Field) -> None:
    added = message.field.add(name=field.name, number=field.number)
    many = field.of == "list"
    added.label = (
        FieldDescriptorProto.LABEL_REPEATED if many else FieldDescriptorProto.LABEL_OPTIONAL
    )
    if field.type.islower():
        added.type = FieldDescriptorProto.Type.Value(f"TYPE_{field.type.upper()}")
    else:
        added.type = FieldDescriptorProto.TYPE_MESSAGE
        added.type_name = f".{_PACKAGE}.{field.type}"


def _make_classes() -> dict[str, type[Message]]:
    pool = DescriptorPool()
    pool.AddSerializedFile(_describe(MESSAGES).SerializeToString())
    return {
        name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in MESSAGES
    }


MESSAGES = _parse(SOURCE)
CLASSES = _make_classes()
