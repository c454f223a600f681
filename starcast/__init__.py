"""starcast broadcasts messages to many WebSocket clients of Starlette and FastAPI apps."""

from .broadcast import Broadcast
from .channels.model import Client, Limits, Subscription
from .channels_endpoint import ChannelsEndpoint
from .endpoint import BroadcastEndpoint
from .event import Event, Gap
from .exceptions import (
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
    Unsubscribed,
)
from .history import History, Resumed
from .manager import ConnectionManager
from .members import Member, MemberChange, MemberCounts, Presence
from .outbox import Overflowed
from .people import ConnectedClient
from .publisher import Publisher
from .resume import Past
from .sse import SSE
from .sse_endpoint import SSEEndpoint
from .stats import BackendStats, Stats
from .subscriber import GapSubscriber, Subscriber
from .tuning import Tuning
from .watching import MemberWatch

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # SSE is a class, and no constant that would be the first
    "BackendStats",
    "BackendUnavailable",
    "Broadcast",
    "BroadcastEndpoint",
    "ChannelsEndpoint",
    "Client",
    "ClientGone",
    "CommandError",
    "ConfigurationError",
    "ConnectedClient",
    "ConnectionManager",
    "DisconnectClient",
    "EncodingError",
    "Event",
    "Gap",
    "GapSubscriber",
    "History",
    "InvalidChannel",
    "InvalidMessage",
    "Limits",
    "Member",
    "MemberChange",
    "MemberCounts",
    "MemberWatch",
    "NotConnected",
    "OriginRefused",
    "Overflowed",
    "Past",
    "PayloadTooLarge",
    "Presence",
    "PublishQueueFull",
    "Publisher",
    "Resumed",
    "SSE",
    "SSEEndpoint",
    "StarcastError",
    "Stats",
    "Subscriber",
    "SubscriberLagged",
    "Subscription",
    "Tuning",
    "Unsubscribed",
    "__version__",
]
