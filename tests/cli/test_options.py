from pathlib import Path

import pytest

from bncli.cli.options import check_ending_of_copy, parse_sizes
from bncli.errors import BncliError, ConfigError


@pytest.mark.parametrize(
    ("text", "expected"), [("4", (4,)), ("4,1, 2,4", (1, 2, 4)), ("007", (7,)), ("9" * 18, (int("9" * 18),))]
)
def test_sizes_come_in_rising_order_each_once(text: str, expected: tuple[int, ...]) -> None:
    assert parse_sizes(text, "--sweep") == expected


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "0", "-1", "1.5", "1e3", "1_0", "+1", "x", "\u0661", "\u00b2", "9" * 5000]
)
def test_what_is_no_size_is_refused_and_the_option_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--sweep.*expected batch sizes such as 1,2,4,8"):
        parse_sizes(text, "--sweep")


@pytest.mark.parametrize(
    ("source", "kind", "output"),
    [
        *(
            ("a.pt", "torch zip", name)
            for name in ("b.pt", "b.PTH", "b.ckpt", "b.bin", "b.tar", "b", "b.epoch3")
        ),
        ("a.pdparams", "torch zip", "b.pdparams"),  # as the source is called
        ("blob", "safetensors", "b"),
        ("blob", "safetensors", "b.SafeTensors"),
    ],
)
def test_a_copy_may_be_called_as_files_of_its_kind_are(source: str, kind: str, output: str) -> None:
    check_ending_of_copy(Path(output), source, kind)


@pytest.mark.parametrize(
    ("source", "kind", "output", "ending"),
    [
        ("a.pt", "torch zip", "b.npz", ".pt"),
        ("a.pt", "torchscript", "b.safetensors", ".pt"),
        ("a.bin", "torch legacy", "b.ONNX", ".pt"),
        ("a.safetensors", "safetensors", "b.pt", ".safetensors"),
        ("a.safetensors", "safetensors", "b", ".safetensors"),
    ],
)
def test_a_copy_is_not_called_as_a_file_of_another_kind(
    source: str, kind: str, output: str, ending: str
) -> None:
    with pytest.raises(
        BncliError, match=rf"^{output}: would be a file of .*; give a name that ends in {ending}$"
    ):
        check_ending_of_copy(Path(output), source, kind)
