"""Check what this machine has and print the command that fixes each gap."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SYSTEM_LIBRARIES = {
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libusb-1.0.so.0": "libusb-1.0-0",
}
# libEGL alone only dispatches; the software renderer behind it is this package.
SOFTWARE_RENDERER_PACKAGE = "libgl1-mesa-dri"

BROWSERS = ("chromium", "chromium-browser")
BROWSER_PACKAGE = "chromium"

MINIMUM_PYTHON = (3, 11)
DISK_NEEDED_GB = 2.0
DISK_COMFORTABLE_GB = 10.0
SHARED_MEMORY_COMFORTABLE_MB = 256

OK, WARNING, MISSING = "ok", "warning", "missing"

RENDER_SCRIPT = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/>'
    '<geom type="sphere" size="1" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    if renderer.render()[..., 0].max() < 50:
        raise SystemExit("the rendered frame is black")
    from OpenGL.GL import GL_RENDERER, glGetString
    print(glGetString(GL_RENDERER).decode())
"""

# A message to oneself proves the client library, the middleware and local discovery in one go.
ROS_SCRIPT = """
import rclpy
from std_msgs.msg import String
rclpy.init()
node = rclpy.create_node("simtoreal_doctor")
received = []
node.create_subscription(String, "simtoreal_doctor", lambda message: received.append(message.data), 1)
publisher = node.create_publisher(String, "simtoreal_doctor", 1)
for _ in range(100):
    publisher.publish(String(data="hello"))
    rclpy.spin_once(node, timeout_sec=0.1)
    if received:
        break
print(rclpy.get_rmw_implementation_identifier())
node.destroy_node()
rclpy.shutdown()
raise SystemExit(None if received else "a message published on this machine did not arrive within 10 s")
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Check what this machine has and print the command that fixes each gap."""

    install: bool = False
    """Install missing system libraries with apt-get; needs root or passwordless sudo."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: ``OK``, ``WARNING`` (something optional) or ``MISSING`` (nothing works without it).
        found: what is there.
        fix: command or action, empty when nothing is wrong.
        apt_packages: Debian packages that fix it.
    """

    name: str
    state: str
    found: str
    fix: str = ""
    apt_packages: tuple[str, ...] = ()


def check_python() -> Finding:
    """Python is new enough."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info >= MINIMUM_PYTHON:
        return Finding(name="Python", state=OK, found=found)
    return Finding(name="Python", state=MISSING, found=found, fix="make setup PYTHON=python3.12")


def check_packages() -> Finding:
    """Every required package is installed in a version within our ranges."""
    from packaging.requirements import Requirement

    problems = []
    for text in importlib.metadata.requires("simtoreal") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    if problems:
        return Finding(name="Packages", state=MISSING, found="; ".join(problems), fix="make setup")
    return Finding(name="Packages", state=OK, found="every required package is there")


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Return ``name -> version`` of the lines ``name==version`` of a constraints file."""
    lines = (line.strip() for line in constraints.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def check_pins(constraints: Path) -> Finding:
    """Installed versions are those the stored results were made with."""
    if not constraints.exists():
        return Finding(name="Pinned versions", state=OK, found="not a source checkout, nothing to compare with")
    different = []
    for name, pinned in pinned_versions(constraints).items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        # A local label (torch 2.13.0+cpu) is the same release built for other hardware.
        if version.split("+")[0] != pinned:
            different.append(f"{name} {version} (pinned {pinned})")
    if not different:
        return Finding(name="Pinned versions", state=OK, found="as in constraints.txt")
    shown = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
    return Finding(
        name="Pinned versions",
        state=WARNING,
        found=shown,
        fix=f"{shlex.quote(sys.executable)} -m pip install -c {shlex.quote(str(constraints))} "
        f"-e {shlex.quote(str(constraints.parent))}",
    )


def library_loads(name: str) -> bool:
    """Return whether the dynamic loader finds a shared library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def apt_command(packages: tuple[str, ...]) -> str:
    """Return the command line that installs Debian packages."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"


def run_script(script: str, **variables: str) -> tuple[bool, str]:
    """Run Python code in a fresh interpreter; return whether it succeeded and its last line."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, "no answer within 60 s"
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return result.returncode == 0, lines[-1] if lines else f"exit status {result.returncode}"


def check_rendering() -> Finding:
    """MuJoCo can render a frame without a display."""
    missing = tuple(
        package
        for library, package in SYSTEM_LIBRARIES.items()
        if library in ("libEGL.so.1", "libGL.so.1") and not library_loads(library)
    )
    backend = os.environ.get("MUJOCO_GL", "egl")
    packages = (*missing, SOFTWARE_RENDERER_PACKAGE)
    if missing:
        return Finding(
            name="Rendering",
            state=MISSING,
            found=f"no {', no '.join(missing)}",
            fix=apt_command(packages),
            apt_packages=packages,
        )
    works, line = run_script(RENDER_SCRIPT, MUJOCO_GL=backend)
    if works:
        return Finding(name="Rendering", state=OK, found=f"MUJOCO_GL={backend}, {line}")
    if backend != "egl":
        fix = "export MUJOCO_GL=egl"
        return Finding(name="Rendering", state=MISSING, found=f"MUJOCO_GL={backend}: {line}", fix=fix)
    packages = (*(SYSTEM_LIBRARIES[library] for library in ("libEGL.so.1", "libGL.so.1")), SOFTWARE_RENDERER_PACKAGE)
    return Finding(
        name="Rendering",
        state=MISSING,
        found=f"MUJOCO_GL=egl: {line}",
        fix=apt_command(packages),
        apt_packages=packages,
    )


def check_ros() -> Finding:
    """ROS 2 delivers a message on this machine."""
    from simtoreal.envs.errors import ConfigError
    from simtoreal.robot.topics import check_ros_environment

    try:
        check_ros_environment()
    except ConfigError as error:
        fix = "unset ROS_DOMAIN_ID ROS_AUTOMATIC_DISCOVERY_RANGE   # or export valid ones"
        return Finding(name="ROS 2", state=WARNING, found=str(error), fix=fix)
    reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE") or "LOCALHOST"
    if reach == "OFF":
        found = "ROS_AUTOMATIC_DISCOVERY_RANGE is OFF: no node finds another one, not even on this machine"
        fix = "export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST"
        return Finding(name="ROS 2", state=WARNING, found=found, fix=fix)
    works, line = run_script(ROS_SCRIPT, ROS_AUTOMATIC_DISCOVERY_RANGE=reach)
    if works:
        domain = os.environ.get("ROS_DOMAIN_ID", "0")
        seen = "this machine only" if reach == "LOCALHOST" else "reachable from the network"
        return Finding(name="ROS 2", state=OK, found=f"{line}, domain {domain}, discovery {reach} ({seen})")
    fix = f"{shlex.quote(sys.executable)} -m pip install 'simtoreal[ros]'   # or: source /opt/ros/jazzy/setup.bash"
    if "did not arrive" in line:
        fix = "ip link set lo up multicast on   # local discovery needs the loopback interface"
    return Finding(name="ROS 2", state=WARNING, found=line, fix=fix)


def check_realsense() -> Finding:
    """The RealSense SDK can be loaded."""
    if not library_loads("libusb-1.0.so.0"):
        packages = (SYSTEM_LIBRARIES["libusb-1.0.so.0"],)
        return Finding(
            name="RealSense", state=WARNING, found="no libusb", fix=apt_command(packages), apt_packages=packages
        )
    works, line = run_script("import pyrealsense2 as rs; print(len(rs.context().query_devices()), 'cameras connected')")
    if works:
        return Finding(name="RealSense", state=OK, found=line)
    fix = f"{shlex.quote(sys.executable)} -m pip install 'simtoreal[realsense]'"
    return Finding(name="RealSense", state=WARNING, found=line, fix=fix)


def check_browser() -> Finding | None:
    """The tests of the teleoperation page find Chromium; None where they are not installed (extra ``dev``)."""
    if importlib.util.find_spec("playwright") is None:
        return None
    for name in BROWSERS:
        if path := shutil.which(name):
            return Finding(name="Browser", state=OK, found=path)
    return Finding(
        name="Browser",
        state=WARNING,
        found="no Chromium, which tests of the teleoperation page drive (any browser does for using the page)",
        fix=apt_command((BROWSER_PACKAGE,)),
        apt_packages=(BROWSER_PACKAGE,),
    )


def check_gpu() -> Finding:
    """torch uses the GPU if there is one."""
    works, line = run_script(
        "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'none', torch.__version__)"
    )
    if not works:
        return Finding(name="GPU", state=MISSING, found=line, fix="make setup")
    device, _, version = line.rpartition(" ")
    if device != "none":
        return Finding(name="GPU", state=OK, found=f"{device}, torch {version}")
    if shutil.which("nvidia-smi") is None:
        return Finding(name="GPU", state=OK, found=f"none, torch {version} computes on the CPU")
    fix = (
        f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --index-url https://pypi.org/simple "
        f"torch=={version.split('+')[0]}"
    )
    return Finding(name="GPU", state=WARNING, found=f"torch {version} does not use the NVIDIA GPU here", fix=fix)


def check_disk(folder: Path) -> Finding:
    """There is room for datasets and checkpoints."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    found = f"{free_gb:.0f} GB free in {folder}"
    if free_gb >= DISK_COMFORTABLE_GB:
        return Finding(name="Disk", state=OK, found=found)
    state = WARNING if free_gb >= DISK_NEEDED_GB else MISSING
    return Finding(
        name="Disk", state=state, found=found, fix=f"free some space; {DISK_COMFORTABLE_GB:.0f} GB is comfortable"
    )


def check_shared_memory() -> Finding:
    """/dev/shm, through which processes and ROS 2 exchange images, is large enough (Docker's default is 64 MB)."""
    folder = Path("/dev/shm")
    if not folder.exists():
        return Finding(name="Shared memory", state=WARNING, found="no /dev/shm", fix="mount -t tmpfs tmpfs /dev/shm")
    size_mb = shutil.disk_usage(folder).total / 1e6
    if size_mb >= SHARED_MEMORY_COMFORTABLE_MB:
        return Finding(name="Shared memory", state=OK, found=f"{size_mb:.0f} MB in /dev/shm")
    fix = "mount -o remount,size=1G /dev/shm   # in Docker: docker run --shm-size=1g"
    return Finding(name="Shared memory", state=WARNING, found=f"only {size_mb:.0f} MB in /dev/shm", fix=fix)


def examine() -> list[Finding]:
    """Run every check; about five seconds."""
    root = Path(__file__).resolve().parents[2]
    findings = (
        check_python(),
        check_packages(),
        check_pins(root / "constraints.txt"),
        check_rendering(),
        check_ros(),
        check_realsense(),
        check_browser(),
        check_gpu(),
        check_disk(Path.cwd()),
        check_shared_memory(),
    )
    return [finding for finding in findings if finding is not None]


def install_libraries(packages: tuple[str, ...], console: Console) -> bool:
    """Install Debian packages if this user may; otherwise print the line to run. Return whether it worked."""
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    allowed = not prefix or (
        shutil.which("sudo") is not None
        and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
    )
    if shutil.which("apt-get") is None or not allowed:
        console.print(
            f"These system libraries are missing and cannot be installed from here. Run:\n  {apt_command(packages)}"
        )
        return False
    console.print(f"Installing system libraries: {' '.join(packages)}")
    for step in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        # A failing update (one unreachable repository) need not keep the packages from being there.
        result = subprocess.run([*prefix, "apt-get", *step], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        console.print(f"apt-get failed:\n{result.stderr.strip()}")
    return result.returncode == 0


def report(findings: list[Finding], console: Console) -> None:
    """Print the table and, below it, the fixes as lines that can be copied."""
    from rich.table import Table
    from rich.text import Text

    colours = {OK: "green", WARNING: "yellow", MISSING: "bold red"}
    table = Table(box=None, pad_edge=False)
    for title in ("check", "state", "found"):
        table.add_column(title, no_wrap=title != "found")
    for finding in findings:
        table.add_row(finding.name, Text(finding.state, style=colours[finding.state]), Text(finding.found))
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(f"\nfix {finding.name}:\n  {finding.fix}", highlight=False, soft_wrap=True)


def main(config: Config) -> None:
    """Check, fix what may be fixed, report; exit status 1 if something required is missing."""
    from rich.console import Console

    console = Console(markup=False)
    findings = examine()
    packages = tuple(dict.fromkeys(package for finding in findings for package in finding.apt_packages))
    if config.install and packages and install_libraries(packages, console):
        findings = examine()
    report(findings, console)
    missing = [finding.name for finding in findings if finding.state == MISSING]
    if missing:
        console.print(f"\nnot ready: {', '.join(missing)}", style="bold red")
        raise SystemExit(1)
    warnings = sum(finding.state == WARNING for finding in findings)
    console.print(f"\nready ({warnings} optional gaps)" if warnings else "\nready", style="green")
