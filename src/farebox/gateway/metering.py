"""What one call's limits let pass, each way, and what the call costs: the meter of its pass, seen from the exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import structlog

from farebox.app.admission import Meter
from farebox.gateway.fields import FieldBook
from farebox.gateway.passage import Passage
from farebox.gateway.trailers import credits_in

if TYPE_CHECKING:
    from farebox.gateway.exchange import Exchange
    from farebox.gateway.server import Gateway

log = structlog.get_logger(__name__)

_UPLOAD_USED_UP: Final = "this pass has no bytes left to upload: the body was cut; buy another one"
_CANNOT_SAY: Final = "What is left to upload cannot be found out right now; try again in a moment."


class Metering:
    """``up`` and ``down`` are None where bytes pass without a limit. While one of them waits, its source rests."""

    __slots__ = ("_credits", "_exchange", "_meter", "down", "up")

    def __init__(self, meter: Meter, exchange: Exchange, gateway: Gateway) -> None:
        self._meter = meter
        self._exchange = exchange
        self._credits: bytes | None = None
        self.up: Passage | None = None
        self.down: Passage | None = None
        if meter.upload is not None:
            self.up = Passage(
                meter.upload,
                onward=exchange.send_up,
                hold=self._client_rests,
                release=self._client_goes_on,
                cut=self._upload_used_up,
                spawn=gateway.spawn,
            )
        if meter.download is not None:
            self.down = Passage(
                meter.download,
                onward=exchange.send_down,
                hold=self._upstream_rests,
                release=exchange.read_on,
                cut=exchange.cut_short,
                spawn=gateway.spawn,
            )

    @property
    def holds_answer(self) -> bool:
        """No more of the answer may pass for now."""
        return self.down is not None and self.down.waits

    def priced(self, said: bytes | None) -> None:
        """What the head of the answer says that the call costs."""
        if said is not None and self._credits is None:
            self._credits = said

    def priced_late(self, lines: Sequence[bytes], book: FieldBook) -> None:
        """What its trailers say: that is the last word."""
        self._credits = credits_in(lines, book) or self._credits

    def end_upload(self) -> None:
        """Nobody takes any more of the request's body."""
        if self.up is not None:
            self.up.stop()

    def end(self) -> None:
        """The call is over."""
        for passage in (self.up, self.down):
            if passage is not None:
                passage.stop()
        if self._credits is not None:
            try:
                self._meter.credits(self._credits)
            except Exception:
                log.exception("credits_failed", request_id=self._exchange.call.request_id)

    def _client_rests(self) -> None:
        if self._exchange.client is not None:
            self._exchange.client.pace_upload()

    def _client_goes_on(self) -> None:
        if self._exchange.client is not None:
            self._exchange.client.unpace_upload()

    def _upload_used_up(self, code: str) -> None:
        if code == "pass_exhausted":
            quotes = f"/.farebox/quotes?route={self._exchange.call.route.id}"
            self._exchange.cut(code, _UPLOAD_USED_UP, limit="upload_bytes", quotes=quotes)
        else:
            self._exchange.cut(code, _CANNOT_SAY)

    def _upstream_rests(self) -> None:
        if self._exchange.connection is not None:
            self._exchange.connection.pause()
