import json
import math
from pathlib import Path

import pytest

from bncli.errors import RunError
from bncli.training.convergence import eval_lag, read_convergence


def line(epoch: int, **layers: float | None) -> str:
    entries = [{"name": name, "mean_shift": shift, "var_ratio": 2.0} for name, shift in layers.items()]
    return json.dumps({"epoch": epoch, "layers": entries}) + "\n"


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_layers_come_with_their_epochs_in_order(tmp_path: Path) -> None:
    run = write(tmp_path, line(1, a=0.5, b=None) + line(2, a=0.25, c=1.0) + line(2, a=0.125))
    layers = read_convergence(run).layers
    found = {
        x.name: [(p.epoch, p.mean_shift_in_batch_deviations, p.var_ratio) for p in x.epochs] for x in layers
    }
    assert found == {"a": [(1, 0.5, 2.0), (2, 0.125, 2.0)], "b": [(1, None, 2.0)], "c": [(2, 1.0, 2.0)]}
    assert list(found) == ["a", "b", "c"]
    assert layers[0].epochs[0].running_var_norm is None


def test_a_run_says_which_layer_is_farthest_from_its_last_batches(tmp_path: Path) -> None:
    run = write(tmp_path, line(1, a=0.9, b=0.1) + line(2, a=0.25, b=0.5, c=None))
    found = read_convergence(run)
    assert found.verdict == (
        "After epoch 2 running_mean is off by at most 0.5 of the batches' deviations (in b), and running_var"
        " is 2 to 2 times the batches' variance. Of 1 of 3 layers the batches are unknown."
    )
    assert str(found) == f"{run}: 3 BatchNorm layers, epoch 1 to 2. {found.verdict}"
    assert found.to_dict()["verdict"] == found.verdict
    nothing = read_convergence(write(tmp_path, line(7, a=None)))
    assert nothing.verdict == "What the batches of epoch 7 were like is unknown for every layer."


@pytest.mark.parametrize("length", [1, 10, 40, 60])
def test_a_torn_last_line_is_left_out(tmp_path: Path, length: int) -> None:
    run = write(tmp_path, line(1, a=0.5) + line(2, a=0.25)[:length])
    assert [p.epoch for p in read_convergence(run).layers[0].epochs] == [1]


@pytest.mark.parametrize("bad", ["{", "[]", "7", '{"epoch": 1}', '{"epoch": "x", "layers": []}', "\x00"])
def test_a_bad_line_before_the_last_is_named(tmp_path: Path, bad: str) -> None:
    with pytest.raises(RunError, match="line 2: no line of bncli's metrics"):
        read_convergence(write(tmp_path, line(1, a=0.5) + bad + "\n" + line(2, a=0.5)))


def test_no_metrics_and_no_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none of its epochs has ended yet"):
        read_convergence(tmp_path)
    for text in ("", line(1)):
        with pytest.raises(RunError, match="no finished epoch with a BatchNorm layer"):
            read_convergence(write(tmp_path, text))


def test_the_lag_of_eval_mode_is_the_distance_of_the_farthest_layer() -> None:
    def layer(shift: float | None, ratio: float | None) -> dict[str, float | None]:
        return {"mean_shift": shift, "var_ratio": ratio}

    assert eval_lag([layer(0.0, 1.0)]) == 0
    assert eval_lag([layer(0.3, math.exp(0.4)), layer(0.2, 1.0)]) == pytest.approx(0.5)
    assert eval_lag([layer(0.0, math.exp(-0.7)), layer(0.2, 1.0)]) == pytest.approx(
        0.7
    )  # too small is far too
    assert eval_lag([layer(None, None), layer(0.1, 1.0)]) == pytest.approx(0.1)
    assert eval_lag([layer(None, None)]) is eval_lag([]) is None
