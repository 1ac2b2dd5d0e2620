"""Who may open the teleoperation page, what they may say, and what they are sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from simtoreal.data_collection import teleop_server
from simtoreal.data_collection.teleop_page import MAX_MESSAGE_BYTES, PageDevice
from simtoreal.data_collection.teleop_server import MOST_IN_FLIGHT, MOST_MESSAGES_PER_S, TeleopServer
from simtoreal.data_collection.teleop_session import Board
from simtoreal.envs.errors import RobotError


def served() -> contextlib.closing[TeleopServer]:
    return contextlib.closing(TeleopServer(Board(), PageDevice(Board()), Path("nowhere")))


async def answer(url: str, **headers: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as client, client.get(url, headers=headers) as response:
        return response.status, await response.text()


def test_only_our_page_with_the_token_gets_anything():
    with served() as server:
        origin = server.url.rsplit("/", 2)[0]
        port = origin.rsplit(":", 1)[1]
        ask = lambda url, **headers: asyncio.run(answer(url, **headers))  # noqa: E731
        status, text = ask(server.url)
        assert status == 200
        assert "Hold to move" in text
        assert ask(server.url + "teleop.js")[0] == 200
        for wrong in ("/", "/wrong/", f"/{server.url.rsplit('/', 2)[1][:-1]}/", "/wrong/ws", "/wrong/media/1"):
            assert ask(origin + wrong)[0] == 404
        for path in ("../teleop_server.py", "teleop_server.py", "media/1", "thumb/000000", "thumb/..%2f..%2fetc"):
            assert ask(server.url + path)[0] == 404
        assert ask(server.url, Host=f"evil.example:{port}")[0] == 404
        assert ask(server.url, Host=f"localhost:{port}")[0] == 200
        assert ask(server.url + "ws")[0] == 403
        assert ask(server.url + "ws", Origin="http://evil.example")[0] == 403
        assert ask(server.url + "ws", Origin=origin)[0] == 400, "no websocket request"
        with pytest.raises(RobotError, match="--port"):
            TeleopServer(Board(), PageDevice(Board()), Path("nowhere"), port=int(port))


async def closing_code(url: str, *messages: Any) -> int | None:
    """How the server ends a connection that sends ``messages``."""
    async with (
        aiohttp.ClientSession() as client,
        client.ws_connect(url + "ws", headers={"Origin": url.rsplit("/", 2)[0]}) as socket,
    ):
        for message in messages:
            with contextlib.suppress(ConnectionError):
                await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_str(message))
        while not socket.closed:
            received = await socket.receive(10)
            if received.type == aiohttp.WSMsgType.TEXT:
                assert "Traceback" not in received.data
        return socket.close_code


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        (["nonsense"], 1008),
        ([b"\x00\x01"], 1008),
        (['{"type": "event", "n": 1, "name": "explode"}'], 1008),
        (["x" * (MAX_MESSAGE_BYTES + 1)], 1009),
        (['{"type": "ping", "n": 1, "at": 1}'] * (MOST_MESSAGES_PER_S * 3), 1008),
    ],
)
def test_whoever_misbehaves_is_disconnected(messages: list[Any], code: int):
    with served() as server:
        assert asyncio.run(closing_code(server.url, *messages)) == code
        # And the next one is let in.
        assert asyncio.run(answer(server.url))[0] == 200


def test_a_second_controller_is_refused_until_the_first_has_gone():
    async def both(url: str) -> None:
        headers = {"Origin": url.rsplit("/", 2)[0]}
        async with aiohttp.ClientSession() as client:
            first = await client.ws_connect(url + "ws", headers=headers)
            await first.receive(10)
            second = await client.ws_connect(url + "ws", headers=headers)
            refused = json.loads((await second.receive(10)).data)
            assert refused["type"] == "refused"
            await second.receive(10)
            assert second.close_code == 4001
            await first.close()
            for _ in range(100):
                third = await client.ws_connect(url + "ws", headers=headers)
                if json.loads((await third.receive(10)).data)["type"] == "status":
                    return
                await third.close()
                await asyncio.sleep(0.02)
            raise AssertionError("nobody is let in any more")

    with served() as server:
        asyncio.run(both(server.url))


async def connected(client: aiohttp.ClientSession, url: str, **more: Any) -> Any:
    """A connection that controls; waits for another one to be given up."""
    while True:
        socket = await client.ws_connect(url + "ws", headers={"Origin": url.rsplit("/", 2)[0]}, **more)
        if json.loads((await socket.receive(10)).data)["type"] == "status":
            return socket
        await socket.close()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("kind", ["mute", "pongs", "deaf"])
def test_half_a_connection_does_not_lock_the_operator_out(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Mute: reads and says nothing. Pongs: its browser answers for it. Deaf: does not even read."""
    monkeypatch.setattr(teleop_server, "SILENT_S", 0.4)
    monkeypatch.setattr(teleop_server, "CLOSE_TIMEOUT_S", 0.2)

    async def take_over(server: TeleopServer, board: Board) -> None:
        async with aiohttp.ClientSession() as client:
            first = await connected(client, server.url, heartbeat=0.05 if kind == "pongs" else None)
            if kind == "deaf":
                first._conn.transport.pause_reading()
                for _ in range(20):  # more than the buffers of the operating system take
                    board.post(instruction="x" * 1_000_000)
                    await asyncio.sleep(0.01)
            reading = asyncio.create_task(first.receive()) if kind == "deaf" else asyncio.create_task(listen(first))
            second = await asyncio.wait_for(connected(client, server.url), 20)
            await second.send_json({"type": "ping", "n": 1, "at": 1})
            assert server.controlled
            reading.cancel()
            await second.close()

    async def listen(socket: Any) -> None:
        async for _ in socket:
            pass

    board = Board()
    with contextlib.closing(TeleopServer(board, PageDevice(board), Path("nowhere"))) as server:
        asyncio.run(take_over(server, board))


def test_a_page_that_speaks_stays_connected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teleop_server, "SILENT_S", 0.8)

    async def speak(server: TeleopServer) -> None:
        async with aiohttp.ClientSession() as client:
            socket = await connected(client, server.url)
            for n in range(60):
                await socket.send_json({"type": "ping", "n": n, "at": 1})
                await asyncio.sleep(0.03)
            assert not socket.closed
            await socket.close()

    with served() as server:
        asyncio.run(speak(server))


def test_numbers_that_json_does_not_know_are_sent_as_null():
    async def first_status(url: str) -> dict[str, Any]:
        headers = {"Origin": url.rsplit("/", 2)[0]}
        async with aiohttp.ClientSession() as client, client.ws_connect(url + "ws", headers=headers) as socket:
            return json.loads((await socket.receive(10)).data)

    board = Board()
    board.post(gauge=float("nan"), counters={"skew": float("inf"), "late": 3.0})
    with contextlib.closing(TeleopServer(board, PageDevice(board), Path("nowhere"))) as server:
        told = asyncio.run(first_status(server.url))
    assert (told["gauge"], told["counters"]["skew"], told["counters"]["late"]) == (None, None, 3.0)


def test_a_sender_that_fails_ends_the_connection():
    async def closed(url: str, board: Board) -> int | None:
        async with aiohttp.ClientSession() as client:
            socket = await connected(client, url)
            board.post(note=object())  # type: ignore[arg-type]
            while not socket.closed:  # the silence would end it later, with another code
                await socket.receive(10)
            return socket.close_code

    board = Board()
    with contextlib.closing(TeleopServer(board, PageDevice(board), Path("nowhere"))) as server:
        assert asyncio.run(closed(server.url, board)) == 1011


def test_a_page_that_goes_while_it_is_told_something_is_no_problem(caplog: pytest.LogCaptureFixture):
    async def leave(server: TeleopServer, board: Board) -> None:
        async with aiohttp.ClientSession() as client:
            for _ in range(5):
                socket = await connected(client, server.url)
                for n in range(5):
                    board.post(note=str(n))
                    board.post_frames({"front": np.zeros((64, 64, 3), np.uint8)})
                    await socket.send_json({"type": "ping", "n": n, "at": 1})
                socket._conn.transport.abort()
                while server.controlled:
                    board.post(note="on its way")
                    await asyncio.sleep(0.001)

    board = Board()
    with contextlib.closing(TeleopServer(board, PageDevice(board), Path("nowhere"))) as server:
        asyncio.run(leave(server, board))
    assert not caplog.records


def test_pictures_that_are_never_confirmed_do_not_end_the_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teleop_server, "IN_FLIGHT_S", 0.05)

    async def look(url: str, board: Board) -> None:
        async with aiohttp.ClientSession() as client:
            socket, pictures = await connected(client, url), 0
            for _ in range(200):
                board.post_frames({"front": np.zeros((8, 8, 3), np.uint8)})
                with contextlib.suppress(TimeoutError):
                    pictures += (await socket.receive(0.02)).type == aiohttp.WSMsgType.BINARY
                if pictures > 2 * MOST_IN_FLIGHT:
                    return
            raise AssertionError(f"only {pictures} pictures came")

    board = Board()
    with contextlib.closing(TeleopServer(board, PageDevice(board), Path("nowhere"))) as server:
        asyncio.run(look(server.url, board))


def test_a_page_that_lags_gets_the_newest_picture_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teleop_server, "IN_FLIGHT_S", 60.0)

    async def lag(server: TeleopServer, board: Board) -> list[int]:
        url, numbers, sent = server.url, [], 0
        async with (
            aiohttp.ClientSession() as client,
            client.ws_connect(url + "ws", headers={"Origin": url.rsplit("/", 2)[0]}) as socket,
        ):
            for _ in range(40):
                board.post_frames({"front": np.full((8, 8, 3), sent, np.uint8)})
                await asyncio.sleep(0.01)
            for n in range(200):
                message = await socket.receive(10)
                if message.type == aiohttp.WSMsgType.BINARY:
                    size = int.from_bytes(message.data[:2], "little")
                    numbers.append(json.loads(message.data[2 : 2 + size])["frame"])
                    if numbers[-1] == 40:
                        break
                    await socket.send_json({"type": "shown", "n": n, "frame": numbers[-1]})
        return numbers

    board = Board()
    with contextlib.closing(TeleopServer(board, PageDevice(board), Path("nowhere"))) as server:
        numbers = asyncio.run(lag(server, board))
        assert numbers[-1] == 40
        assert len(numbers) <= 6
        assert server.frames_dropped == 40 - len(numbers) - (numbers[0] - 1)


def test_the_doctor_offers_to_install_the_browser_of_these_tests(monkeypatch: pytest.MonkeyPatch):
    from simtoreal.commands import doctor

    assert doctor.check_browser().state == doctor.OK
    monkeypatch.setenv("PATH", "/nowhere")
    finding = doctor.check_browser()
    assert (finding.state, finding.apt_packages) == (doctor.WARNING, ("chromium",))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.check_browser() is None, "who only uses the page needs no Chromium"
