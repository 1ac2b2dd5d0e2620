"""Checks an export with lerobot itself: load, DataLoader, delta timestamps, append, delete and merge.

lerobot's requirements clash with ours, so it lives in an environment of its own, with Python 3.11 lerobot 0.4.4 (about
2 GB), with Python 3.12 lerobot 0.6.1 (torch there brings GPU packages, about 8 GB)::

    python3.11 tests/check_with_lerobot.py --install /tmp/lerobot-venv      # once
    simtoreal data export DATASET --format lerobot --output /tmp/exported
    /tmp/lerobot-venv/bin/python tests/check_with_lerobot.py /tmp/exported  # prints one line per check

lerobot's own results (an appended and an edited dataset) are left beside the export, ``<export>-appended`` and so on,
for ``simtoreal data import`` to read. ``--golden FOLDER`` makes the dataset of ``tests/data/lerobot_golden``, which
``tests/test_exchange_lerobot.py`` reads.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np

# Declared bounds (torch, torchvision) are narrower than what works, hence --no-deps and a list of what it imports.
# numpy: later versions refuse float(array of one), which lerobot does.
if sys.version_info < (3, 12):
    STEPS: tuple[tuple[str, ...], ...] = (
        ("torch==2.13.0", "numpy<2.3"),  # the registry has CPU wheels for Python 3.11
        ("--no-deps", "torchvision==0.25.0", "lerobot==0.4.4"),  # 0.26 lost the decoder that lerobot falls back to
        ("numpy<2.3", "datasets<5", "huggingface_hub<1", "av", "pandas<3", "draccus==0.10.0"),
    )
else:
    STEPS = (
        ("torch", "torchvision", "numpy<2.3"),
        ("--no-deps", "lerobot==0.6.1"),
        ("numpy<2.3", "datasets>=4.8,<5", "huggingface_hub<2", "av>=15,<16", "pandas<3", "draccus", "gymnasium"),
    )
COMMON = (
    "pyarrow", "jsonlines", "packaging", "einops", "deepdiff", "pillow", "imageio", "opencv-python-headless",
    "termcolor", "tqdm", "safetensors", "diffusers", "accelerate",
)  # fmt: skip
TOLERANCE = 1e-9


def install(folder: Path) -> None:
    """Make a virtual environment with lerobot in ``folder``."""
    venv.create(folder, with_pip=True)
    for packages in (*STEPS, COMMON):
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", *packages], check=True)


def declare_torchvision_operators() -> Any:
    """Let torchvision's Python code load beside a torch build that its binary does not fit; returns what to keep."""
    import torch

    if "+cpu" not in torch.__version__:
        return None  # both from the registry: its binary fits
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def open_dataset(root: Path, **options: Any) -> Any:
    """Open ``root`` with lerobot."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/checked", root=root, video_backend="pyav", **options)


def check_loading(root: Path) -> None:
    """Every frame through a DataLoader, with a history and a chunk of actions."""
    import torch

    info = json.loads((root / "meta/info.json").read_text())
    fps, features = info["fps"], info["features"]
    cameras = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
    history = {key: [-1 / fps, 0.0] for key in cameras}
    dataset = open_dataset(root, delta_timestamps={**history, "action": [i / fps for i in range(4)]})
    assert len(dataset) == info["total_frames"], (len(dataset), info["total_frames"])
    assert dataset.num_episodes == info["total_episodes"]
    frames = 0
    for batch in torch.utils.data.DataLoader(dataset, batch_size=16):
        frames += len(batch["index"])
        assert batch["action"].shape[1:] == (4, features["action"]["shape"][0])
        for key in cameras:
            height, width, channels = features[key]["shape"]
            assert batch[key].shape[1:] == (2, channels, height, width)
            assert 0 <= batch[key].min() <= batch[key].max() <= 1
        assert all(isinstance(task, str) and task for task in batch["task"])
    assert frames == info["total_frames"]
    print(f"loaded {dataset.num_episodes} episodes, {frames} frames, cameras {cameras}")


def check_indices(root: Path) -> None:
    """The table re-derived from the data: contiguous indices, tiling episodes, exact times and video spans."""
    dataset = open_dataset(root)
    table = {key: np.array(dataset.hf_dataset[key]) for key in ("index", "episode_index", "frame_index", "timestamp")}
    assert np.array_equal(table["index"], np.arange(len(dataset)))
    start = 0
    for episode in dataset.meta.episodes:
        length = episode["length"]
        assert (episode["dataset_from_index"], episode["dataset_to_index"]) == (start, start + length)
        rows = slice(start, start + length)
        assert (table["episode_index"][rows] == episode["episode_index"]).all()
        assert np.array_equal(table["frame_index"][rows], np.arange(length))
        assert np.array_equal(table["timestamp"][rows], (np.arange(length) / dataset.fps).astype(np.float32))
        for key in dataset.meta.video_keys:
            span = episode[f"videos/{key}/to_timestamp"] - episode[f"videos/{key}/from_timestamp"]
            assert abs(span - length / dataset.fps) < TOLERANCE
        start += length
    print(f"indices and times of {dataset.num_episodes} episodes are exact")


def check_statistics(root: Path) -> None:
    """``stats.json`` against numpy over all frames, and the columns that lerobot's merge needs."""
    import pandas

    dataset = open_dataset(root)
    for key in ("action", "observation.state", "timestamp"):
        if key not in dataset.meta.stats:
            continue
        rows = np.array([np.asarray(row) for row in dataset.hf_dataset[key]], dtype=np.float64)
        rows = rows[:, None] if rows.ndim == 1 else rows
        for name, share in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
            assert np.allclose(dataset.meta.stats[key][name], np.quantile(rows, share, axis=0), atol=1e-12), (key, name)
        assert np.allclose(dataset.meta.stats[key]["std"], rows.std(axis=0), atol=1e-12)
    columns = {
        tuple(pandas.read_parquet(path).columns) for path in sorted((root / "meta/episodes").glob("*/*.parquet"))
    }
    assert len(columns) == 1, f"{len(columns)} different column sets in meta/episodes"
    print(f"statistics equal np.quantile; {len(next(iter(columns)))} columns in every file of meta/episodes")


def append_episode(root: Path, output: Path) -> None:
    """Let lerobot record one more episode behind ours."""
    shutil.copytree(root, output)
    dataset = open_dataset(output)
    resume = getattr(type(dataset), "resume", None)  # lerobot 0.6
    if resume is not None:
        dataset = resume("local/checked", root=output)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    automatic = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    for step in range(7):
        frame: dict[str, Any] = {"task": "appended by lerobot"}
        for key, feature in features.items():
            if key in automatic:
                continue
            kind = np.uint8 if feature["dtype"] in ("video", "image") else np.dtype(feature["dtype"])
            frame[key] = np.full(feature["shape"], step % 2, dtype=kind)
        dataset.add_frame(frame)
    dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()
    before, after = open_dataset(root), open_dataset(output)
    assert after.num_episodes == before.num_episodes + 1
    assert len(after) == len(before) + 7
    last = after[len(after) - 1]
    assert last["task"] == "appended by lerobot"
    assert last["action"].shape[0] == features["action"]["shape"][0]
    print(f"lerobot appended an episode: {after.num_episodes} episodes, {len(after)} frames")


def delete_and_merge(root: Path, deleted: Path, merged: Path) -> None:
    """Delete the first episode with lerobot's own tool, and merge the rest with the whole."""
    from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets

    whole = open_dataset(root)
    rest = delete_episodes(whole, episode_indices=[0], output_dir=deleted, repo_id="local/deleted")
    assert rest.num_episodes == whole.num_episodes - 1
    first = whole.meta.episodes[0]["length"]
    assert len(rest) == len(whole) - first
    assert np.array_equal(rest[0]["action"], whole[first]["action"])
    assert len(whole[0]) == len(rest[0])
    both = merge_datasets([whole, rest], output_repo_id="local/merged", output_dir=merged)
    assert len(both) == len(whole) + len(rest)
    for row in (0, len(whole), len(both) - 1):
        assert both[row]["index"] == row
    print(f"lerobot deleted an episode ({len(rest)} frames) and merged ({len(both)} frames)")


def golden_frame(episode: int, step: int) -> dict[str, Any]:
    """What the golden dataset holds at a step; numbers that a reader can recompute."""
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, :, 0] = 40 + 20 * step
    picture[:, 32:, 1] = 60 + 100 * episode
    return {
        "observation.images.front": picture,
        "observation.image": np.ascontiguousarray(picture[:16, 24:40]),
        "observation.state": np.array([episode, step, episode + step / 10], dtype=np.float32),
        "observation.velocity": np.array([step / 4], dtype=np.float32),
        "observation.matrix": np.arange(4, dtype=np.float32).reshape(2, 2) + step,
        "action": np.array([step / 10, -episode], dtype=np.float32),
        "next.success": np.array([episode == 0 and step == 5]),
        "note": f"step {step}",
        "task": "push the block" if step < 3 or episode else "pull it back",
    }


def make_golden(output: Path) -> None:
    """Write two episodes of six and four steps with lerobot: both in one parquet file and one AV1 video."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {"names": ["height", "width", "channels"]}
    features = {
        "observation.images.front": {"dtype": "video", "shape": (64, 64, 3), **picture},
        "observation.image": {"dtype": "image", "shape": (16, 16, 3), **picture},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": {"motors": ["a", "b", "c"]}},
        "observation.velocity": {"dtype": "float32", "shape": (1,), "names": None},
        "observation.matrix": {"dtype": "float32", "shape": (2, 2), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
        "note": {"dtype": "string", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("local/golden", 10, features, root=output, robot_type="toy", video_backend="pyav")
    for episode, steps in enumerate((6, 4)):
        for step in range(steps):
            dataset.add_frame(golden_frame(episode, step))
        dataset.save_episode()
    dataset.finalize()
    shutil.rmtree(output / "images", ignore_errors=True)


def main() -> None:
    """Install, or run every check on an export."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules["__main__"]))
    parser.add_argument("dataset", nargs="?", type=Path, help="export to check")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make the environment and stop")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="write the golden dataset and stop")
    arguments = parser.parse_args()
    if arguments.install is not None:
        install(arguments.install)
        return
    if arguments.golden is not None:
        operators = declare_torchvision_operators()
        make_golden(arguments.golden)
        return
    operators = declare_torchvision_operators()
    import lerobot

    root = arguments.dataset
    outputs = {name: root.with_name(f"{root.name}-{name}") for name in ("appended", "deleted", "merged")}
    for folder in outputs.values():
        shutil.rmtree(folder, ignore_errors=True)
    check_loading(root)
    check_indices(root)
    check_statistics(root)
    append_episode(root, outputs["appended"])
    delete_and_merge(root, outputs["deleted"], outputs["merged"])
    for name in ("appended", "deleted", "merged"):
        check_loading(outputs[name])
    del operators
    print(f"lerobot {lerobot.__version__}: every check passed on {root}")


if __name__ == "__main__":
    main()
