"""Key frames are found around contacts and failures of real episodes, and begin a fixed share of the rollouts."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.rollouts import record_rollouts
from simtoreal.envs import load_task, make_vector_env
from simtoreal.envs.errors import ConfigError
from simtoreal.policies.reinforcement_config import GRPOConfig, ReinforcementConfig
from simtoreal.world_models.cotrain_config import KeyframeConfig
from simtoreal.world_models.disturbance import DisturbanceConfig, DisturbedActor
from simtoreal.world_models.imagined_starts import ImaginedStarts
from simtoreal.world_models.keyframes import ATTEMPT, CONTACT, DIVERGENCE, DROP, find_keyframes, read_contacts
from simtoreal.world_models.video_data import POSITIVE_FRAMES, VideoData, open_video_data

HORIZON = load_task("pick_place").horizon


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> VideoData:
    """Ten episodes of pick_place; half of them by an expert who sees the cube where it is not."""
    path = tmp_path_factory.mktemp("keyframes") / "data"
    env = make_vector_env("pick_place", 10, image_size=8, autoreset_mode=AutoresetMode.DISABLED)
    column = env.task.object_state_names.index("cube_x")
    clumsy = DisturbanceConfig(clean_share=0.5, misjudgement_m=0.15, noise=0.0, gripper_slips=0.0, wandering=0.0)
    actor = DisturbedActor(ScriptedExpert(env.task, env.embodiment), [column], clumsy)
    record_rollouts(env, actor, range(10), path, task=env.task, operator="clumsy", settings={})
    env.close()
    found = open_video_data([path])
    assert 2 <= found.success.sum() <= 8
    return found


def lengths(data: VideoData) -> np.ndarray:
    return data.ends - data.starts


def test_they_begin_shortly_before_something_is_touched(data):
    config = KeyframeConfig(lead_steps=(3, 6), per_episode=10)
    found = find_keyframes(data, config, memory=4, horizon=HORIZON)
    contacts = read_contacts(data)
    assert {one.episode for one in found if data.success[one.episode]} == set(np.flatnonzero(data.success))
    for one in found:
        assert 3 <= one.event - one.step <= 6
        if one.reason == CONTACT:
            # Row t of the contacts is shown by frame t + 1.
            touched = contacts[one.episode]
            assert (touched[one.event - 1] != touched[one.event - 2]).any()


def test_they_keep_their_distance_from_success_and_from_the_end_of_time(data):
    config = KeyframeConfig(lead_steps=(0, 3), margin_steps=12, remaining_steps=50, per_episode=10)
    found = find_keyframes(data, config, memory=4, horizon=HORIZON)
    assert found
    for one in found:
        assert 3 <= one.step <= HORIZON - 50
        if data.success[one.episode]:
            assert lengths(data)[one.episode] - POSITIVE_FRAMES - one.step >= 12
    # The release of the cube is the success: with a smaller margin there are more.
    near = find_keyframes(data, dataclasses.replace(config, margin_steps=1), memory=4, horizon=HORIZON)
    assert sum(data.success[one.episode] for one in near) > sum(data.success[one.episode] for one in found)


def test_without_contacts_the_gripper_tells(data):
    config = KeyframeConfig(lead_steps=(2, 2), per_episode=10, margin_steps=1, remaining_steps=1)
    found = find_keyframes(data, config, memory=2, horizon=HORIZON, contacts=[None] * len(data.ends))
    opened = data.targets[:, 9] > 0.5
    for one in found:
        if one.reason == CONTACT:
            frame = data.starts[one.episode] + one.event
            assert opened[frame] != opened[frame - 1]
    assert {one.episode for one in found} >= set(np.flatnonzero(data.success))


def test_failures_have_their_last_attempt_and_what_was_dropped(data):
    failed = int(np.flatnonzero(~data.success)[0])
    opened = data.targets[data.starts[failed] : data.ends[failed], 9] > 0.5
    closing = int(np.flatnonzero(opened[:-1] & ~opened[1:])[-1]) + 1
    config = KeyframeConfig(lead_steps=(2, 2), per_episode=20, margin_steps=1, remaining_steps=1)
    # Touched for five steps of a stretch in which the gripper is told to be closed.
    closed = np.lib.stride_tricks.sliding_window_view(~opened, 10).all(-1)
    first = int(closed.argmax())
    assert closed[first]
    touched = np.zeros((int(lengths(data)[failed]), 2), bool)
    touched[first : first + 5, 0] = True
    contacts = [touched if episode == failed else None for episode in range(len(data.ends))]
    found = find_keyframes(data, config, memory=2, horizon=10**6, contacts=contacts)
    reasons = {one.reason: one.event for one in found if one.episode == failed}
    assert reasons[ATTEMPT] == closing
    # Row first + 5 is the first without contact; the frame after it shows that.
    assert reasons[DROP] == first + 6
    assert ATTEMPT not in {one.reason for one in found if data.success[one.episode]}


def test_where_a_failure_leaves_the_successes(data):
    failed = int(np.flatnonzero(~data.success)[0])
    good = int(np.flatnonzero(data.success)[0])
    # A failure that copies a success for twenty steps, and then goes elsewhere.
    proprio = data.proprio.copy()
    length = int(lengths(data)[failed])
    copied = data.proprio[data.starts[good] : data.starts[good] + 20]
    proprio[data.starts[failed] : data.starts[failed] + 20] = copied
    proprio[data.starts[failed] + 20 : data.ends[failed]] = copied[-1] + 1.0
    moved = dataclasses.replace(data, proprio=proprio)
    config = KeyframeConfig(lead_steps=(5, 5), per_episode=20, remaining_steps=1)
    found = find_keyframes(moved, config, memory=2, horizon=10**6)
    (event,) = [one.event for one in found if one.episode == failed and one.reason == DIVERGENCE]
    assert event == 20
    assert length > 25


def test_there_are_no_more_than_asked_for_and_half_are_failures(data):
    config = KeyframeConfig(per_episode=10, margin_steps=1, remaining_steps=1)
    many = find_keyframes(data, config, memory=2, horizon=HORIZON)
    found = find_keyframes(data, dataclasses.replace(config, most=6), memory=2, horizon=HORIZON)
    assert len(many) > 6 == len(found)
    assert sum(data.success[one.episode] for one in found) == 3
    assert set(found) <= set(many)
    few = find_keyframes(data, dataclasses.replace(config, per_episode=1), memory=2, horizon=HORIZON)
    assert max(np.bincount([one.episode for one in few])) == 1
    assert find_keyframes(data, config, memory=2, horizon=HORIZON) == many


def learner(iteration: int, rollouts: int = 40) -> SimpleNamespace:
    config = ReinforcementConfig(rollouts=rollouts, grpo=GRPOConfig(group_size=4))
    return SimpleNamespace(config=config, iteration=iteration)


def test_a_third_of_the_rollouts_begins_in_key_frames(data):
    found = find_keyframes(data, KeyframeConfig(remaining_steps=1), memory=2, horizon=HORIZON)
    starts = ImaginedStarts(data, found, 1 / 3, seed=0)
    count, keyframes, begun = len(starts.places), 0, []
    for iteration in range(30):
        seeds = np.array(starts(learner(iteration)).seeds)
        keyframes += int(starts.is_keyframe(seeds).sum())
        begun += [int(seed) for seed in seeds[~starts.is_keyframe(seeds)][::4] % count]
        assert 12 <= starts.is_keyframe(seeds).sum() <= 16
        # Rollouts of a group are equal in everything but the policy's noise; other groups are others.
        assert [len(set(group)) for group in seeds.reshape(-1, 4)] == [1] * 10
        assert len(set(seeds)) == 10
    assert keyframes == 30 * 40 / 3
    # First frames are used evenly.
    assert np.ptp(np.bincount(begun, minlength=len(data.ends))) <= 1
    assert starts(learner(3)).seeds == starts(learner(3)).seeds
    assert starts.places[: len(data.ends)] == [(episode, 0) for episode in range(len(data.ends))]


def test_without_key_frames_all_begin_at_the_beginning(data):
    starts = ImaginedStarts(data, (), 0.0, seed=0)
    assert not starts.is_keyframe(np.array(starts(learner(0)).seeds)).any()
    with pytest.raises(ConfigError, match="no key frame was found"):
        ImaginedStarts(data, (), 0.3, seed=0)
