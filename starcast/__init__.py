"""starcast broadcasts WebSocket messages to many clients, in pure Starlette."""

from .broadcast import Broadcast
from .endpoint import BroadcastEndpoint
from .event import Event
from .exceptions import (
    ClientGone,
    ConfigurationError,
    EncodingError,
    InvalidChannel,
    InvalidMessage,
    NotConnected,
    OriginRefused,
    PublishQueueFull,
    StarcastError,
    SubscriberLagged,
)
from .manager import ConnectionManager
from .outbox import Overflowed
from .stats import Stats
from .subscriber import Subscriber

__version__ = "0.1.0"

__all__ = [
    "Broadcast",
    "BroadcastEndpoint",
    "ClientGone",
    "ConfigurationError",
    "ConnectionManager",
    "EncodingError",
    "Event",
    "InvalidChannel",
    "InvalidMessage",
    "NotConnected",
    "OriginRefused",
    "Overflowed",
    "PublishQueueFull",
    "StarcastError",
    "Stats",
    "Subscriber",
    "SubscriberLagged",
    "__version__",
]
