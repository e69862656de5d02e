"""What a client's connection may cost: bytes of headers, seconds to send a request, seconds of silence.

Source of the attack that sends a request one byte at a time to hold connections: RSnake, "Slowloris HTTP DoS", 2009.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 32 * 2**10
"""Request line and headers together; a reverse proxy's and a long key fit several times over."""
HEADER_TIMEOUT_S = 20.0
"""From the connection, or from the first byte of a later request on it, to the end of its headers."""
BODY_TIMEOUT_S = 120.0
"""From the end of the headers to the end of the body: 4 MiB need 35 kB/s."""
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than clients and load balancers keep theirs (5 to 60 s), so that they
never send a request into a connection that is just being closed."""


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with a time limit on the way in, and errors in OpenAI's shape.

    uvicorn itself limits the silence between requests only: a client that is sending may take as long as it likes.
    """

    header_timeout_s = HEADER_TIMEOUT_S
    body_timeout_s = BODY_TIMEOUT_S

    _awaited: type[h11.IDLE] | type[h11.SEND_BODY] | None = None
    _timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timeout()
        super().connection_lost(exc)

    def _limit_time(self) -> None:
        """One timer for the headers, one for the body; more bytes of the same do not start it again."""
        state = self.conn.their_state
        awaited = state if state in (h11.IDLE, h11.SEND_BODY) else None
        if awaited is self._awaited:
            return
        self._stop_timeout()
        self._awaited = awaited
        if awaited is not None:
            seconds = self.header_timeout_s if awaited is h11.IDLE else self.body_timeout_s
            self._timeout = self.loop.call_later(seconds, self._give_up, seconds)

    def _stop_timeout(self) -> None:
        self._awaited = None
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _give_up(self, seconds: float) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.their_state is h11.IDLE:
            self._refuse(408, "request_timeout", f"The headers of the request took more than {seconds:g} s")
        else:
            self.transport.close()  # the route that reads the body sees a client that went away

    def on_response_complete(self) -> None:
        self._stop_timeout()  # waiting for the next request has uvicorn's keep-alive limit until its first byte
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # a request that was sent behind the answered one
            self._limit_time()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(431, "headers_too_large", f"The headers have more than {MAX_HEADER_BYTES} bytes")
        else:
            self._refuse(400, "invalid_http", msg)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer what never became a request, and close; with an answer under way already, only close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            body = json.dumps({"error": error}).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                "x-request-id": uuid.uuid4().hex,
            }
            for event in (h11.Response(status_code=status, headers=list(headers.items())), h11.Data(body)):
                self.transport.write(self.conn.send(event))
        self.transport.close()
