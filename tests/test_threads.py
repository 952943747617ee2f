"""The number of threads follows the CPU affinity, the quota of the control group, --threads and the record."""

import os

from common import cores, machine, terminal

import pytest
import torch

from conftest import load, quick, run


@pytest.fixture
def machine_of(tmp_path, monkeypatch):
    """machine_of(affinity, groups, files): a machine with so many cores, /proc/self/cgroup and files of quotas."""

    def make(affinity, groups, files):
        monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
        (tmp_path / "cgroup").write_text(groups)
        for name, content in files.items():
            (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "mount" / name).write_text(content)
        monkeypatch.setattr(cores, "PROC", tmp_path / "cgroup")
        monkeypatch.setattr(cores, "MOUNT", tmp_path / "mount")

    return make


V1 = "3:cpuset:/\n1:cpu,cpuacct:/box\n"


@pytest.mark.parametrize(
    "affinity, groups, files, usable",
    [
        (64, "0::/box/inner\n", {}, 64),
        (64, "0::/box/inner\n", {"box/inner/cpu.max": "max 100000\n"}, 64),
        (64, "0::/box/inner\n", {"box/inner/cpu.max": "200000 100000\n"}, 2),
        (64, "0::/box/inner\n", {"box/inner/cpu.max": "400000 100000\n", "box/cpu.max": "250000 100000\n"}, 2),
        (64, "0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        (3, "0::/\n", {"cpu.max": "800000 100000\n"}, 3),
        (64, V1, {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 64),
        (64, V1, {"cpu/box/cpu.cfs_quota_us": "400000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 4),
        (64, V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
        (64, "0::/\n", {"cpu.max": "damaged\n"}, 64),
    ],
)
def test_usable_cores_follow_affinity_and_quota(affinity, groups, files, usable, machine_of):
    machine_of(affinity, groups, files)
    assert cores.usable_cores() == usable


def test_usable_cores_without_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "PROC", tmp_path / "missing")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: {0, 5}, raising=False)
    assert cores.usable_cores() == 2
    monkeypatch.delattr(cores.os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 7)
    assert cores.usable_cores() == 7


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux sets an affinity")
def test_usable_cores_of_a_process_that_is_bound_to_one_core(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "PROC", tmp_path / "missing")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def threads_of_torch():
    before = torch.get_num_threads()
    yield torch.get_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "threads, auto_threads, used", [("auto", None, 4), ("auto", 1, 1), ("auto", 9, 4), (3, 1, 3), (6, None, 6)]
)
def test_threads_are_those_of_the_flag_or_of_the_script(threads, auto_threads, used, threads_of_torch, monkeypatch):
    monkeypatch.setattr(machine, "ALL_THREADS", 4)
    run.set_threads(threads, auto_threads)
    assert threads_of_torch() == used


def test_threads_are_recorded_and_restored_on_resume(tmp_path, threads_of_torch, monkeypatch):
    monkeypatch.setattr(machine, "ALL_THREADS", 4)
    cifar = load("cifar")
    arguments = [*quick("cifar"), "--out", str(tmp_path / "run")]
    assert cifar.main(arguments)["device"]["threads"] == cifar.AUTO_THREADS == 1
    assert cifar.main([*quick("cifar"), "--threads", "2", "--out", str(tmp_path / "two")])["device"]["threads"] == 2
    torch.set_num_threads(1)
    assert cifar.main(["--resume", str(tmp_path / "two")])["device"]["threads"] == threads_of_torch() == 2


def test_openmp_is_told_the_quota_but_not_against_the_user(monkeypatch, machine_of):
    machine_of(64, "0::/\n", {"cpu.max": "200000 100000\n"})
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    terminal.set_up_openmp()
    assert os.environ["OMP_NUM_THREADS"] == "2" and os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    terminal.set_up_openmp()
    assert os.environ["OMP_NUM_THREADS"] == "5"
