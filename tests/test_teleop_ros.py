"""A demonstration through the page in real Chromium, over ROS 2 and the safety gate, on the live twin."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra 'ros')")

from teleop_browser import GamepadOperator, browser_context, look, open_page, running, start_recording, state, wait_for

from simtoreal.commands.teleop import Config
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.expert import OperatorStyle
from simtoreal.envs.action import integrate_action

pytestmark = pytest.mark.realtime

STOP_WITHIN_NS = 150_000_000
ATTEMPTS = 3
# Camera, network, gate and arm add to the delay of the eye.
PATIENT = OperatorStyle(name="patient", speed=0.6, gain=0.1)


def test_demonstration_on_the_twin_is_exact_and_a_closed_page_stops_the_arm(tmp_path: Path):
    config = Config(task="pick_place", output=tmp_path / "data", backend="ros", port=0, operator="Hedy")
    with running(config) as opened, browser_context(tmp_path / "profile") as browser:
        page = open_page(browser, opened, gamepad=True)
        person = GamepadOperator(page, opened, PATIENT)
        start_recording(page, opened)
        for _ in range(ATTEMPTS):
            person.demonstrate(seconds=60)
            if opened.session.board.snapshot.success:
                break
            # A machine too busy for the twin's clock loses episodes to the gate; a person records again.
            assert opened.session.board.snapshot.note != "goal not reached", "nothing went wrong but the driving"
            look(page, opened)
            page.keyboard.press("ArrowLeft")
            wait_for(lambda: state(opened) == "recording", "the next attempt")
        assert opened.session.board.snapshot.success, opened.session.board.snapshot
        look(page, opened)
        page.keyboard.press("ArrowRight")
        wait_for(lambda: opened.session.board.snapshot.kept == 1, "the episode")
        wait_for(lambda: state(opened) == "ready", "ready")

        # From here on: every target that the gate gets, and every sign of life of the operator.
        sent: list[tuple[int, np.ndarray]] = []
        heard: list[int] = []
        gate, feed = opened.session._env._gate, opened.page.feed
        send_target = gate.send_target

        def watch(target, at_ns, episode):
            sent.append((time.monotonic_ns(), target.copy()))
            send_target(target, at_ns, episode)

        def listen(message):
            if message.get("engaged"):
                heard.append(time.monotonic_ns())
            return feed(message)

        gate.send_target, opened.page.feed = watch, listen

        def moves() -> list[int]:
            pairs = zip(list(sent), list(sent)[1:], strict=False)
            # A rotation that rests is normalised again and again, in its last bit.
            return [now[0] for before, now in pairs if np.abs(before[1][:9] - now[1][:9]).max() > 1e-9]

        def drive() -> bool:
            person.pad([0.0] * 4, {})
            time.sleep(0.1)
            person.pad([0.6, 0.0, 0.0, 0.0], {7: 1})
            time.sleep(0.5)
            return len(moves()) > 3

        wait_for(drive, "motion")
        page.close()
        wait_for(lambda: not opened.server.controlled, "the end of the connection")
        wait_for(lambda: not opened.session.board.snapshot.active, "rest")
        begin = len(moves())
        time.sleep(0.5)
        assert len(moves()) == begin, "the arm moves although the page is closed"
        assert all(at - max(stamp for stamp in heard if stamp <= at) <= STOP_WITHIN_NS for at in moves())

    stored = Dataset.open(tmp_path / "data")
    (episode,) = stored.episodes
    assert (episode.success, episode.operator, episode.source) == (True, "Hedy", "teleop")
    arrays = stored.read(episode)
    targets, actions = arrays["step/target"], arrays["actions"]
    # Corrected in the middle of a period or not: the recorded actions are what the gate was told, to the last bit.
    # In one array rather than step by step, which may round the last bit differently.
    np.testing.assert_allclose(
        integrate_action(targets[:-1], actions[1:], stored.embodiment), targets[1:], rtol=0, atol=1e-14
    )
    assert (np.diff(arrays["step/timestamp_ns"]) > 0).all()
    assert arrays["step/capture_ns"].shape[1] >= 3
