"""How many cores this process may use: its CPU affinity and the CPU quota of its control group. Standard library only.

OpenMP follows the affinity but not the quota. In a container that may use 2 of 64 cores it would start 64 threads, and
these would wait for each other most of the time.
"""

import math
import os
from pathlib import Path

PROC = Path("/proc/self/cgroup")  # the control groups of this process
MOUNT = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The number of cores that this process may use, at least 1. A quota of 2.5 cores counts as 2."""
    cores = affinity_cores()
    quota = quota_cores()
    if quota is not None:
        cores = min(cores, math.floor(quota))
    return max(1, cores)


def affinity_cores() -> int:
    """The number of cores in the CPU affinity of this process (`taskset`, SLURM); if there is none, all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota_cores() -> float | None:
    """The CPU quota of this process in cores: the smallest one of its control group and the groups above it.

    None without a quota. Reads version 2 of control groups (cpu.max) and version 1 (cpu.cfs_quota_us).
    """
    try:
        groups = PROC.read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in groups:  # "0::/path" in version 2, "NUMBER:CONTROLLERS:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hierarchy, read_quota = MOUNT, quota_v2
        elif "cpu" in controllers.split(","):
            hierarchy, read_quota = MOUNT / "cpu", quota_v1
        else:
            continue
        group = hierarchy / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(hierarchy):
                quotas.append(read_quota(folder))
    return min((quota for quota in quotas if quota is not None), default=None)


def quota_v2(group: Path) -> float | None:
    """The quota in `cpu.max`, which holds "QUOTA PERIOD" or "max PERIOD", in microseconds."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None


def quota_v1(group: Path) -> float | None:
    """The quota in `cpu.cfs_quota_us`, where -1 stands for none, divided by `cpu.cfs_period_us`."""
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
