"""Close codes: RFC 6455 section 7.4.1, and the IANA registry that the RFC has established."""

from __future__ import annotations

NORMAL = 1000
GOING_AWAY = 1001
PROTOCOL_ERROR = 1002
UNSUPPORTED_DATA = 1003  # a frame of the wrong type
NO_STATUS = 1005  # never sent: stands for a close frame without a code
ABNORMAL = 1006  # never sent: stands for a connection that ended without a close frame
INVALID_DATA = 1007
POLICY_VIOLATION = 1008
TOO_BIG = 1009
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013
