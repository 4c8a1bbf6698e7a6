"""How many CPUs this process may really use: what a container or an affinity mask leaves of the machine's.

PyTorch starts as many threads as it sees CPUs. Under a CPU quota, which hides none of them, the threads wait
for each other while the kernel stops them, and a step takes many times as long as with fewer threads.

A quota belongs to a control group (cgroup) and holds for all groups below it, so the least on the way up
counts. Version 2 writes "max 100000" or "150000 100000" (microseconds of CPU time in each period) into
`cpu.max`; version 1 has two files, with -1 for no quota. What cannot be read or understood is no quota: then
PyTorch does as it always did. Reference: Linux, Documentation/admin-guide/cgroup-v2.rst and
Documentation/scheduler/sched-bwc.rst. Nothing here imports torch.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bncli.wording import plural

_ROOT = Path("/")


@dataclass(frozen=True)
class UsableCpus:
    """What the machine has, and what this process may use of it."""

    num_cpus: int  # of the machine
    num_allowed: int  # by the affinity mask
    quota: float | None  # seconds of CPU time in each second; None: no quota

    @property
    def count(self) -> int:
        """As many threads as can run all the time; one more where the quota has a part of a CPU left."""
        if self.quota is None:
            return self.num_allowed
        return max(1, min(self.num_allowed, math.ceil(self.quota)))

    def __str__(self) -> str:
        """What limits it: "CPU quota 2.0 of 16 cores"."""
        cores = plural(self.num_cpus, "core")
        if self.quota is not None and self.quota < self.num_allowed:
            return f"CPU quota {round(self.quota, 3)} of {cores}"
        if self.num_allowed < self.num_cpus:
            return f"CPU affinity {self.num_allowed} of {cores}"
        return cores


def usable_cpus() -> UsableCpus:
    """Of this process, now."""
    num_cpus = os.cpu_count() or 1
    # only Linux has an affinity mask that Python can read
    num_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cpus
    return UsableCpus(num_cpus, num_allowed, cpu_quota())


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The least quota of this process's groups and all above them, in CPUs; None where there is none.

    `root` is the folder that holds `proc` and what `proc/self/mountinfo` says is mounted.
    """
    quotas = [_quota_of(folder) for folder in _groups(root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups and of all above them, of both versions.

    Of version 1 under every controller: those that do not limit CPU time have no files of that name.
    """
    paths = _paths_by_version(root)
    for line in _lines(root / "proc/self/mountinfo"):
        # 32 31 0:29 /subtree /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
        left, _, kind = line.partition(" - ")
        place = left.split()
        version = {"cgroup": 1, "cgroup2": 2}.get(kind.partition(" ")[0])
        if len(place) < 5 or version not in paths:
            continue
        mount = root / place[4].lstrip("/")
        inner = _below(paths[version], place[3])
        for part in (inner, *inner.parents):
            yield mount / part


def _paths_by_version(root: Path) -> dict[int, str]:
    """Where this process is in the hierarchy of version 1 that limits CPU time, and in that of version 2."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")  # 4:cpu,cpuacct:/path, and 0::/path for version 2
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = path
        elif "cpu" in controllers.split(","):
            found[1] = path
    return found


def _below(path: str, mounted: str) -> PurePosixPath:
    """The group's place below what is mounted; the mount itself where it is outside, as in containers."""
    try:
        inner = PurePosixPath(path).relative_to(mounted)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in inner.parts else inner


def _quota_of(group: Path) -> float | None:
    """The quota of one group, in CPUs."""
    words = " ".join(_lines(group / "cpu.max")).split()
    if not words:
        words = [word for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") for word in _lines(group / name)]
    try:
        quota, period = (int(word) for word in words)
        return quota / period if quota > 0 and period > 0 else None
    except (ValueError, OverflowError):  # "max", nothing, or nothing that Linux writes
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
