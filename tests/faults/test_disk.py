"""Disks that fill up, directories that vanish, descriptors that run out: one line, exit 2, nothing lost."""

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bncli.checkpoints import check_integrity
from bncli.cli.progress import TrainReporter
from bncli.training import StepDone
from tests.conftest import Bncli, Outcome
from tests.faults.conftest import same_run
from tests.limits import limited

Fault = Callable[[Path], contextlib.AbstractContextManager[None]]


def file_size_limit(_run_dir: Path) -> contextlib.AbstractContextManager[None]:
    return limited(resource.RLIMIT_FSIZE, 8000)  # a checkpoint is larger: half of it is written


def no_descriptors(_run_dir: Path) -> contextlib.AbstractContextManager[None]:
    return limited(resource.RLIMIT_NOFILE, 3)


@contextlib.contextmanager
def read_only(run_dir: Path) -> Iterator[None]:
    """Permissions do not bind root, so root becomes nobody for the while."""
    run_dir.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        run_dir.chmod(0o755)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="bncli-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def train_with(
    bncli: Bncli, faulty_config: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, Fault], Outcome]:
    """Train while a fault holds from step 7 on, and with it gone afterwards."""

    def call(run_dir: Path, fault: Fault) -> Outcome:
        original = TrainReporter.__call__
        with contextlib.ExitStack() as stack, monkeypatch.context() as patch:

            def report(self: TrainReporter, event: object) -> None:
                original(self, event)
                if isinstance(event, StepDone) and event.step == 7:
                    stack.enter_context(fault(run_dir))

            patch.setattr(TrainReporter, "__call__", report)
            return bncli("train", faulty_config, "--run-dir", run_dir)

    return call


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (file_size_limit, "File too large"),
        (no_descriptors, "Too many open files"),
        (read_only, "Permission denied"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    bncli: Bncli, train_with, whole_run: Path, open_dir: Path, fault: Fault, reason: str
) -> None:
    run_dir = open_dir / "run"
    outcome = train_with(run_dir, fault)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        f"bncli: error: {run_dir}: cannot be written: {reason} (the checkpoint before is intact)"
    )
    found = check_integrity(run_dir / "last.pt")
    assert (found.digest_matches, found.step) == (True, 6)
    assert not list(run_dir.glob(".*.tmp"))
    assert bncli("train", "--resume", run_dir).code == 0
    assert same_run(whole_run, run_dir)


def test_a_directory_that_vanishes_is_named(train_with, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def vanished(run_dir: Path) -> Iterator[None]:
        shutil.rmtree(run_dir)
        yield

    outcome = train_with(tmp_path / "run", vanished)
    assert outcome.code == 2
    expected = f"bncli: error: {tmp_path / 'run'}: cannot be written: No such file or directory"
    assert outcome.err.splitlines()[-1] == expected


def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(
    bncli: Bncli, faulty_config: Path, open_dir: Path
) -> None:
    config = open_dir / "config.yaml"
    shutil.copyfile(faulty_config, config)
    with read_only(open_dir):
        outcome = bncli("train", config, "--run-dir", open_dir / "run")
    assert outcome.code == 2
    assert "cannot be written: Permission denied" in outcome.err
    assert "epoch" not in outcome.err


def test_a_disk_that_is_really_full_leaves_the_checkpoint_before(
    bncli: Bncli, train_with, whole_run: Path, tmp_path: Path
) -> None:
    """A tmpfs of 256 kB, filled up. Where none may be mounted, the file size limit above has to do."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs may be mounted here; a full disk is stood in for by RLIMIT_FSIZE, tested above")

    @contextlib.contextmanager
    def full(_run_dir: Path) -> Iterator[None]:
        with (disk / "ballast").open("wb") as ballast, contextlib.suppress(OSError):
            while True:
                os.write(ballast.fileno(), b"x" * 4096)
        yield

    try:
        outcome = train_with(disk / "run", full)
        assert outcome.code == 2
        assert "cannot be written: No space left on device (the checkpoint before is" in outcome.err
        assert check_integrity(disk / "run" / "last.pt").step == 6
        (disk / "ballast").unlink()
        assert bncli("train", "--resume", disk / "run").code == 0
        assert same_run(whole_run, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
