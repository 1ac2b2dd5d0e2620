"""Which program wrote a file or folder, told by its content and not by its name."""

from __future__ import annotations

from pathlib import Path

from simtoreal.envs.errors import DatasetError

FORMATS = ("lerobot", "mcap", "robomimic", "zarr")

_MAGIC = {b"\x89MCAP0\r\n": "mcap", b"\x89HDF\r\n\x1a\n": "robomimic", b"PK\x03\x04": "zarr", b"PK\x05\x06": "zarr"}
# What marks a folder as of a format, in the order in which it is looked for.
_MARKS = (
    ("lerobot", "meta/info.json"),
    ("zarr", ".zgroup"),
    ("zarr", "zarr.json"),
    ("zarr", "meta/episode_ends"),
    ("mcap", "metadata.yaml"),
)


def detect_format(path: Path) -> str:
    """Return one of :data:`FORMATS`.

    Raises:
        DatasetError: there is nothing at ``path``, it is a simtoreal dataset already, or no format is recognised.
    """
    if path.is_dir():
        if (path / "episodes").is_dir() and (path / "meta.json").is_file():
            raise DatasetError(f"{path} is a simtoreal dataset already; use 'simtoreal data merge' to join datasets.")
        for name, mark in _MARKS:
            if (path / mark).exists():
                return name
        looked_for = ", ".join(dict.fromkeys(mark for _, mark in _MARKS))
        raise DatasetError(f"{path}: no known dataset; the folder has none of {looked_for}. Formats: {FORMATS}.")
    if not path.is_file():
        raise DatasetError(f"{path} does not exist.")
    with open(path, "rb") as handle:
        start = handle.read(8)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            return name
    raise DatasetError(f"{path}: no known dataset; expected MCAP, HDF5 (robomimic) or a zip of a zarr store.")


def recording_file(path: Path) -> Path:
    """Return the MCAP file of a recording: the file itself, or the only one of a rosbag2 folder.

    Raises:
        DatasetError: the folder holds none or several.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.mcap"))
    if len(files) != 1:
        raise DatasetError(
            f"{path}: holds {len(files)} MCAP files; expected one. Import the parts of a split recording one by one, "
            "and convert other rosbag2 storages with 'ros2 bag convert'."
        )
    return files[0]
