"""Serves the teleoperation page and its websocket on one loopback port.

Whoever opens the page moves a robot, so: only this machine can connect, the address holds a random token, requests
must name this host (no DNS rebinding) and the websocket must be opened by our own page (no other site's script),
messages are bounded in size and rate, and one page controls at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.resources
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from simtoreal.data_collection.teleop_page import MAX_MESSAGE_BYTES, MessageError, PageDevice, parse_message
from simtoreal.data_collection.teleop_pictures import jpeg, thumbnail
from simtoreal.data_collection.teleop_session import Board
from simtoreal.envs.errors import RobotError, SimtorealError

HOST = "127.0.0.1"
HOST_NAMES = ("127.0.0.1", "localhost")
# A page sends about 60 messages per second, and up to 250 while a mouse with a high rate is dragged.
MOST_MESSAGES_PER_S = 400
STATUS_PERIOD_S = 0.05
# Images on their way to the page; it confirms every one that it has drawn.
MOST_IN_FLIGHT = 2
# One that is not confirmed for so long will not be, and must not keep the next ones from the operator.
IN_FLIGHT_S = 1.0
SEND_TIMEOUT_S = 2.0
# A page that says nothing for so long has gone, even if its connection has not been told: another one may take over.
SILENT_S = 5.0
SILENCE_CHECKS = 8
CLOSE_TIMEOUT_S = 1.0
START_TIMEOUT_S = 10.0
REFUSED = 4001
FILES = {"": ("teleop.html", "text/html"), "teleop.js": ("teleop.js", "text/javascript"),
         "teleop.css": ("teleop.css", "text/css")}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_log = logging.getLogger(__name__)


class TeleopServer:
    """A thread that serves one session's page.

    Args:
        board: what is shown.
        page: where the operator's messages go.
        dataset: folder of the stored episodes, for thumbnails.
        port: 0 for a free one.

    Raises:
        RobotError: the port is taken.
    """

    def __init__(self, board: Board, page: PageDevice, dataset: Path, *, port: int = 0) -> None:
        self._board, self._page, self._dataset = board, page, dataset
        self._token = secrets.token_urlsafe(18)
        self.controlled = False
        """Whether a page is connected."""
        self.connections = 0
        """Pages that were let in so far."""
        self._ready = threading.Event()
        self._problem: OSError | None = None
        self._port = port
        self.frames_sent = 0
        self.frames_dropped = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="teleop-server", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S) or self._problem is not None:
            raise RobotError(
                f"port {port} of {HOST} cannot be opened ({self._problem}); choose another one with --port, or 0"
            )

    @property
    def url(self) -> str:
        """Address of the page; whoever knows it can move the robot."""
        return f"http://{HOST}:{self._port}/{self._token}/"

    def close(self) -> None:
        """Close connections and stop the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(START_TIMEOUT_S)

    # ---- server thread

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_MESSAGE_BYTES)
        app.router.add_get("/{token}/ws", self._websocket)
        app.router.add_get("/{token}/media/{name}", self._media)
        app.router.add_get("/{token}/thumb/{name}", self._thumbnail)
        app.router.add_get("/{token}/{file:[a-z.]*}", self._file)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, HOST, self._port)
        try:
            await site.start()
            assert site._server is not None
            self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        except OSError as error:
            self._problem = error
        self._ready.set()
        if self._problem is None:
            await self._stopped.wait()
        await runner.cleanup()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Let in who may come in, and tell nobody more than they need."""
        given = request.match_info.get("token", "").encode()
        known = hmac.compare_digest(given, self._token.encode())
        host = request.headers.get("Host", "")
        if host.rpartition(":")[0] not in HOST_NAMES or not known:
            return web.Response(status=404, text="not found\n", headers=HEADERS)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            return web.Response(status=error.status, text=f"{error.reason}\n", headers=HEADERS)
        except SimtorealError:
            return web.Response(status=404, text="not found\n", headers=HEADERS)
        except Exception:
            _log.exception("request of the teleoperation page failed")
            return web.Response(status=500, text="failed; the server's log says why\n", headers=HEADERS)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _file(self, request: web.Request) -> web.Response:
        if request.match_info["file"] not in FILES:
            raise web.HTTPNotFound
        name, kind = FILES[request.match_info["file"]]
        text = importlib.resources.files("simtoreal.data_collection").joinpath(name).read_text(encoding="utf-8")
        return web.Response(text=text, content_type=kind)

    async def _media(self, request: web.Request) -> web.Response:
        data = self._board.media.get(request.match_info["name"])
        if data is None:
            raise web.HTTPNotFound
        return web.Response(body=data, content_type="image/jpeg")

    async def _thumbnail(self, request: web.Request) -> web.Response:
        data = await self._loop.run_in_executor(None, thumbnail, self._dataset, request.match_info["name"])
        return web.Response(body=data, content_type="image/jpeg")

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Origin") != f"http://{request.headers['Host']}":
            raise web.HTTPForbidden
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, compress=False, timeout=CLOSE_TIMEOUT_S)
        await socket.prepare(request)
        if self.controlled:
            await socket.send_json({"type": "refused", "why": "another page controls the robot; close it first"})
            await socket.close(code=REFUSED, message=b"another page controls the robot")
            return socket
        self.controlled = True
        self.connections += 1
        self._page.connect()
        connection = _Connection(self, socket, request.transport)
        try:
            await connection.run()
        finally:
            self.controlled = False
            self._page.disconnect()
        return socket


class _Connection:
    """The page that controls."""

    def __init__(
        self, server: TeleopServer, socket: web.WebSocketResponse, transport: asyncio.Transport | None
    ) -> None:
        self._server, self._socket, self._transport = server, socket, transport
        self._quiet = 0
        self._board, self._page, self._loop = server._board, server._page, server._loop
        self._dirty = asyncio.Event()
        self._shown = self._sent = 0
        self._in_flight: dict[int, float] = {}  # number of the images, and when they were sent
        self._credit, self._credit_at = float(MOST_MESSAGES_PER_S), time.monotonic()

    async def run(self) -> None:
        """Serve until either side closes."""

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended; so has this connection
                self._loop.call_soon_threadsafe(self._dirty.set)

        unwatch = self._board.watch(tell)
        ends = {
            self._send(): WSCloseCode.INTERNAL_ERROR,
            self._server._stopped.wait(): WSCloseCode.GOING_AWAY,
            self._silence(): WSCloseCode.POLICY_VIOLATION,
        }
        tasks = [asyncio.create_task(self._close_after(work, code)) for work, code in ends.items()]
        try:
            async for message in self._socket:
                self._quiet = 0
                if message.type is not WSMsgType.TEXT or not await self._receive(message.data):
                    break
        finally:
            unwatch()
            await self._close(WSCloseCode.POLICY_VIOLATION)
            # Closed first and woken: wait_for of Python 3.11 may swallow a cancellation.
            self._dirty.set()
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _close_after(self, work: Coroutine[Any, Any, Any], code: int) -> None:
        """Close the connection when ``work`` ends, in whatever way: half a connection would lock everybody out."""
        try:
            await work
        except ConnectionError:
            pass  # the page was closed while something was on its way to it
        except TimeoutError:
            _log.warning("the teleoperation page does not take what it is sent; disconnected")
        except Exception:
            _log.exception("the teleoperation page is disconnected")
        await self._close(code)

    async def _silence(self) -> None:
        """Return when the page has said nothing for ``SILENT_S``. A pong of its browser does not count."""
        while self._quiet < SILENCE_CHECKS:
            # Counted, not timed: messages that wait while this process is busy are read before the next check.
            await asyncio.sleep(SILENT_S / SILENCE_CHECKS)
            self._quiet += 1
        _log.warning("the teleoperation page is silent; disconnected")

    async def _close(self, code: int, why: str = "") -> None:
        """Close in bounded time: whoever does not read cannot be told."""
        try:
            await asyncio.wait_for(self._socket.close(code=code, message=why[:100].encode()), 2 * CLOSE_TIMEOUT_S)
        except (ConnectionError, TimeoutError):
            if self._transport is not None:
                self._transport.abort()

    async def _receive(self, text: str) -> bool:
        """Take over a message; returns False if the connection has to be closed for it."""
        now = time.monotonic()
        self._credit = min(MOST_MESSAGES_PER_S, self._credit + (now - self._credit_at) * MOST_MESSAGES_PER_S) - 1
        self._credit_at = now
        if self._credit < 0:
            await self._close(WSCloseCode.POLICY_VIOLATION, "too many messages")
            return False
        try:
            message = parse_message(text)
        except MessageError as error:
            await self._close(WSCloseCode.POLICY_VIOLATION, str(error))
            return False
        if message["type"] == "ping":
            answer = {"type": "pong", "at": message["at"], "server_ms": time.monotonic_ns() * 1e-6}
            with contextlib.suppress(ConnectionError):  # a page that has gone meanwhile
                await self._socket.send_json(answer)
        elif message["type"] == "shown":
            self._in_flight = {number: at for number, at in self._in_flight.items() if number > message["frame"]}
            self._dirty.set()
        else:
            self._page.feed(message)
        return True

    async def _send(self) -> None:
        """Send what is new, the newest only, as fast as the page takes it."""
        told, told_at, listed = -1, 0.0, None
        self._dirty.set()
        while not self._socket.closed:
            wait_s = None if told == self._board.snapshot.version else STATUS_PERIOD_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dirty.wait(), wait_s)
            self._dirty.clear()
            now = time.monotonic()
            if now - told_at >= STATUS_PERIOD_S:
                snapshot, told_at = self._board.snapshot, now
                told = snapshot.version
                content = snapshot.to_dict()
                content["counters"] = {**content["counters"], "skipped_frames": self._server.frames_dropped}
                await self._post({"type": "status", **content})
            if self._board.episodes is not listed:
                listed = self._board.episodes
                await self._post({"type": "episodes", "episodes": list(listed)})
            await self._send_frames()

    async def _post(self, content: dict[str, Any]) -> None:
        await asyncio.wait_for(self._socket.send_str(json.dumps(_finite(content), allow_nan=False)), SEND_TIMEOUT_S)

    async def _send_frames(self) -> None:
        frames, now = self._board.frames, time.monotonic()
        self._in_flight = {number: at for number, at in self._in_flight.items() if now - at < IN_FLIGHT_S}
        if frames.number == self._sent or len(self._in_flight) >= MOST_IN_FLIGHT:
            return
        if self._sent:
            self._server.frames_dropped += frames.number - self._sent - 1
        self._sent = frames.number
        names = sorted(frames.images)
        encoded = await self._loop.run_in_executor(None, lambda: [jpeg(frames.images[name]) for name in names])
        # One message for all cameras of a step: number of bytes of the description, description, pictures.
        head = json.dumps(
            {"frame": frames.number, "cameras": [[n, len(d)] for n, d in zip(names, encoded, strict=True)]}
        )
        payload = len(head).to_bytes(2, "little") + head.encode() + b"".join(encoded)
        self._in_flight[frames.number] = time.monotonic()
        await asyncio.wait_for(self._socket.send_bytes(payload), SEND_TIMEOUT_S)
        self._server.frames_sent += 1


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not know: one strange counter must not end the connection."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
