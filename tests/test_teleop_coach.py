"""Two people at the page: one demonstrates like the earlier data, one in another style; it tells them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page
from teleop_browser import (
    TRIGGER,
    GamepadOperator,
    browser_context,
    look,
    open_page,
    running,
    start_recording,
    state,
    wait_for,
)

from simtoreal.commands import teleop
from simtoreal.commands.teleop import Config
from simtoreal.data_collection import teleop_command, teleop_page
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.expert import OperatorStyle, ScriptedExpert
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import load_task, panda_embodiment, rollout
from simtoreal.envs.rollout import Observation
from simtoreal.envs.tabletop import TabletopEnv
from simtoreal.policies.compatibility_coach import CompatibilityCoach
from simtoreal.policies.compatibility_config import ScorerConfig

# A browser that hangs fails its own test only; training the coach takes what the machine takes.
pytestmark = pytest.mark.timeout(200, func_only=True)
# Small, because the question is whether page and coach work together; tests/test_compatibility_scorer.py has the rest.
SMALL = ScorerConfig(members=3, hidden=64, epochs=1, minimum_steps=400, batch_size=128, folds=2)
# Straight to the goal at a constant speed, which a person at a slow machine can do as well as the expert.
CAREFUL = OperatorStyle(name="careful", speed=0.35, gain=1.0)
ENOUGH_STEPS, OTHER_STEPS = 100, 40
LIKELIHOOD = 0.15
# Left and down, where everybody else goes right and up.
OTHER_WAY = [-0.8, 0.0, 0.0, 0.8]


class TwoSticks(ScriptedExpert):
    """Does what the people at the page can do with two sticks: no tilting."""

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        for memory in self.memories.values():
            memory.quaternion = None
        actions = super().act(observation, instructions, slots)
        actions[..., 3:5] = 0.0
        return actions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "data"
    written, embodiment = load_task("reach2d"), panda_embodiment(16)
    task = dataclasses.replace(written, horizon=120)
    env = TabletopEnv(task, embodiment=embodiment, record_state=True)
    with DatasetWriter(folder, embodiment, {task.name: written.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task=task.name, embodiment=embodiment, source="expert", operator="careful"
        )
        rollout(
            env,
            ScriptedExpert(task, embodiment, style=dataclasses.replace(CAREFUL, noise=0.04)),
            range(100, 124),
            listeners=[recorder],
        )
    env.close()
    CompatibilityCoach.open(folder, config=SMALL)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser_context(tmp_path_factory.mktemp("profile"), viewport={"width": 1280, "height": 820}) as context:
        yield context


def demonstrate(page: Page, opened: teleop.Collection, *, other_way: bool) -> list[float]:
    """One take; returns the gauge as the page showed it."""
    shown: list[float] = []

    def read_gauge() -> None:
        text = page.locator("#gauge").inner_text()
        if text.endswith("%"):
            shown.append(float(text.split()[0]) / 100)

    def enough() -> bool:
        read_gauge()
        return opened.session.board.snapshot.steps > ENOUGH_STEPS

    person = GamepadOperator(page, opened, CAREFUL)
    start_recording(page, opened)
    if other_way:

        def gone() -> bool:
            if not person.following:  # contact may be lost for a moment
                person.grip()
                person.pad(OTHER_WAY, {TRIGGER: 1})
            return enough() or opened.session.board.snapshot.steps >= OTHER_STEPS

        wait_for(gone, "some steps the other way")
        person.pad([0.0] * 4, {})
    else:
        person.demonstrate(until=enough)
    if state(opened) == "recording":
        look(page, opened)
        page.keyboard.press("ArrowRight")
    wait_for(lambda: state(opened) == "review", "review")
    wait_for(lambda: read_gauge() or shown, "the gauge on the page")
    return shown


def test_a_second_operator_with_another_style_is_flagged_live_and_at_the_end(
    base: Path, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (teleop_command, teleop_page):  # this is not about contact lost on a busy machine
        monkeypatch.setattr(module, "SILENCE_NS", 5_000_000_000)
    original = CompatibilityCoach.open

    def lenient(path: Path, **more: Any) -> CompatibilityCoach:
        """Two dozen demonstrations of a precise expert say nothing about how steady a person's hand is."""
        coach = original(path, **{**more, "config": SMALL})
        coach.thresholds = dataclasses.replace(coach.thresholds, likelihood=LIKELIHOOD, novelty=1.0, tolerance=10)
        return coach

    monkeypatch.setattr(CompatibilityCoach, "open", lenient)
    config = Config(
        task="reach2d", output=tmp_path / "data", port=0, coach=base, operator="first", image_size=16, view_size=0
    )
    with running(config) as opened:
        page = open_page(browser, opened, gamepad=True)
        compatible = demonstrate(page, opened, other_way=False)
        first = opened.session.board.snapshot.review["verdict"]
        look(page, opened)
        page.locator("#accept").click()
        wait_for(lambda: opened.session.board.snapshot.kept == 1, "the first episode")
        wait_for(lambda: not page.locator("#review").is_visible(), "the page without the review")

        page.locator("#operator").fill("second")
        page.locator("#operator").press("Enter")
        conflicting = demonstrate(page, opened, other_way=True)
        second = opened.session.board.snapshot.review["verdict"]
        assert np.mean(conflicting) < np.mean(compatible) - 0.1, "the gauge fell"
        assert first["accepted"]
        assert not second["accepted"]
        assert second["compatibility"] < first["compatibility"] - 0.1
        wait_for(
            lambda: page.locator("#reviewtitle").inner_text() == "This conflicts with earlier demonstrations", "title"
        )
        assert not page.locator("#accept").is_visible()
        assert 1 <= page.locator(".snippet").count() <= 3
        assert page.locator(".snippet .strip").count() == 2 * page.locator(".snippet").count()
        for name in (second["snippets"][0]["take"], second["snippets"][0]["reference"]):
            assert page.evaluate("name => fetch('media/' + name).then((answer) => answer.status)", name) == 200

        look(page, opened)
        page.keyboard.press("ArrowRight")  # accepting is refused, and says why
        wait_for(lambda: "accept anyway" in page.locator("#reviewnote").inner_text(), "why not")
        page.keyboard.press("ArrowLeft")  # try again, as the first one did
        wait_for(lambda: state(opened) == "recording", "a retry at the same scene")
        assert opened.session.board.snapshot.seed == 1
        page.keyboard.press("Escape")
        wait_for(lambda: state(opened) == "finished", "the end")
        page.close()
    (episode,) = Dataset.open(tmp_path / "data").episodes
    assert episode.operator == "first"
    assert episode.extra["compatibility"]["compatibility"] == pytest.approx(first["compatibility"], abs=1e-3)
