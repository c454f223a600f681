"""Settings: the arguments of a hub, validated."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Literal

from . import inbound
from .admission.hooks import Refuse, check_refuse
from .admission.origins import Origins
from .broker.opening import check_timing
from .close_codes import SERVICE_RESTART
from .codec import Dumps
from .event import Gap
from .exceptions import ConfigurationError
from .frames import PLAIN, WireFormat
from .history import Histories
from .members import Presence
from .outbox import Close, OnOverflow, Outbox, Overflow
from .tuning import Tuning

logger = logging.getLogger("starcast")

AfterGap = Literal["keep", "close"]


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of a `Broadcast`; its docstring describes them.

    Raises:
        ConfigurationError: An argument is not valid.
    """

    dumps: Dumps
    origins: Origins
    max_buffer: int
    overflow: Overflow
    on_overflow: OnOverflow | None
    max_message: int | None
    refuse: Refuse
    ready_frames: bool
    on_gap: Callable[[Gap], None] | None
    after_gap: AfterGap
    name: str | None
    open_timeout: float
    probe_interval: float
    tuning: Tuning
    histories: Histories
    presence: Presence | None

    def __post_init__(self) -> None:
        check_timing(self.open_timeout, self.probe_interval)
        if self.after_gap not in ("keep", "close"):
            raise ConfigurationError(f"after_gap must be keep or close, not {self.after_gap!r}")
        if not isinstance(self.tuning, Tuning):
            raise ConfigurationError(f"tuning must be a Tuning, not {self.tuning!r}")
        if not (self.presence is None or isinstance(self.presence, Presence)):
            raise ConfigurationError(f"presence must be a Presence, not {self.presence!r}")
        inbound.check(self.max_message)
        check_refuse(self.refuse)
        self.outbox()  # raises if its settings are not valid

    def outbox(
        self,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
        form: WireFormat = PLAIN,
    ) -> Outbox:
        """Return an outbox. Arguments that are given override the settings."""
        return Outbox(
            self.max_buffer if max_buffer is None else max_buffer,
            self.overflow if overflow is None else overflow,
            self.on_overflow,
            form,
        )

    def gap_close(self) -> Close | None:
        """Return how clients are closed after a gap; None if they stay connected."""
        if self.after_gap == "close":
            return Close(SERVICE_RESTART, "messages may be missing")
        return None

    def tell_gap(self, gap: Gap) -> None:
        """Call `on_gap`, if it was given, and log what it raises."""
        if self.on_gap is not None:
            try:
                self.on_gap(gap)
            except Exception:
                logger.exception("on_gap raised")
