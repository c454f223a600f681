"""Members: presence in the protocol's form."""

from __future__ import annotations

from typing import Any

from ..event import Event, Ready
from ..frames import SEPARATORS
from ..members import Member
from ..presence.announcer import Announcement
from .formats import Format, Raw, write


def describe(client: str, member: Member) -> dict[str, Any]:
    """Return what others see of a member's client."""
    info: dict[str, Any] = {"user": "" if member.id == client else member.id, "client": client}
    if member.info is not None:
        info["conn_info"] = Raw(write(member.info))
    if member.channel_info is not None:
        info["chan_info"] = Raw(write(member.channel_info))
    return info


def learn(writer: Format) -> None:
    """Let announcements be made in a form of the protocol's."""

    def announce(announcement: Announcement) -> Event:
        changes = [("join", *entry) for entry in announcement.joined]
        changes += [("leave", *entry) for entry in announcement.left]
        pushes = [
            writer.push(announcement.where, kind, {"info": describe(client, member)})
            for kind, client, member in changes
        ]
        payload = SEPARATORS[writer.form].join(push.payload for push in pushes)
        return Ready("", payload if pushes[0].kind == "bytes" else payload.decode())

    Announcement.makers.setdefault(writer.form, announce)
