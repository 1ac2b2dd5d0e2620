"""Settings of the whole suite, made before anything heavy is imported."""

from __future__ import annotations

import os

# Offscreen rendering; two test workers share two cores, so no library may start a thread per core.
os.environ["MUJOCO_GL"] = "egl"
os.environ["LP_NUM_THREADS"] = "1"
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

# A private ROS graph per process: domain ids up to 101 are free of port clashes on every operating system.
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
