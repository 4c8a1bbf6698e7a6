"""CPU quotas in made-up control groups: as Docker, Kubernetes and systemd write them, and as nobody does."""

import os
from pathlib import Path

import pytest

from bncli.usable_cpus import UsableCpus, cpu_quota, usable_cpus

V1_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID_MOUNT = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
OTHERS = (
    "23 1 254:0 / / rw,relatime - ext4 /dev/root rw\n"
    "38 31 0:35 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n"
)


def system(root: Path, cgroup: str, mounts: str, quotas: dict[str, str]) -> Path:
    """A root folder with what Linux would say in `proc`, and files below `sys/fs/cgroup`."""
    files = {f"sys/fs/cgroup/{name}": content for name, content in quotas.items()}
    files |= {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHERS + mounts}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v1(folder: str, quota: object, period: object = 100000) -> dict[str, str]:
    base = f"cpu,cpuacct/{folder}".rstrip("/")
    return {f"{base}/cpu.cfs_quota_us": f"{quota}\n", f"{base}/cpu.cfs_period_us": f"{period}\n"}


def v2(folder: str, content: str) -> dict[str, str]:
    return {f"{folder}/cpu.max".lstrip("/"): f"{content}\n"}


IN_V1 = "9:name=systemd:/\n4:cpu,cpuacct:{path}\n3:memory:/elsewhere\n"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "quotas", "expected"),
    [
        pytest.param("0::/\n", V2_MOUNT.format(root="/"), v2("", "200000 100000"), 2.0, id="v2-container"),
        pytest.param("0::/\n", V2_MOUNT.format(root="/"), v2("", "150000 100000"), 1.5, id="v2-part"),
        pytest.param("0::/\n", V2_MOUNT.format(root="/"), v2("", "25000 50000"), 0.5, id="v2-period"),
        pytest.param("0::/\n", V2_MOUNT.format(root="/"), v2("", "max 100000"), None, id="v2-max"),
        pytest.param("0::/\n", V2_MOUNT.format(root="/"), {}, None, id="v2-host-root"),
        pytest.param(
            "0::/user.slice/a.scope\n",
            V2_MOUNT.format(root="/"),
            v2("user.slice/a.scope", "400000 100000") | v2("user.slice", "300000 100000"),
            3.0,
            id="v2-less-in-a-parent",
        ),
        pytest.param(
            "0::/user.slice/a.scope\n",
            V2_MOUNT.format(root="/"),
            v2("user.slice/a.scope", "max 100000") | v2("user.slice", "300000 100000"),
            3.0,
            id="v2-only-in-a-parent",
        ),
        pytest.param(
            "0::/a/b\n",
            V2_MOUNT.format(root="/"),
            v2("a/b", "100000 100000") | v2("a", "300000 100000") | v2("other", "1000 100000"),
            1.0,
            id="v2-others-do-not-count",
        ),
        pytest.param(
            IN_V1.format(path="/"), V1_MOUNT.format(root="/"), v1("", 200000), 2.0, id="v1-own-namespace"
        ),
        pytest.param(
            # Docker without a namespace of its own: the group's folder alone is mounted
            IN_V1.format(path="/docker/abc"),
            V1_MOUNT.format(root="/docker/abc"),
            v1("", 350000),
            3.5,
            id="v1-docker",
        ),
        pytest.param(
            IN_V1.format(path="/docker/abc"),
            V1_MOUNT.format(root="/"),
            v1("docker/abc", 350000) | v1("docker", 100000) | v1("", -1),
            1.0,
            id="v1-less-in-a-parent",
        ),
        pytest.param(
            IN_V1.format(path="/docker/abc/inner"),
            V1_MOUNT.format(root="/docker/abc"),
            v1("inner", -1) | v1("", 150000),
            1.5,
            id="v1-below-the-mount",
        ),
        pytest.param(IN_V1.format(path="/"), V1_MOUNT.format(root="/"), v1("", -1), None, id="v1-none"),
        pytest.param(
            # the group is told from the host's side, and what is mounted is not above it
            IN_V1.format(path="/../../kubepods/x"),
            V1_MOUNT.format(root="/"),
            v1("", 200000) | v1("../../../kubepods/x", 100000),
            2.0,
            id="v1-outside",
        ),
        pytest.param(
            IN_V1.format(path="/a") + "0::/a\n",
            V1_MOUNT.format(root="/") + HYBRID_MOUNT,
            v1("a", 250000),
            2.5,
            id="hybrid",
        ),
        pytest.param(
            IN_V1.format(path="/a") + "0::/a\n",
            V1_MOUNT.format(root="/") + HYBRID_MOUNT,
            v1("a", 250000) | v2("unified/a", "50000 100000"),
            0.5,
            id="hybrid-both",
        ),
        # what is no quota
        pytest.param("", "", {}, None, id="empty"),
        pytest.param("0::/\n", "", v2("", "200000 100000"), None, id="not-mounted"),
        pytest.param("0::/gone\n", V2_MOUNT.format(root="/"), {}, None, id="group-gone"),
        pytest.param("garbage\n\n:::\n0:\n", "a - \n - cgroup2\n\n", {}, None, id="garbage"),
        *(
            pytest.param("0::/\n", V2_MOUNT.format(root="/"), v2("", text), None, id=f"v2-{text[:12]!r}")
            for text in ("", "1", "1 2 3", "x y", "0 100000", "-5 100000", "9 0", "1" * 400 + " 1", "\x00 1")
        ),
        pytest.param(IN_V1.format(path="/"), V1_MOUNT.format(root="/"), v1("", 9, 0), None, id="v1-period-0"),
        pytest.param(
            IN_V1.format(path="/"), V1_MOUNT.format(root="/"), v1("", 9, ""), None, id="v1-no-period"
        ),
    ],
)
def test_the_least_quota_of_a_group_and_those_above_it(
    tmp_path: Path, cgroup: str, mounts: str, quotas: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(system(tmp_path, cgroup, mounts, quotas)) == expected


def test_what_cannot_be_read_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "nowhere") is None
    (tmp_path / "proc/self/cgroup").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_bytes(b"\xff\xfe" + V2_MOUNT.format(root="/").encode())
    assert cpu_quota(tmp_path) is None
    root = system(tmp_path / "other", "0::/\n", V2_MOUNT.format(root="/"), {})
    (root / "sys/fs/cgroup/cpu.max").mkdir(parents=True)
    assert cpu_quota(root) is None


@pytest.mark.parametrize(
    ("cpus", "count", "text"),
    [
        (UsableCpus(16, 16, None), 16, "16 cores"),
        (UsableCpus(1, 1, None), 1, "1 core"),
        (UsableCpus(16, 3, None), 3, "CPU affinity 3 of 16 cores"),
        (UsableCpus(16, 16, 2.0), 2, "CPU quota 2.0 of 16 cores"),
        (UsableCpus(16, 16, 2.25), 3, "CPU quota 2.25 of 16 cores"),
        (UsableCpus(16, 16, 0.05), 1, "CPU quota 0.05 of 16 cores"),
        (UsableCpus(16, 3, 2.5), 3, "CPU quota 2.5 of 16 cores"),
        (UsableCpus(16, 2, 4.0), 2, "CPU affinity 2 of 16 cores"),
        (UsableCpus(16, 16, 64.0), 16, "16 cores"),
    ],
)
def test_as_many_threads_as_can_run_at_once_and_what_limits_them(
    cpus: UsableCpus, count: int, text: str
) -> None:
    assert (cpus.count, str(cpus)) == (count, text)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_an_affinity_mask_counts() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cpus().count == usable_cpus().num_allowed == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cpus().num_allowed == len(allowed)
