"""Files of PaddlePaddle, MXNet, Chainer, MindSpore and MLX against the frameworks' own answers.

The files are made by tests/frameworks/make_paddle.py, make_mxnet.py, make_mindspore.py and make_mlx.py.
"""

import shutil
from pathlib import Path

import pytest

from tests.checkpoints.formats.recorded import check_answers, damaged, files_of, survives
from tests.frameworks.recorded import FILES

FRAMEWORKS = [name for name in ("paddle", "mxnet", "chainer", "mindspore", "mlx") if (FILES / name).is_dir()]
ALL = [(framework, file) for framework in FRAMEWORKS for file in files_of(framework)]


@pytest.mark.parametrize(("framework", "file"), ALL)
def test_layers_are_those_of_the_framework(framework: str, file: str) -> None:
    check_answers(framework, file)


@pytest.mark.parametrize("num_flipped", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("framework", "file"), ALL)
def test_damage_is_said_in_one_line(tmp_path: Path, framework: str, file: str, num_flipped: int) -> None:
    for path in (FILES / framework).glob("*.json"):
        if path.name != "expected.json":
            shutil.copy(path, tmp_path)
    content = (FILES / framework / file).read_bytes()
    read = [survives(tmp_path / file, data) for data in damaged(content, num_flipped)]
    assert not all(read[:20])
