"""The HTTP server: connections, streaming, the log, and faults where they strike."""

from __future__ import annotations

import math
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs

from tests.local_hub.access import Core, StorageRefusalError
from tests.local_hub.faults import Fault, FaultKind, Faults
from tests.local_hub.routes import answer, route_name
from tests.local_hub.wire import BLOCK_BYTES, Body, RefusalError, Request, Response, json_response

# A slowed transfer moves evenly: this many blocks a second.
_PACED_BLOCKS_PER_SECOND = 20
# A client that stops reading keeps its exchange open; the log does not wait for it longer than this.
_IDLE_WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class Exchange:
    """One request and what became of it.

    Attributes:
        path: Without the query, percent-encoding undone.
        host: The host the client addressed: the Hub's own, or the storage host's.
        route: The endpoint: `resolve`, `storage`, `info`, `commit` ...; empty for none.
        status: Of the answer; 0 if the connection was dropped without one.
        bytes_sent: Of the response's body that were handed to the network.
        bytes_received: Of the request's body.
        range: The `Range` header; empty for none.
        authenticated: Whether a token was sent.
        faults: What struck, in order.
    """

    method: str
    path: str
    host: str
    route: str
    status: int
    bytes_sent: int
    bytes_received: int
    range: str
    authenticated: bool
    faults: tuple[FaultKind, ...]


class Journal:
    """The log; reading it waits for the exchanges that are about to end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._exchanges: list[Exchange] = []
        self._num_open = 0

    def begin(self) -> None:
        with self._changed:
            self._num_open += 1

    def finish(self, exchange: Exchange) -> None:
        with self._changed:
            self._num_open -= 1
            self._exchanges.append(exchange)
            self._changed.notify_all()

    def read(self) -> tuple[Exchange, ...]:
        """Return all exchanges in the order in which they ended."""
        with self._changed:
            # A client may hold its answer before the server has written it down.
            self._changed.wait_for(lambda: not self._num_open, timeout=_IDLE_WAIT_SECONDS)
            return tuple(self._exchanges)

    def reset(self) -> None:
        """Forget what has ended until now."""
        self.read()
        with self._changed:
            self._exchanges.clear()


class HubServer(ThreadingHTTPServer):
    """Serves on 127.0.0.1, one thread for each connection."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        self.journal, self.faults, self.closing = Journal(), Faults(), threading.Event()
        self.core: Core | None = None
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer would look up its own name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def stop(self) -> None:
        """End every connection and wait for the threads; `serve_forever` must be running."""
        self.closing.set()
        self.shutdown()
        with self._connections_lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client may leave whenever it likes.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _ResetError(Exception):
    """The connection is to be reset at this point."""


@dataclass
class _Tally:
    """What is counted, and how fast bytes may move, during one exchange."""

    closing: threading.Event
    status: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    faults: tuple[FaultKind, ...] = ()
    bytes_per_second: float | int = 0
    reset_upload_at: float | int = math.inf
    started: float = 0.0

    def receive(self, num_bytes: int) -> None:
        self.bytes_received += num_bytes
        self.pace(0)
        if self.bytes_received >= self.reset_upload_at:
            raise _ResetError

    def pace(self, num_bytes: int) -> None:
        """Wait until the line could have carried `num_bytes` more."""
        if self.bytes_per_second:
            carried = self.bytes_sent + self.bytes_received + num_bytes
            due = self.started + carried / self.bytes_per_second
            self.wait(max(0.0, due - time.monotonic()))

    def wait(self, seconds: float | int) -> None:
        if self.closing.wait(seconds):
            raise ConnectionError("the server is being closed")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "LocalHub"
    # Headers and body leave in two writes; Nagle would hold the second back for 40 ms.
    disable_nagle_algorithm = True
    server: HubServer

    def do_GET(self) -> None:
        tally = _Tally(self.server.closing)
        request = self._request(tally)
        self.server.journal.begin()
        try:
            self._exchange(request, tally)
        except _ResetError:
            self._reset()
        except ConnectionError:
            self.close_connection = True
        finally:
            self.server.journal.finish(_written_down(request, tally))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr; the journal holds it all."""

    def _request(self, tally: _Tally) -> Request:
        target, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        chunked = "chunked" in headers.get("transfer-encoding", "")
        num_bytes = None if chunked else int(headers.get("content-length", "0"))
        parsed = {name: tuple(values) for name, values in parse_qs(query, keep_blank_values=True).items()}
        return Request(self.command, target, parsed, headers, Body(self.rfile, num_bytes, tally.receive))

    def _exchange(self, request: Request, tally: _Tally) -> None:
        struck = self.server.faults.before(request)
        tally.faults = tuple(fault.kind for fault in struck)
        for fault in struck:
            if fault.kind == "latency":
                tally.wait(fault.seconds)
            elif fault.kind == "bandwidth":
                tally.bytes_per_second = fault.bytes_per_second
            elif fault.kind == "reset_upload":
                tally.reset_upload_at = min(fault.after_bytes or 0, request.body.num_bytes or 0)
            elif fault.kind == "ignore_range":
                request = request.without_range()
        tally.started = time.monotonic()
        tally.receive(0)
        response = _refusal_of(struck) or self._carry_out(request)
        request.body.drain()
        if "lose_response" in tally.faults:
            self.close_connection = True
            return
        struck = self.server.faults.after(request, response)
        tally.faults += tuple(fault.kind for fault in struck)
        self._send(request, response, struck, tally)

    def _carry_out(self, request: Request) -> Response:
        assert self.server.core is not None
        try:
            return answer(self.server.core, request)
        except (ConnectionError, _ResetError):
            raise
        except Exception as error:
            # A bug in an endpoint must reach both sides, not leave a client without an answer.
            traceback.print_exc()
            return json_response({"error": f"{type(error).__name__}: {error}"}, status=500)

    def _send(self, request: Request, response: Response, struck: Sequence[Fault], tally: _Tally) -> None:
        for fault in struck:
            if fault.kind == "short":
                response = replace(response, content=response.cut(fault.position(len(response.content))))
        tally.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.content)))
        self.end_headers()
        if request.method == "HEAD":
            return
        self._send_content(response, struck, tally)

    def _send_content(self, response: Response, struck: Sequence[Fault], tally: _Tally) -> None:
        num_bytes = len(response.content)
        at = {fault.kind: fault.position(num_bytes) for fault in struck}
        stop = min(at.get("reset", num_bytes), at.get("truncate", num_bytes))
        paced_bytes = math.ceil(tally.bytes_per_second / _PACED_BLOCKS_PER_SECOND)
        block_bytes = min(paced_bytes or BLOCK_BYTES, BLOCK_BYTES)
        for block in replace(response, content=response.cut(stop)).blocks(block_bytes):
            tally.pace(len(block))
            self.wfile.write(_flipped(block, at.get("corrupt", -1) - tally.bytes_sent))
            tally.bytes_sent += len(block)
        if stop < num_bytes:
            self.close_connection = True
            if at.get("reset") == stop:
                raise _ResetError

    def _reset(self) -> None:
        """Close the connection so that the client sees it reset, not ended."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Without its descriptor the socket cannot send the orderly end that the base class would.
        socket.close(self.connection.detach())


def _flipped(block: bytes, position: int) -> bytes:
    """Flip every bit of one byte, if that byte is in the block."""
    if not 0 <= position < len(block):
        return block
    return block[:position] + bytes([block[position] ^ 0xFF]) + block[position + 1 :]


def _refusal_of(struck: Sequence[Fault]) -> Response | None:
    """Return the answer that a fault puts in the place of the real one."""
    for fault in struck:
        if fault.kind == "expired":
            return StorageRefusalError(403, "AccessDenied", "Request has expired").response()
        if fault.kind == "status":
            wait = fault.retry_after_seconds
            headers = {} if wait is None else {"Retry-After": str(wait)}
            return RefusalError(
                fault.status, "A fault was ordered", code=fault.error_code, headers=headers
            ).response()
    return None


def _written_down(request: Request, tally: _Tally) -> Exchange:
    return Exchange(
        request.method,
        request.path,
        request.host,
        route_name(request),
        tally.status,
        tally.bytes_sent,
        tally.bytes_received,
        request.range,
        "authorization" in request.headers,
        tally.faults,
    )
