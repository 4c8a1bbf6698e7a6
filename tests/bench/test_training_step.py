from pathlib import Path

import pytest

from bncli.bench.plain_loop import _plain_twin, plain_process
from bncli.bench.training_step import matrix_gflops
from bncli.config import Config
from bncli.config_file import load_config
from bncli.errors import BncliError
from bncli.training import prepare
from tests.conftest import Bncli


@pytest.mark.slow
def test_the_bench_prints_rates_ratios_and_what_they_were_measured_on(
    bncli: Bncli, tiny_config: Path
) -> None:
    arguments = ("bench", "train", tiny_config, "--rounds", 3, "--steps", 2)
    result = bncli(*arguments, "--json").json
    assert result["num_rounds"] == 3
    assert result["ratio_min"] <= result["ratio_to_plain"] <= result["ratio_max"]
    assert result["share_of_peak"] == pytest.approx(
        result["gflops_per_second"] / result["peak_gflops_per_second"]
    )
    flops = 2 * (32 * 32 * 8 * 27 + 16 * 16 * 16 * 72 + 160)
    assert result["gflops_per_second"] == pytest.approx(3 * flops * result["images_per_second"] / 1e9)
    assert "ratio" in bncli(*arguments).out


def test_the_rival_is_the_same_network_plain(tiny_config: Path) -> None:
    import torch

    setup = prepare(load_config(tiny_config))
    twin = _plain_twin(setup)
    images = setup.dataset.test.images[:4]
    twin.load_state_dict(setup.model.state_dict())
    torch.testing.assert_close(twin.eval()(images), setup.model.eval()(images), rtol=1e-4, atol=1e-5)
    assert twin.stages[1][0].conv.weight.is_contiguous()


def test_more_steps_than_an_epoch_has_are_refused(bncli: Bncli, tiny_config: Path) -> None:
    outcome = bncli("bench", "train", tiny_config, "--steps", 100)
    assert outcome.code == 2
    assert "train.batch_size" in outcome.err


def test_the_peak_is_a_positive_rate() -> None:
    import torch

    assert matrix_gflops(torch.device("cpu"), torch.float32, size=128) > 0


def test_the_rival_allocates_memory_as_pytorch_does(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over = []

    class Recorded:
        def __init__(self, target: object, args: tuple[object, Config, int, int]) -> None:
            handed_over.append(args[1])

        def start(self) -> None: ...
        def terminate(self) -> None: ...
        def join(self, timeout: float | None = None) -> None: ...

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Recorded)
    config = load_config(tiny_config)
    assert config.runtime.reuse_memory
    with plain_process(config, 1, 0):
        pass
    assert [found.runtime.reuse_memory for found in handed_over] == [False]


@pytest.mark.slow
def test_what_fails_in_the_rivals_process_is_said_here(
    tiny_config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny_config)
    hopeless = config.model_copy(update={"runtime": config.runtime.model_copy(update={"device": "abacus"})})
    with (
        plain_process(hopeless, 1, 0) as plain_round,
        pytest.raises(BncliError, match=r"plain loop failed: DeviceError: .*abacus"),
    ):
        plain_round()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_the_rival_loads_with_workers(tiny_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with plain_process(load_config(tiny_config), 2, 2) as plain_round:
        assert min(plain_round(), plain_round()) > 0
    assert capfd.readouterr().err == ""
