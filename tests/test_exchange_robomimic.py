"""robomimic's single file: read by robomimic's own SequenceDataset, round trips, foreign files, hostile files."""

from __future__ import annotations

import contextlib
import io
import json
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
import toy_dataset
from exchange_damage import read_all, survive_damage
from exchange_data import LENGTHS, assert_same, make_dataset

from simtoreal import cli
from simtoreal.data_collection.dataset import META, Dataset, read_meta
from simtoreal.data_collection.exchange import import_dataset
from simtoreal.data_collection.lerobot_export import export_lerobot
from simtoreal.data_collection.lerobot_import import LeRobotReader
from simtoreal.data_collection.robomimic_export import export_robomimic
from simtoreal.data_collection.robomimic_import import RobomimicReader
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.files import write_json

FOREIGN_STEPS = (5, 8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = make_dataset(tmp_path_factory.mktemp("data") / "sort").path
    write_json(path / META, {**read_meta(path), "masks": {"compatible": ["000000", "000002"]}})
    return Dataset.open(path)


def imported(file: Path, output: Path, **options: object) -> Dataset:
    with RobomimicReader(file, **options) as reader:
        import_dataset(reader, output)
    return Dataset.open(output)


def foreign_file(path: Path, **changes: object) -> Path:
    """A file as robosuite and robomimic write it: float64 vectors, a camera, depth, demos out of order, masks."""
    env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 25}}
    with h5py.File(path, "w") as file:
        for index, steps in zip((10, 2), FOREIGN_STEPS, strict=True):
            demo = file.create_group(f"data/demo_{index}")
            t = np.arange(steps, dtype=np.float64)
            demo["actions"] = np.stack([t / 10, -t / 10, np.full(steps, index)], axis=1)
            demo["rewards"] = (t == steps - 1) * float(index == 10)
            demo["dones"] = (t == steps - 1).astype(np.int64)
            demo["states"] = np.tile(t[:, None], (1, 4))
            demo["obs/agentview_image"] = np.full((steps, 12, 10, 3), index, dtype=np.uint8)
            demo["obs/agentview_depth"] = np.zeros((steps, 12, 10, 1), dtype=np.float32)
            demo["obs/robot0_eef_pos"] = np.tile(t[:, None], (1, 3))
            demo["obs/gripper"] = np.full((steps, 2), 0.25)
            demo["next_obs/gripper"] = np.full((steps, 2), 0.25)
            demo["actions_abs"] = np.ones((steps, 3))
            demo.attrs["num_samples"] = steps
            demo.attrs["model_file"] = "<mujoco/>"
        file["data"].attrs["env_args"] = json.dumps({**env_args, **changes})
        file["data"].attrs["total"] = sum(FOREIGN_STEPS)
        file["mask/better"] = np.array(["demo_10"], dtype="S")
    return path


def test_round_trip_loses_nothing(dataset: Dataset, tmp_path: Path) -> None:
    assert export_robomimic(dataset, tmp_path / "all.hdf5") == sum(LENGTHS)
    assert_same(imported(tmp_path / "all.hdf5", tmp_path / "back"), dataset)


@pytest.mark.parametrize("mask", ["train", "compatible"])
def test_robomimic_itself_reads_the_export(dataset: Dataset, tmp_path: Path, mask: str) -> None:
    pytest.importorskip("robomimic")
    from simtoreal.policies.robomimic import import_robomimic

    import_robomimic()
    from robomimic.utils import file_utils, obs_utils
    from robomimic.utils.dataset import SequenceDataset

    file = tmp_path / "all.hdf5"
    export_robomimic(dataset, file, next_obs=True)
    keys = {"obs": {"rgb": ["front_image", "wrist_image"], "low_dim": ["proprio", "object_state"]}}
    with contextlib.redirect_stdout(io.StringIO()):
        obs_utils.initialize_obs_utils_with_obs_specs(keys)
        sequences = SequenceDataset(
            str(file), obs_keys=("front_image", "proprio"), dataset_keys=("actions", "rewards", "dones"),
            seq_length=4, filter_by_attribute=mask,
        )  # fmt: skip
        env = file_utils.get_env_metadata_from_dataset(str(file))
        shapes = file_utils.get_shape_metadata_from_dataset(str(file), all_obs_keys=["front_image", "proprio"])
    assert env["env_kwargs"]["control_freq"] == 20
    assert shapes["ac_dim"] == 7
    assert shapes["all_shapes"] == OrderedDict(front_image=[3, 16, 16], proprio=[20])
    chosen = dataset.filter(mask)
    assert len(sequences) == sum(episode.steps for episode in chosen)
    first = dataset.read(chosen[0])
    sample = sequences[2]
    np.testing.assert_array_equal(sample["actions"], first["actions"][2:6])
    np.testing.assert_array_equal(sample["next_obs"]["proprio"], first["obs/proprio"][3:7])
    np.testing.assert_array_equal(sample["obs"]["front_image"], first["obs/front_image"][2:6])


def test_export_of_a_mask_keeps_what_the_masks_still_name(dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "some.hdf5"
    export_robomimic(dataset, file, episodes=dataset.filter("compatible"))
    with h5py.File(file) as handle:
        assert set(handle["data"]) == {"demo_0", "demo_2"}
        masks = {name: sorted(member.decode() for member in members[()]) for name, members in handle["mask"].items()}
    assert masks["compatible"] == ["demo_0", "demo_2"]
    assert masks["failure"] == ["demo_2"]
    assert "valid" not in masks  # its only episode was left out
    with pytest.raises(DatasetError, match="exports never overwrite"):
        export_robomimic(dataset, file)


def test_foreign_file_keeps_its_names_masks_and_rate(tmp_path: Path) -> None:
    with RobomimicReader(foreign_file(tmp_path / "lift.hdf5")) as reader:
        result = import_dataset(reader, tmp_path / "lift")
    assert (result.episodes, result.successes, result.steps) == (2, 1, 13)
    assert "left out observation 'agentview_depth' of shape (12, 10, 1)" in result.notes
    dataset = Dataset.open(tmp_path / "lift")
    assert (dataset.embodiment.name, dataset.embodiment.control_hz) == ("Lift", 25)
    assert dataset.embodiment.action.mode == "env"
    assert dataset.embodiment.image_keys == ("agentview_image",)
    assert [episode.extra["source_episode"] for episode in dataset.episodes] == ["demo_2", "demo_10"]
    assert dataset.masks["better"] == ["000001"]
    arrays = dataset.read(dataset.episodes[1])
    assert arrays["obs/robot0_eef_pos"].dtype == np.float32
    assert arrays["actions"][:, 2].tolist() == [10] * 5
    assert arrays["states"].shape == (5, 4)
    assert arrays["step/actions_abs"].shape == (5, 3)
    assert arrays["obs/agentview_image"][0, 0, 0].tolist() == [10, 10, 10]


def test_names_that_are_none_here_and_late_observations_cost_no_episode(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "lift.hdf5")
    with h5py.File(file, "a") as handle:
        for index, steps in zip((10, 2), FOREIGN_STEPS, strict=True):
            handle[f"data/demo_{index}/torque (Nm)"] = np.full((steps, 2), 1.0)
            handle[f"data/demo_{index}/torque [Nm]"] = np.full((steps, 2), 2.0)
        handle["data/demo_10/obs/late"] = np.zeros((5, 2))
    with RobomimicReader(file) as reader:
        result = import_dataset(reader, tmp_path / "lift")
    assert (result.episodes, result.skipped) == (2, ())
    assert "left out observation 'late', which the first demo does not have" in result.notes
    assert result.notes.count("'torque [Nm]' is called 'step/torque__Nm__2' here") == 1
    dataset = Dataset.open(tmp_path / "lift")
    for episode in dataset.episodes:
        arrays = dataset.read(episode)
        assert (arrays["step/torque__Nm_"][0, 0], arrays["step/torque__Nm__2"][0, 0]) == (1, 2)


def test_foreign_environment_survives_an_export(tmp_path: Path) -> None:
    dataset = imported(foreign_file(tmp_path / "lift.hdf5"), tmp_path / "lift")
    export_robomimic(dataset, tmp_path / "again.hdf5")
    with h5py.File(tmp_path / "again.hdf5") as file:
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "Lift"
        assert file["data/demo_0"].attrs["model_file"] == "<mujoco/>"
    assert_same(imported(tmp_path / "again.hdf5", tmp_path / "back"), dataset)


def test_foreign_file_becomes_a_lerobot_dataset_with_a_state(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    dataset = imported(foreign_file(tmp_path / "lift.hdf5"), tmp_path / "lift")
    export_lerobot(dataset, tmp_path / "lerobot", codec=None)
    state = json.loads((tmp_path / "lerobot/meta/info.json").read_text())["features"]["observation.state"]
    assert state["names"] == ["gripper_0", "gripper_1", "robot0_eef_pos_0", "robot0_eef_pos_1", "robot0_eef_pos_2"]
    with LeRobotReader(tmp_path / "lerobot") as reader:
        import_dataset(reader, tmp_path / "back")
    assert_same(Dataset.open(tmp_path / "back"), dataset)


def test_unknown_rate_is_asked_for_and_not_guessed(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "gym.hdf5", type=2, env_kwargs={})
    with pytest.raises(DatasetError, match="Give it with --control-hz"):
        RobomimicReader(file)
    dataset = imported(file, tmp_path / "gym", control_hz=100.0)
    assert dataset.embodiment.control_hz == 100
    assert dataset.task["env_id"] == "Lift"


def test_constants_that_json_cannot_say_are_left_out_with_a_note(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "lift.hdf5")
    with h5py.File(file, "a") as handle:
        for demo in handle["data"].values():
            demo["mass"], demo["limit"] = np.array([1.5]), np.array([np.nan, 1.0])
    with RobomimicReader(file) as reader:
        result = import_dataset(reader, tmp_path / "out")
    assert (result.episodes, result.skipped) == (2, ())
    assert result.notes.count("left out 'limit', which is too large or not finite") == 1
    assert Dataset.open(tmp_path / "out").episodes[0].extra["constants"] == {"mass": [1.5]}


def test_part_of_a_dataset_is_split_anew(tmp_path: Path) -> None:
    source = toy_dataset.make_dataset(tmp_path / "toy", episodes=4)
    export_robomimic(source, tmp_path / "train.hdf5", episodes=source.filter("train"))
    masks = imported(tmp_path / "train.hdf5", tmp_path / "back").masks
    assert (masks["train"], masks["valid"]) == (["000000", "000001"], ["000002"])


def test_interrupted_import_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: RobomimicReader, name: str) -> object:
        if name == "demo_10":
            raise KeyboardInterrupt
        return read(self, name)

    read = RobomimicReader.read
    monkeypatch.setattr(RobomimicReader, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imported(foreign_file(tmp_path / "lift.hdf5"), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["lift.hdf5"]


def test_failed_import_leaves_the_folder_for_the_next(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "lift.hdf5")
    with h5py.File(file, "a") as handle:
        for demo in handle["data"].values():
            demo["actions"][0] = np.nan
    with pytest.raises(DatasetError, match="no episode could be imported"):
        imported(file, tmp_path / "out")
    assert len(imported(foreign_file(tmp_path / "right.hdf5"), tmp_path / "out").episodes) == 2


def test_rewards_in_a_column_mark_success(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "lift.hdf5")
    with h5py.File(file, "a") as handle:
        for demo in handle["data"].values():
            for name in ("rewards", "dones"):
                values = demo[name][()]
                del demo[name]
                demo[name] = values[:, None]
    dataset = imported(file, tmp_path / "lift")
    assert [episode.success for episode in dataset.episodes] == [False, True]
    arrays = dataset.read(dataset.episodes[1])
    assert arrays["rewards"].tolist() == arrays["dones"].tolist() == [0, 0, 0, 0, 1]
    with h5py.File(file, "a") as handle:
        del handle["data/demo_2/rewards"]
        handle["data/demo_2/rewards"] = np.zeros((FOREIGN_STEPS[1], 2))
    with RobomimicReader(file) as reader, pytest.raises(DatasetError, match=r"'rewards' has shape \(8, 2\)"):
        reader.read("demo_2")


def test_brightness_is_that_of_the_file_and_not_of_a_demo(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "lift.hdf5")
    with h5py.File(file, "a") as handle:
        for demo, largest in (("demo_2", 1), ("demo_10", 255)):
            steps = len(handle[f"data/{demo}/actions"])
            del handle[f"data/{demo}/obs/agentview_image"]
            handle[f"data/{demo}/obs/agentview_image"] = np.full((steps, 12, 10, 3), largest, np.float32)
    dataset = imported(file, tmp_path / "lift")
    images = [dataset.read(episode, ["obs/agentview_image"])["obs/agentview_image"] for episode in dataset.episodes]
    assert [int(image.max()) for image in images] == [1, 255]


def test_dense_rewards_do_not_mark_success(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "dense.hdf5")
    with h5py.File(file, "a") as handle:
        handle["data/demo_2/rewards"][0] = 0.5
    with RobomimicReader(file) as reader:
        result = import_dataset(reader, tmp_path / "dense")
    assert result.successes == 2
    assert any("rewards do not mark success" in note for note in result.notes)


def external_demo(file: h5py.File) -> None:
    del file["data/demo_2"]
    file["data/demo_2"] = h5py.ExternalLink("/etc/passwd", "/")


def external_array(file: h5py.File) -> None:
    del file["data/demo_2/actions"]
    file["data/demo_2/actions"] = h5py.SoftLink("/data/demo_10/actions")


def declared_only(file: h5py.File) -> None:
    del file["data/demo_2/obs/gripper"]
    file["data/demo_2/obs"].create_dataset("gripper", (8, 2**31), "f4", chunks=(1, 1024), compression="gzip")


def pickled(file: h5py.File) -> None:
    file["data/demo_2"].create_dataset("obs/object", data=np.array([b"x"] * 8, dtype=object), dtype=h5py.string_dtype())


def no_demos(file: h5py.File) -> None:
    del file["data/demo_2"], file["data/demo_10"]


def broken_json(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = "{"


def bad_mask(file: h5py.File) -> None:
    file["mask/worse"] = np.arange(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (external_demo, "'/data/demo_2' is a link to elsewhere"),
        (external_array, "actions' is a soft link"),
        (declared_only, "declares .* bytes but stores 0"),
        (pickled, "object' has type object; expected numbers"),
        (no_demos, "'data' holds no demo_<number>"),
        (broken_json, "attribute 'env_args': is not valid JSON"),
        (bad_mask, "'mask/worse' is not a list of demo names"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, damage, message: str) -> None:
    file = foreign_file(tmp_path / "lift.hdf5")
    with h5py.File(file, "a") as handle:
        damage(handle)
    with pytest.raises(DatasetError, match=message):
        read_all(RobomimicReader, file)


def test_our_view_of_a_dataset_is_no_file_to_import(dataset: Dataset) -> None:
    with pytest.raises(DatasetError, match="simtoreal data export --format robomimic"):
        RobomimicReader(dataset.path / "dataset.hdf5")


def test_commands_export_and_import(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, back = tmp_path / "all.hdf5", tmp_path / "back"
    cli.run(["data", "export", str(dataset.path), "--format", "robomimic", "--output", str(file)])
    cli.run(["data", "import", str(file), "--output", str(back)])
    text = capsys.readouterr().out
    assert "3 episodes, 24 steps as robomimic" in text
    assert "3 episodes (2 successes), 24 steps, 0 skipped" in text
    assert json.loads((back / "results.json").read_text())["import"]["format"] == "robomimic"
    with pytest.raises(
        ConfigError, match=r"--image-size-px is for MCAP recordings of another program, and .* is robomimic"
    ):
        cli.run(["data", "import", str(file), "--output", str(tmp_path / "more"), "--image-size-px", "32"])
    with pytest.raises(DatasetError, match="is a simtoreal dataset already"):
        cli.run(["data", "import", str(back), "--output", str(tmp_path / "more")])


def test_exports_say_themselves_what_they_hold(dataset: Dataset, tmp_path: Path) -> None:
    export_robomimic(dataset, tmp_path / "all.hdf5")
    with pytest.raises(ConfigError, match="omit --task and --control-hz"):
        RobomimicReader(tmp_path / "all.hdf5", control_hz=10.0)


def test_arrays_that_do_not_fit_the_robot_are_skipped(dataset: Dataset, tmp_path: Path) -> None:
    export_robomimic(dataset, tmp_path / "all.hdf5")
    with h5py.File(tmp_path / "all.hdf5", "a") as file:
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = np.zeros((LENGTHS[0], 6), np.float32)
        file["data/demo_1/model"] = np.zeros(LENGTHS[1])
    with RobomimicReader(tmp_path / "all.hdf5") as reader:
        result = import_dataset(reader, tmp_path / "back")
    assert [line.split(":")[0] for line in result.skipped] == ["episode demo_0", "episode demo_1"]
    assert "'actions' is (6,) per step; the robot says (7,)" in result.skipped[0]
    assert [episode.seed for episode in Dataset.open(tmp_path / "back").episodes] == [102]


def test_masks_that_follow_from_the_episodes_stay_derived(dataset: Dataset, tmp_path: Path) -> None:
    export_robomimic(dataset, tmp_path / "all.hdf5")
    assert imported(tmp_path / "all.hdf5", tmp_path / "back").meta["masks"] == {"compatible": ["000000", "000002"]}


def test_an_episode_in_neither_train_nor_valid_stays_in_neither(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "many.hdf5", "w") as file:
        for number in range(20):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"], demo["obs/pos"] = np.full((2, 1), number), np.full((2, 3), float(number))
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        # As derived here, but that the second episode to hold out, 19, is not used at all.
        file["mask/train"] = np.array([f"demo_{number}" for number in range(19) if number != 9], dtype="S")
        file["mask/valid"] = np.array(["demo_9"], dtype="S")
    masks = imported(tmp_path / "many.hdf5", tmp_path / "back").masks
    assert masks["valid"] == ["000009"]
    assert masks["train"] == [f"{number:06d}" for number in range(19) if number != 9]


def test_random_damage_ends_in_an_error_that_names_the_file(tmp_path: Path) -> None:
    noticed = survive_damage(RobomimicReader, foreign_file(tmp_path / "lift.hdf5"), tmp_path / "damaged", rounds=120)
    assert noticed > 20
