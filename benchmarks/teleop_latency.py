"""How long an operator's key press takes to become a command: ours against reading the input once per control period.

    OMP_NUM_THREADS=1 python benchmarks/teleop_latency.py

A key is pressed in real Chromium (headless, through its own input pipeline) while the dead-man is held, at random
moments. Measured is the time from the browser's ``event.timeStamp`` to the moment at which the command that contains
it is handed over: to ``env.step`` in simulation, to the safety gate on the robot's side. Both clocks are
CLOCK_MONOTONIC of this machine, related by the quickest of many round trips, whose half is the largest possible error;
the page gives no time stamps before that is 1 ms. Every press and release while the dead-man counts is measured, and
its command cannot come before it (that would end the benchmark).
The peer is the same page, server and loop, but reads the input when the 20 Hz step is due, as a loop without reaction
does. Arms run in turns.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import read_no_flags, write_benchmark

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

ROUNDS, EVENTS = 9, 40
HORIZON_S = 36_000.0
TRUSTED_ROUND_TRIP_MS = 2.0  # as in data_collection/teleop.js


def measure(backend: str) -> tuple[dict[str, list[float]], float]:
    """Latencies in ms per arm, and the quickest round trip in ms."""
    from teleop_browser import browser_context, open_page, running, wait_for

    from simtoreal.commands.teleop import Config

    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"reacting": [], "periodic": []}
    folder = Path(tempfile.mkdtemp())
    config = Config(output=folder / "data", backend=backend, port=0, seconds=HORIZON_S)  # type: ignore[arg-type]
    with running(config) as collection, browser_context(folder / "profile") as browser:
        session = collection.session
        loop: Any = session._pace if backend == "sim" else session._env
        page = open_page(browser, collection)
        page.locator("#speed").fill("10")
        wait_for(lambda: page.evaluate("window.teleop.clock.best") <= TRUSTED_ROUND_TRIP_MS, "the clocks")
        for _ in range(ROUNDS):
            for arm in found:
                loop.reactive = arm == "reacting"
                for index in range(EVENTS):
                    if index == 0 or not session.board.snapshot.active:
                        page.keyboard.up("Space")
                        page.keyboard.down("Space")
                        wait_for(lambda: session.board.snapshot.active or session.board.snapshot.needs_release, "grip")
                        time.sleep(0.2)
                        collection.page.latencies_ns.clear()
                    key = "KeyW" if index % 2 else "KeyS"
                    page.keyboard.down(key)
                    time.sleep(rng.uniform(0.06, 0.14))
                    page.keyboard.up(key)
                    time.sleep(rng.uniform(0.06, 0.14))
                    while collection.page.latencies_ns:
                        found[arm].append(collection.page.latencies_ns.popleft() * 1e-6)
        if min(map(min, found.values())) < -TRUSTED_ROUND_TRIP_MS / 2:
            raise RuntimeError("a command came before the key press that it contains: the clocks do not agree")
        return found, float(page.evaluate("window.teleop.clock.best"))


def main() -> None:
    """Measure both backends and write benchmarks/results/teleop_latency.json."""
    started = time.monotonic()
    arms, notes = [], []
    headline: dict[str, Any] = {}
    load = os.getloadavg()[0]
    for backend in ("sim", "ros"):
        found, trip = measure(backend)
        notes.append(f"{backend}: clock error at most {trip / 2:.2f} ms")
        for name, values in found.items():
            p50, p90, p99 = np.percentile(values, [50, 90, 99])
            arms.append(
                {"name": f"{backend} {name}", "value": float(p50), "p90": float(p90), "p99": float(p99),
                 "interval": [float(min(values)), float(max(values))], "n": len(values)}
            )  # fmt: skip
            print(f"{backend} {name}: p50 {p50:.1f} p90 {p90:.1f} p99 {p99:.1f} ms, n={len(values)}", flush=True)
        if backend == "sim":
            ours, peer = (float(np.median(found[name])) for name in ("reacting", "periodic"))
            halves = [np.array_split(np.array(found[name]), ROUNDS) for name in ("periodic", "reacting")]
            ratios = sorted(float(np.median(a) / np.median(b)) for a, b in zip(*halves, strict=True))
            headline = {
                "metric": "event-to-command latency, median (ms)", "ours": ours, "baseline": peer,
                "baseline_name": "input read once per period", "ratio": float(np.median(ratios)), "difference": None,
                "interval": [ratios[0], ratios[-1]], "n": len(found["reacting"]), "p_value": None,
            }  # fmt: skip
    write_benchmark(
        "teleop_latency",
        "How long does an operator's key press take to become a command?",
        headline,
        arms,
        seconds=time.monotonic() - started,
        notes=f"value: p50 in ms. {'; '.join(notes)}. Load average at the start {load:.1f} on {os.cpu_count()} cores.",
    )


if __name__ == "__main__":
    read_no_flags(__doc__)
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")
    main()
