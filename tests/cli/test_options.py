import pytest

from bncli.cli.options import parse_sizes
from bncli.errors import ConfigError


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
