"""Human data of a robot that nothing here knows: described, imported, trained on and evaluated where they come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest

from simtoreal import cli
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.diversity_unlabelled import unlabelled_diversity, vendi_score
from simtoreal.data_collection.foreign_embodiment import foreign_embodiment
from simtoreal.envs.action import integrate_action
from simtoreal.envs.contract import check_robot_env
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.env_observations import ObservationMap
from simtoreal.envs.errors import ActionError, ConfigError, EmbodimentMismatchError
from simtoreal.envs.gymnasium_env import GymnasiumVectorEnv
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.registration import find_spec
from simtoreal.envs.rollout import TASK_FAILED, rollout
from simtoreal.policies.config import BCConfig, DiffusionConfig
from simtoreal.policies.observation_keys import adapt_keys

HUMAN_DATA = Path(__file__).parent / "data/adroit_door_human/door.hdf5"
DOOR = "AdroitHandDoor-v1"


def describe(dim: int, **observations: tuple[int, ...]) -> Embodiment:
    return foreign_embodiment(name="robot", control_hz=100, action_dim=dim, observations=observations)


class Corridor(gym.Env[Any, Any]):
    """A point that succeeds beyond 1 m; says so in its info only, and goes on."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, success_name: str = "success", render_mode: str | None = None) -> None:
        box = gym.spaces.Box
        self.observation_space = gym.spaces.Dict(
            {
                "robot": gym.spaces.Dict({"place": box(-9, 9, (1,)), "speed": box(-9, 9, (1,))}),
                "goal": box(-9, 9, (3,)),
                "view": box(0, 255, (6, 8, 3), np.uint8),
            }
        )  # fmt: skip
        self.action_space = box(-0.5, 0.25, (1,), np.float32)
        self.success_name, self.render_mode = success_name, render_mode

    def _observe(self) -> dict[str, Any]:
        place, speed = np.array([self.place], np.float32), np.array([self.speed], np.float32)
        view = np.full((6, 8, 3), int(100 * abs(self.place)) % 256, np.uint8)
        view[0, 0] = 255
        return {"robot": {"place": place, "speed": speed}, "goal": np.array([1, 2, 3], np.float32), "view": view}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.speed = float((options or {}).get("place", self.np_random.uniform(0, 0.2))), 0.0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.speed = float(action[0])
        self.place += self.speed
        return self._observe(), -self.place, self.place < -2, False, {self.success_name: self.place > 1}

    def render(self) -> np.ndarray:
        return np.full((32, 48, 3), 77, np.uint8)


gym.register("Corridor-v0", entry_point=Corridor, max_episode_steps=12)
gym.register("CorridorWon-v0", entry_point=Corridor, max_episode_steps=12, kwargs={"success_name": "won"})
gym.register("CorridorEndless-v0", entry_point=Corridor)


class Constant:
    """Always the same action."""

    observation_steps, execute_steps, ensembling = 1, 1, None

    def __init__(self, *action: float) -> None:
        self.action = np.array(action, np.float32)

    def reset(self, slots: np.ndarray, seeds: Any) -> None: ...

    def act(self, observation: Any, instructions: Any, slots: np.ndarray) -> np.ndarray:
        return np.tile(self.action, (len(slots), 1, 1))


# -- description -------------------------------------------------------------------------------------------------


def test_a_foreign_embodiment_says_only_what_is_known() -> None:
    embodiment = describe(28, state=(39,), head_image=(84, 96, 3))
    assert Embodiment.from_dict(json.loads(json.dumps(embodiment.to_dict()))) == embodiment
    assert (embodiment.action.mode, embodiment.action.dim, set(embodiment.action.limits)) == ("env", 28, {1.0})
    assert embodiment.image_keys == ("head_image",)
    assert embodiment.workspace_low_m == ()
    with pytest.raises(ConfigError, match="field of view of camera 'head' is not known"):
        _ = embodiment.cameras[0].intrinsics
    with pytest.raises(ActionError, match="have no target"):
        integrate_action(np.zeros(10), np.zeros(28), embodiment)
    with pytest.raises(EmbodimentMismatchError, match="different embodiments"):
        embodiment.require_equal(panda_embodiment(64), "a", "b")


def test_a_foreign_embodiment_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="control-hz"):
        foreign_embodiment(name="r", control_hz=0, action_dim=2)
    with pytest.raises(ConfigError, match="do not fit"):
        foreign_embodiment(name="r", control_hz=10, action_dim=2, action_names=("a", "a"))
    with pytest.raises(ConfigError, match="ends in '_image'"):
        describe(2, head=(4, 4, 3))
    with pytest.raises(ValueError, match="x, y, z"):
        dataclasses.replace(panda_embodiment(64), workspace_low_m=())
    action = describe(2).action
    with pytest.raises(ValueError, match="limits of the mode 'env' must be 1"):
        dataclasses.replace(action, limits=(1.0, 2.0))


# -- observations ------------------------------------------------------------------------------------------------


def test_observations_are_matched_by_name_then_shape_then_in_order() -> None:
    env = Corridor()
    env.reset(seed=0)
    env.place, env.speed = 0.5, 0.25

    def match(keys: dict[str, tuple[int, ...]], **sources: str) -> dict[str, np.ndarray]:
        return ObservationMap(env.observation_space, keys, sources, "Corridor-v0", drawable=True)(
            env._observe(), np.full((12, 16, 3), 9, np.uint8)
        )

    assert match({"goal": (3,)})["goal"].tolist() == [1, 2, 3]
    assert match({"anything": (3,)})["anything"].tolist() == [1, 2, 3]
    # Gymnasium sorts the keys of dictionaries.
    assert sorted(match({"state": (5,)})["state"].tolist()) == [0.25, 0.5, 1, 2, 3]
    assert match({"x": (1,)}, x="robot/speed")["x"].tolist() == [0.25]
    assert match({"x": (2,)}, x="robot/speed+robot/place")["x"].tolist() == [0.25, 0.5]
    found = match({"front_image": (6, 8, 3), "state": (3,)})
    assert found["front_image"].dtype == np.uint8
    assert found["front_image"][0, 0, 0] == 255
    assert match({"front_image": (6, 8, 3)}, front_image="render")["front_image"].tolist() == [[[9] * 3] * 8] * 6
    with pytest.raises(ConfigError, match=r"2 entries have it.*--observations x=ENTRY"):
        match({"x": (1,)})
    with pytest.raises(ConfigError, match=r"nothing has it.*goal \(3,\)"):
        match({"x": (4,)})
    with pytest.raises(ConfigError, match="has no 'robot/height'"):
        match({"x": (1,)}, x="robot/height")
    with pytest.raises(ConfigError, match="does not have the shape"):
        match({"x": (2,)}, x="robot/place")
    with pytest.raises(ConfigError, match="reads no 'y'"):
        match({"x": (3,)}, y="goal")


def test_keys_default_to_what_the_data_have() -> None:
    shapes = {"state": (39,), "count": ()}
    adapted = adapt_keys(DiffusionConfig(), shapes)
    assert (adapted.image_keys, adapted.state_keys) == ((), ("state",))
    chosen = BCConfig(image_keys=(), state_keys=("stat",))
    assert adapt_keys(chosen, shapes) == dataclasses.replace(chosen)
    ours = {"front_image": (64, 64, 3), "wrist_image": (64, 64, 3), "proprio": (20,), "object_state": (14,)}
    assert adapt_keys(BCConfig(), ours) == BCConfig()
    one = {"front_image": (64, 64, 3), "proprio": (20,), "object_state": (14,)}
    assert adapt_keys(BCConfig(), one).keys == ("front_image", "proprio")
    blind = {"proprio": (2,), "environment_state": (16,), "count": ()}
    assert adapt_keys(BCConfig(), blind).keys == ("proprio", "environment_state")
    assert adapt_keys(BCConfig(image_keys=()), blind).keys == ("proprio",)
    assert adapt_keys(BCConfig(state_keys=("environment_state",)), blind).keys == ("environment_state",)


def test_training_says_what_the_policy_reads_and_what_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from toy_dataset import TASKS, make_episode

    from simtoreal.data_collection.episode import embodiment_digest
    from simtoreal.data_collection.writer import DatasetWriter

    embodiment = describe(7, proprio=(20,), environment_state=(16,))
    with DatasetWriter(tmp_path / "data", embodiment, TASKS) as writer:
        for seed in range(3):
            arrays, info = make_episode(seed)
            arrays = {name: array for name, array in arrays.items() if not name.endswith("_image")}
            arrays["obs/environment_state"] = np.random.default_rng(seed).random((20, 16), np.float32)
            arrays["obs/count"] = np.arange(20, dtype=np.float32)
            writer.add(arrays, dataclasses.replace(info, embodiment=embodiment_digest(embodiment)))
    small = ["--policy", "bc", "--bc.hidden", "16", "--steps", "2", "--trainer.batch-size", "8"]
    cli.run(["train", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), *small])
    assert (
        "the data lack front_image, wrist_image; the policy reads environment_state, proprio, and not count"
        in " ".join(capsys.readouterr().out.split())
    )


# -- environments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env_id", "dim", "keys", "count"), [
    (DOOR, 28, {"state": (39,)}, 2), ("Pendulum-v1", 1, {"obs": (3,)}, 3),
    ("Corridor-v0", 1, {"goal": (3,), "front_image": (6, 8, 3)}, 2),
])  # fmt: skip
def test_foreign_environments_keep_our_contract(
    env_id: str, dim: int, keys: dict[str, tuple[int, ...]], count: int
) -> None:
    embodiment = describe(dim, **keys)
    env = GymnasiumVectorEnv(env_id, count, embodiment=embodiment, keys=keys)
    if env_id == "Corridor-v0":
        keys["x"] = (2,)
        env.close()
        env = GymnasiumVectorEnv(
            env_id, count, embodiment=embodiment, keys=keys, sources={"x": "robot/place+robot/speed"}
        )
    try:
        check_robot_env(env, deterministic=True)
    finally:
        env.close()


def test_success_comes_from_the_info_and_ends_the_episode() -> None:
    env = GymnasiumVectorEnv("Corridor-v0", 3, embodiment=describe(1), keys={"goal": (3,)})
    # The action is clipped to the environment's bounds: 0.25 per step from at most 0.2 succeeds in step 4 or 5.
    results = rollout(env, Constant(9.0), range(7))
    assert [result.seed for result in results] == list(range(7))
    assert all(result.success and result.steps in (4, 5) for result in results)
    assert results[0].duration_s == pytest.approx(results[0].steps * 0.01)
    alone = rollout(GymnasiumVectorEnv("Corridor-v0", 1, embodiment=describe(1), keys={"goal": (3,)}),
                    Constant(9.0), range(7))  # fmt: skip
    assert [r.steps for r in alone] == [r.steps for r in results]
    timeout = rollout(env, Constant(0.0), [1])
    assert (timeout[0].success, timeout[0].failure, timeout[0].steps) == (False, "timeout", 12)
    fell = rollout(env, Constant(-0.5), [1])
    assert (fell[0].success, fell[0].failure, fell[0].steps) == (False, TASK_FAILED, 5)


def test_success_under_another_name_or_as_termination() -> None:
    options: dict[str, Any] = {"embodiment": describe(1), "keys": {"goal": (3,)}}
    (won,) = rollout(GymnasiumVectorEnv("CorridorWon-v0", 1, success_key="won", **options), Constant(1), [0])
    assert won.success
    # Nothing that is known says success, so termination counts: here that of falling.
    (ended,) = rollout(GymnasiumVectorEnv("CorridorWon-v0", 1, **options), Constant(-0.5), [0])
    assert ended.success
    (asked,) = rollout(GymnasiumVectorEnv("Corridor-v0", 1, success_key="terminated", **options), Constant(1), [0])
    assert not asked.success
    with pytest.raises(ConfigError, match=r"never held it. Did you mean 'won'"):
        rollout(GymnasiumVectorEnv("CorridorWon-v0", 1, success_key="wonn", **options), Constant(0), [0])


def test_environments_that_do_not_fit_are_refused() -> None:
    keys = {"goal": (3,)}
    with pytest.raises(ConfigError, match="2 numbers per action"):
        GymnasiumVectorEnv("Corridor-v0", 1, embodiment=describe(2), keys=keys)
    with pytest.raises(ConfigError, match="Discrete"):
        GymnasiumVectorEnv("CartPole-v1", 1, embodiment=describe(1), keys={"state": (4,)})
    with pytest.raises(ConfigError, match="--horizon"):
        GymnasiumVectorEnv("CorridorEndless-v0", 1, embodiment=describe(1), keys=keys)
    with pytest.raises(ConfigError, match="num_envs is 0; expected at least 1"):
        GymnasiumVectorEnv("Corridor-v0", 0, embodiment=describe(1), keys=keys)
    short = GymnasiumVectorEnv("CorridorEndless-v0", 1, embodiment=describe(1), keys=keys, horizon=3)
    assert rollout(short, Constant(0), [0])[0].steps == 3
    with pytest.raises(ConfigError, match="draws no pictures"):
        short.picture(0)
    with pytest.raises(ConfigError, match="Did you mean AdroitHandDoor-v1"):
        find_spec("AdroitHandDor-v1")
    with pytest.raises(ConfigError, match="'nowhere_to_be_found' cannot be imported"):
        find_spec("nowhere_to_be_found:Door-v0")
    assert find_spec(f"gymnasium_robotics:{DOOR}").id == DOOR


# -- the human data ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations of a person, as the command imports them."""
    folder = tmp_path_factory.mktemp("door")
    cli.run(["data", "import", str(HUMAN_DATA), "--output", str(folder / "data"), "--control-hz", "100"])
    return folder / "data"


def test_demonstrations_replay_in_their_environment(door: Path) -> None:
    """The adapter neither scales nor delays: open loop from the recorded state, the door still opens."""
    dataset = Dataset.open(door)
    env = GymnasiumVectorEnv(DOOR, 1, embodiment=dataset.embodiment, keys={"state": (39,)}, horizon=300)
    opened = []
    for episode in dataset.episodes:
        start = {key.removeprefix("initial_state/"): np.array(value) for key, value in _constants(episode).items()}
        arrays = dataset.read(episode)
        env.reset(seed=0, options={"initial_state_dict": start})
        for action in arrays["actions"]:
            *_, terminated, truncated, info = env.step(action[None])
            if terminated[0] or truncated[0]:
                break
        opened.append(bool(info["success"][0]))
    # Both, on gymnasium-robotics 1.4 and mujoco 3.17; other versions may differ, but a wrong scale opens none.
    assert any(opened)


def _constants(episode: Any) -> dict[str, Any]:
    return {key: value for key, value in episode.extra["constants"].items() if key.startswith("initial_state/")}


def test_import_inspect_check_train_and_evaluate_by_id(door: Path, tmp_path: Path) -> None:
    cli.run(["data", "check", str(door)])
    cli.run(["data", "inspect", str(door), "--output", str(tmp_path / "inspect")])
    summary = json.loads((tmp_path / "inspect/results.json").read_text())["inspect"]["summary"]
    assert (summary["episodes"], summary["action_mode"]) == (2, "env")
    small = ["--diffusion.unet-widths", "16", "16", "--diffusion.condition-width", "32", "--trainer.batch-size", "16"]
    run = str(tmp_path / "run")
    cli.run(["train", "--data", str(door), "--output", run, "--policy", "diffusion", "--steps", "4", *small])
    evaluate = ["evaluate", "--policy", run, "--output", str(tmp_path / "evaluation"), "--episodes", "3"]
    cli.run([*evaluate, "--env", DOOR, "--horizon", "20", "--num-envs", "2", "--videos", "0"])
    results = json.loads((tmp_path / "evaluation/results.json").read_text())
    assert (results["n"], results["task"], results["backend"], results["horizon"]) == (3, DOOR, "gymnasium", 20)
    # The data name their environment, so the id is only needed for another one.
    cli.run([*evaluate[:4], str(tmp_path / "again"), *evaluate[5:], "--horizon", "20", "--videos", "0"])
    again = json.loads((tmp_path / "again/results.json").read_text())
    assert again["task"] == DOOR
    with pytest.raises(ConfigError, match="28 numbers per action"):
        cli.run([*evaluate[:4], str(tmp_path / "wrong"), "--env", "Pendulum-v1"])


def test_diversity_without_labels(door: Path) -> None:
    (found,) = unlabelled_diversity(Dataset.open(door))
    assert found["successes"] == 2
    assert 1 < found["effective_episodes"] < 2
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    assert vendi_score(np.ones((5, 5))) == pytest.approx(1)
    assert vendi_score(np.kron(np.eye(2), np.ones((3, 3)))) == pytest.approx(2)


def test_two_ways_are_found_and_one_way_is_one(tmp_path: Path) -> None:
    from toy_dataset import EMBODIMENT, TASKS, make_episode

    from simtoreal.data_collection.writer import DatasetWriter

    generator = np.random.default_rng(0)
    for name, sides in (("two", (-1, 1)), ("one", (1,))):
        with DatasetWriter(tmp_path / name, EMBODIMENT, TASKS) as writer:
            for seed in range(12):
                arrays, info = make_episode(seed, 16)
                side = sides[seed % len(sides)] if seed < 10 else sides[0]
                way = side * np.sin(np.linspace(0, np.pi, 16))[:, None]
                arrays["obs/proprio"] = (way + generator.normal(0, 0.3, (16, 20))).astype(np.float32)
                arrays["actions"] = (0.5 * way + generator.normal(0, 0.1, (16, 7))).clip(-1, 1).astype(np.float32)
                writer.add(arrays, info)
    (two,), (one,) = (unlabelled_diversity(Dataset.open(tmp_path / name)) for name in ("two", "one"))
    assert (two["modes"], sorted(two["counts"])) == (2, [5, 7])
    assert two["entropy"] == pytest.approx(0.98, abs=0.01)
    assert (one["modes"], one["entropy"]) == (1, 0.0)
