"""The command line: finding verbs, presets, errors and exit statuses."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import simtoreal.commands
from simtoreal import cli
from simtoreal.commands import doctor
from simtoreal.envs.config import build_config, load_config
from simtoreal.envs.errors import ConfigError

PROBE = '''"""Probe of the command line."""
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from simtoreal.envs.errors import ConfigError, DatasetError

SEEN = []

@dataclass(frozen=True, kw_only=True)
class Optimiser:
    learning_rate: float = 1e-4
    """Step size."""

@dataclass(frozen=True, kw_only=True)
class Config:
    task: str
    """Name of the task."""
    duration_s: float = 2.0
    """How long it takes, in seconds."""
    kind: Literal["u_net", "transformer"] = "u_net"
    """Network."""
    sizes: tuple[int, ...] = (1, 2)
    """Widths."""
    output: Path | None = None
    """Folder to write."""
    optimiser: Optimiser = field(default_factory=Optimiser)
    def __post_init__(self) -> None:
        if self.duration_s <= 0:
            raise ConfigError(f"duration_s is {self.duration_s}; expected a positive number of seconds")

def main(config: Config) -> None:
    SEEN.append(config)
    if config.task == "broken":
        raise DatasetError("episodes/000001.hdf5 is truncated")
    if config.task == "interrupted":
        raise KeyboardInterrupt
    if config.output is not None:
        from simtoreal.envs.files import write_json
        write_json(config.output / "results.json", {})
'''


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A verb ``probe`` and a grouped verb ``data probe``, as if their modules stood in simtoreal/commands."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("probe", "data_probe"):
        (folder / f"{name}.py").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "COMMANDS", folder)
    monkeypatch.setattr(simtoreal.commands, "__path__", [str(folder)])
    for name in ("simtoreal.commands.probe", "simtoreal.commands.data_probe"):
        sys.modules.pop(name, None)
    yield lambda name="probe": sys.modules[f"simtoreal.commands.{name}"].SEEN[-1]
    for name in ("simtoreal.commands.probe", "simtoreal.commands.data_probe"):
        sys.modules.pop(name, None)


def exit_status(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["simtoreal", *arguments])
    handler = signal.getsignal(signal.SIGINT)
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.signal(signal.SIGINT, handler)  # an interrupted command is about to end and stays deaf
    return 0


def test_overview_lists_every_verb_with_its_description(probe, capsys):
    cli.run(["--help"])
    text = capsys.readouterr().out
    assert "  probe       Probe of the command line." in text
    assert "  data probe  Probe of the command line." in text


def test_group_lists_its_own_verbs(probe, capsys):
    cli.run(["data"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "Probe of" in line]
    assert [line.split("  ")[1] for line in lines] == ["data probe"]


def test_flags_reach_the_verb(probe):
    cli.run(["probe", "--task", "push", "--duration-s", "0.5", "--optimiser.learning-rate", "0.1", "--sizes", "3", "4"])
    config = probe()
    assert (config.task, config.duration_s, config.optimiser.learning_rate, config.sizes) == ("push", 0.5, 0.1, (3, 4))


def test_grouped_verb_runs_its_module(probe):
    cli.run(["data", "probe", "--task", "lift"])
    assert probe("data_probe").task == "lift"


def test_help_of_a_verb_shows_units_and_defaults(probe, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["probe", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "How long it takes, in seconds. (default: 2.0)" in text
    assert "(required)" in text


def test_preset_gives_defaults_and_the_command_line_wins(probe, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("duration_s: 7\nsizes: [5]\noptimiser:\n  learning_rate: 1e-3\n")
    cli.run(["probe", "--config", str(preset), "--task", "push", "--sizes", "8", "9"])
    config = probe()
    assert config.duration_s == 7.0
    assert config.optimiser.learning_rate == 1e-3
    assert config.sizes == (8, 9)
    assert config.kind == "u_net"


def test_preset_may_hold_the_required_flags(probe, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("task: stack\noutput: runs/a\n")
    cli.run(["probe", f"--config={preset}"])
    assert (probe().task, str(probe().output)) == ("stack", "runs/a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("durations_s: 3", ["durations_s", "Did you mean 'duration_s'?"]),
        ("duration_s: soon", ["'duration_s' is 'soon'", "float"]),
        ("kind: unet", ["'kind' is 'unet'", "Did you mean 'u_net'?"]),
        ("sizes: [1, x]", ["'sizes[1]' is 'x'", "int"]),
        ("optimiser: {rate: 1}", ["unknown key 'optimiser.rate'"]),
        ("optimiser: fast", ["'optimiser' is 'fast'"]),
        ("- a list", ["expected a mapping"]),
        ("a: [", ["not valid yaml"]),
        ("duration_s: -1", ["expected a positive number"]),
    ],
)
def test_wrong_preset_names_file_key_and_fix(probe, tmp_path, monkeypatch, capsys, text, expected):
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    assert exit_status(monkeypatch, "probe", "--config", str(preset), "--task", "push") == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in expected:
        assert part in message
    if "positive" not in expected[0]:
        assert "preset.yaml" in message


def test_missing_preset_and_missing_path(probe, tmp_path, monkeypatch, capsys):
    assert exit_status(monkeypatch, "probe", "--config", str(tmp_path / "none.yaml")) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert exit_status(monkeypatch, "probe", "--config") == 2
    assert "--config needs the path" in capsys.readouterr().err


def test_errors_for_the_user_have_no_traceback(probe, monkeypatch, capsys):
    assert exit_status(monkeypatch, "probe", "--task", "broken") == 2
    assert capsys.readouterr().err == "simtoreal: DatasetError: episodes/000001.hdf5 is truncated\n"


def test_interrupt_has_its_own_status(probe, monkeypatch, capsys):
    assert exit_status(monkeypatch, "probe", "--task", "interrupted") == 130


def test_an_interruption_of_code_in_a_string_is_an_interruption_like_others(tmp_path: Path) -> None:
    """``python -m`` would end by SIGINT: exec() of a string leaves a mark that handling the exception does not take."""
    code = "from simtoreal import cli; cli.run = lambda _: exec('raise KeyboardInterrupt'); cli.main()"
    (tmp_path / "interrupted.py").write_text(code)
    command = [sys.executable, "-m", "interrupted"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "simtoreal: interrupted\n")


def test_a_place_that_cannot_be_written_to_is_explained(probe, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        status = exit_status(monkeypatch, "probe", "--task", "push", "--output", str(place))
        message = capsys.readouterr().err
        assert status == 2
        assert "cannot be used" in message
        assert str(tmp_path / "file") in message


def test_a_place_where_no_file_can_be_made_is_explained(probe, monkeypatch, capsys):
    assert exit_status(monkeypatch, "probe", "--task", "push", "--output", "/proc") == 2
    assert "/proc/results.json: cannot be used (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "expected"),
    [(["collect"], ""), (["train"], " Shipped presets, by their name alone: bc_cpu, diffusion_cpu, diffusion_gpu.")],
)
def test_help_of_a_verb_tells_of_presets(capsys, verb, expected):
    with pytest.raises(SystemExit):
        cli.run([*verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"--config FILE.yaml gives flags from a file; those on the command line win.{expected}" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--actor", "expert", "--task", "reach", "--output", "x", "--seed", "9223372036854775807"],
        ["collect", "--task", "reach", "--output", "x", "--seed", "99999999999999999999"],
        ["collect", "--task", "reach", "--output", "x", "--seed", "9999999999999"],
        ["view", "reach", "--seed", "99999999999999999999"],
        ["data", "split", "x", "--output", "y", "--seed", "-1"],
    ],
)
def test_seeds_that_cannot_be_counted_are_refused(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    assert exit_status(monkeypatch, *arguments) == 2
    assert f"seed is {arguments[-1]}; expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_flags_must_be_finite(probe, monkeypatch, capsys, tmp_path, value):
    assert exit_status(monkeypatch, "probe", "--task", "push", "--optimiser.learning-rate", value) == 2
    assert f"--optimiser.learning-rate is {value}; expected a finite number" in capsys.readouterr().err
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"optimiser: {{learning_rate: {value.replace('nan', '.nan').replace('inf', '.inf')}}}\n")
    assert exit_status(monkeypatch, "probe", "--task", "push", "--config", str(preset)) == 2
    assert "finite" in capsys.readouterr().err


def test_unknown_verb_names_the_closest(probe, monkeypatch, capsys):
    assert exit_status(monkeypatch, "prob") == 2
    assert "Did you mean 'probe'?" in capsys.readouterr().err
    assert exit_status(monkeypatch, "data", "prob") == 2
    assert "'simtoreal data' has no verb 'prob'" in capsys.readouterr().err


def test_unknown_flag_names_the_closest(probe, monkeypatch, capsys):
    assert exit_status(monkeypatch, "probe", "--task", "push", "--durations-s", "3") == 2
    assert "--duration-s" in capsys.readouterr().err


def test_every_verb_has_a_description_and_no_config_flag_of_its_own():
    import importlib

    for verb, text in cli.verbs().items():
        assert 10 < len(text) <= 110, verb
        assert text.endswith("."), verb
        module = importlib.import_module(cli._module_name(verb))
        assert "config" not in module.Config.__dataclass_fields__, verb
        assert callable(module.main), verb


def test_module_can_be_run_and_prints_errors_cleanly():
    result = subprocess.run(
        [sys.executable, "-m", "simtoreal", "demonstrate"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("simtoreal: ConfigError: simtoreal has no verb 'demonstrate'.")


def test_load_config_reports_a_missing_required_key(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Wheel:
        radius_m: float

    path = tmp_path / "wheel.yaml"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"wheel\.yaml: key 'radius_m' is missing"):
        load_config(Wheel, path)
    assert build_config(Wheel, {"radius_m": 1}, source="test").radius_m == 1.0
    with pytest.raises(ConfigError, match="radius_m"):
        build_config(Wheel, {"radius_m": True}, source="test")


@pytest.mark.parametrize(
    "path", sorted(Path(simtoreal.commands.__file__).parent.glob("*.py")), ids=lambda path: path.stem
)
def test_no_command_takes_the_brackets_of_a_path_for_markup(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    consoles = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Console"]
    assert all(ast.unparse(call) == "Console(markup=False)" for call in consoles)


def test_doctor_is_ready_where_the_tests_run(monkeypatch, capsys):
    assert exit_status(monkeypatch, "doctor") == 0
    text = capsys.readouterr().out
    assert "llvmpipe" in text or "MUJOCO_GL=egl" in text
    assert "ready" in text


def test_doctor_names_the_fix_of_a_missing_renderer(monkeypatch):
    monkeypatch.setattr(doctor, "library_loads", lambda name: name != "libEGL.so.1")
    finding = doctor.check_rendering()
    assert finding.state == doctor.MISSING
    assert "apt-get install -y --no-install-recommends libegl1" in finding.fix
    assert "libegl1" in finding.apt_packages


def test_doctor_fails_when_something_required_is_missing(monkeypatch, capsys):
    broken = doctor.Finding(name="Rendering", state=doctor.MISSING, found="no libEGL", fix="apt-get install libegl1")
    monkeypatch.setattr(doctor, "examine", lambda: [broken])
    assert exit_status(monkeypatch, "doctor") == 1
    text = capsys.readouterr().out
    assert "apt-get install libegl1" in text
    assert "not ready" in text


def test_doctor_notices_versions_that_differ_from_the_pins(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# comment\nnumpy==1.0\nnot-installed-anywhere==3\n")
    finding = doctor.check_pins(constraints)
    assert finding.state == doctor.WARNING
    assert "(pinned 1.0)" in finding.found
    assert "not-installed" not in finding.found


def test_list_shows_what_other_commands_accept(capsys):
    from simtoreal.envs import list_tasks

    cli.run(["list", "tasks"])
    text = capsys.readouterr().out
    assert all(name in text for name in list_tasks())
    assert f"{len(list_tasks())} tasks" in text
    cli.run(["list", "robots"])
    assert "panda_ros2" in capsys.readouterr().out
    cli.run(["list", "policies"])
    listed = capsys.readouterr().out
    assert "diffusion" in listed
    assert "robomimic/bc_rnn" in listed


def test_view_writes_a_picture_of_initial_conditions(tmp_path, capsys):
    import cv2

    picture = tmp_path / "lift.png"
    cli.run(["view", "lift", "--output", str(picture)])
    image = cv2.imread(str(picture))
    assert image.shape[1] > 1900
    assert image.std() > 20
    assert "initial conditions 0 to 5 of lift" in capsys.readouterr().out


def test_view_films_the_expert(tmp_path, capsys):
    from simtoreal.envs.video import read_video

    video = tmp_path / "reach.mp4"
    cli.run(["view", "reach", "--output", str(video), "--seed", "3"])
    frames = read_video(video)
    assert len(frames) > 5
    assert abs(frames[0].astype(int) - frames[-1]).max() > 50
    assert "success" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pick_plce"], "Did you mean 'pick_place'?"),
        (["lift", "--camera", "frnt"], "Did you mean 'front'?"),
        (["lift", "--output", "picture.bmp"], "ends in .png or .mp4"),
        (["lift", "--seed", "-1"], "--seed is -1"),
        (["lift", "--output", "file/x.png"], "file/x.png: cannot be written"),
        (["lift", "--output", "/proc/x.mp4"], "/proc/x.mp4: writing failed"),
    ],
)
def test_view_explains_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert exit_status(monkeypatch, "view", *arguments) == 2
    assert expected in capsys.readouterr().err


def test_view_needs_a_display_to_be_interactive(monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert exit_status(monkeypatch, "view", "lift", "--interactive") == 2
    assert "needs a display" in capsys.readouterr().err


def test_doctor_prints_one_line_when_it_may_not_install(monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert not doctor.install_libraries(("libegl1", "libusb-1.0-0"), Console(width=200))
    text = capsys.readouterr().out
    assert "sudo apt-get install -y --no-install-recommends libegl1 libusb-1.0-0" in text


def test_doctor_reports_a_broken_ros_as_optional_with_its_fix(monkeypatch):
    monkeypatch.setattr(doctor, "ROS_SCRIPT", "raise ImportError(\"No module named 'rclpy'\")")
    finding = doctor.check_ros()
    assert finding.state == doctor.WARNING
    assert "rclpy" in finding.found
    assert "simtoreal[ros]" in finding.fix


def test_doctor_says_what_nobody_can_find(monkeypatch):
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "OFF")
    finding = doctor.check_ros()
    assert (finding.state, finding.fix) == (doctor.WARNING, "export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST")
    assert "no node finds another" in finding.found


def test_images_that_cannot_be_drawn_are_refused(monkeypatch, capsys):
    assert exit_status(monkeypatch, "twin", "--image-size", "100000") == 2
    assert "image size 100000 is not possible; expected 1 to 4096 pixels" in capsys.readouterr().err


def test_doctor_wants_room_on_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e9, "total": 64e6}))
    assert doctor.check_disk(tmp_path).state == doctor.MISSING
    assert "--shm-size" in doctor.check_shared_memory().fix
