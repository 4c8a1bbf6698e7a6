"""Several processes under torchrun: one of them speaks, and each end is explained once, in seconds."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bncli.cli import messages
from bncli.config import RuntimeConfig
from bncli.distributed import Launch, launched
from bncli.errors import ProcessesError
from bncli.runtime import resolve_runtime
from bncli.usable_cpus import UsableCpus
from tests.distributed.torchrun import Launched, torchrun

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
WORKER = Path(__file__).parent / "failing_worker.py"


def test_the_environment_of_torchrun_is_read() -> None:
    assert launched({}) is None
    assert launched({"RANK": "1", "WORLD_SIZE": "3"}) is None  # set by others too
    assert launched(TORCHRUN) == Launch(rank=1, num_ranks=3, local_rank=0)
    restarted = launched(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3"})
    assert restarted == Launch(1, 3, 0, restarts=2, max_restarts=3)
    assert launched(TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}) == Launch(1, 3, 0, num_local=2)


def test_cpus_that_stay_idle_because_torchrun_chose_one_thread_are_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "usable_cpus", lambda: UsableCpus(16, 9, None))
    launch, config = Launch(1, 4, 0, num_local=2), RuntimeConfig(device="cpu")
    runtime = replace(resolve_runtime(config), threads=1)
    messages.note_idle_cpus(runtime, config, launch)
    told = "bncli: 2 processes of 1 thread use 2 of 9 CPUs; runtime.threads=4 uses all\n"
    assert capfd.readouterr().err == told
    messages.note_idle_cpus(replace(runtime, threads=4), config, launch)
    messages.note_idle_cpus(runtime, RuntimeConfig(device="cpu", threads=1), launch)
    messages.note_idle_cpus(runtime, config, replace(launch, num_local=1))
    messages.note_idle_cpus(runtime, config, None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "x"}, "RANK=x: must be a whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: must be"),
        ({"RANK": "3"}, "RANK=3 with WORLD_SIZE=3"),
    ],
)
def test_a_contradictory_environment_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ProcessesError, match=message):
        launched(TORCHRUN | change)


def failing(num_ranks: int, *words: object, seconds: float = 60, **changes: str) -> Launched:
    start = time.monotonic()
    done = torchrun(num_ranks, WORKER, *words, **changes)
    assert done.code == 1  # torchrun's for every failure
    assert time.monotonic() - start < seconds
    assert 'failing_worker.py", line' not in done.err  # no traceback but torchrun's own
    return done


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_with_one_line() -> None:
    done = failing(2, "train", "error")
    assert done.errors == ["rank 1 of 2: no data here"]
    assert done.out == "[0, 1] speaks\n"  # rank 0 alone
    assert done.rank_codes[1] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "early"), "rank 1 of 3: no data here"),
        (("train", "early", "--rank", "0"), "rank 0 of 3: no data here"),
        (("train", "bug"), "ZeroDivisionError: a bug (this is a bug in bncli"),
        (("train", "kill"), "rank 1 of 3 is gone: killed"),
        (("train", "kill", "--rank", "0"), "rank 0 of 3 is gone: killed"),
        (("train", "other", "--rank", "2"), "rank 2 differs from rank 0 in seed.of: False in rank 0, True"),
        (("train", "silent", "--timeout", "5"), "rank 1 of 3 is alive, but did not answer in time"),
        (("train", "never", "--timeout", "5"), "rank 1 did not start within 5 seconds"),
        (("history",), "bncli history works in one process: start it without torchrun"),
        (("train",), "missing argument 'how'"),
    ],
)
def test_every_end_is_explained_once(words: tuple[str, ...], message: str) -> None:
    done = failing(3, *words)
    (line,) = done.errors
    assert line.startswith(message)
    assert "done" not in done.out
    assert 2 in done.rank_codes.values()


@pytest.mark.slow
def test_help_is_printed_once() -> None:
    done = torchrun(2, WORKER, "train", "--help")
    assert done.code == 0
    assert done.out.count("Usage:") == 1


@pytest.mark.slow
def test_two_versions_of_torch_are_refused(tmp_path: Path) -> None:
    """The version that Python's metadata and torch itself tell is another one in rank 1."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, importlib.abc, importlib.util\n"
        "class Patch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch.version':\n"
        "            spec = importlib.util.spec_from_loader(name, Loader())\n"
        "            return spec\n"
        "class Loader(importlib.abc.Loader):\n"
        "    def exec_module(self, module):\n"
        "        import pathlib\n"
        "        text = (pathlib.Path(sys.modules['torch'].__path__[0]) / 'version.py').read_text()\n"
        "        exec(text, module.__dict__)\n"
        "        module.__version__ = '2.12.9'\n"
        "if os.environ.get('RANK') == '1':\n"
        "    sys.meta_path.insert(0, Patch())\n"
    )
    root = str(Path(__file__).parent.parent.parent)
    done = failing(2, "train", "fine", PYTHONPATH=f"{tmp_path}:{root}")
    (line,) = done.errors
    assert line.startswith("rank 1 differs from rank 0 in version of torch: '2.13.0")
    assert "'2.12.9' in rank 1" in line


@pytest.mark.slow
def test_other_code_of_bncli_in_one_rank_is_refused(tmp_path: Path) -> None:
    """As where one node has another version from git."""
    root = Path(__file__).parent.parent.parent
    for folder in ("bncli", "configs"):
        shutil.copytree(root / folder, tmp_path / "other" / folder)
    with (tmp_path / "other" / "bncli" / "wording.py").open("a") as file:
        file.write("# another comment\n")
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, '{tmp_path}/other' if os.environ['RANK'] == '1' else '{root}')\n"
        "from bncli.cli.app import main\n"
        "sys.exit(main(None))\n"
    )
    done = torchrun(2, script, "train", "quickstart", "--run-dir", tmp_path / "run")
    (line,) = done.errors
    assert line.startswith("rank 1 differs from rank 0 in code of bncli (SHA-256): '")
    assert not (tmp_path / "run").exists()


def test_what_differs_is_told_by_its_dotted_key() -> None:
    from bncli.distributed.processes import _first_difference

    one = json.loads('{"a": {"b": [1, 2]}, "c": 1}')
    assert _first_difference(one, {"a": {"b": [1, 2]}, "c": 1}) is None
    assert _first_difference(one, {"a": {"b": [1, 3]}, "c": 2}) == ("a.b", [1, 2], [1, 3])
    assert _first_difference(one, {"a": {"b": [1, 2]}}) == ("c", 1, None)
