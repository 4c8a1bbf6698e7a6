"""`bncli explain`: every page fits, its commands run, its code runs, and what it says is true of PyTorch."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command as registered

import bncli as library
from bncli.batchnorm.audit.rule_pages import PAGES
from bncli.batchnorm.audit.rules import RULES
from bncli.batchnorm.conventions import CONVENTIONS
from bncli.cli.app import app
from bncli.cli.explain.topics import GROUPS, Topic, all_topics, find_topic
from tests.conftest import Bncli

TOPICS = all_topics()
COMMANDS = sorted({command for topic in TOPICS for command in topic.commands})
MOST_LINES = 22  # a terminal has 24: one for the command, one for the next prompt


def page(bncli: Bncli, name: str) -> str:
    outcome = bncli("explain", name)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_a_page_is_plain_text_that_fits_a_screen_and_ends_with_a_command(bncli: Bncli, topic: Topic) -> None:
    text = page(bncli, topic.name)
    lines = text.removesuffix("\n").split("\n")
    rows = len(CONVENTIONS) if topic.name in ("other-frameworks", "names-elsewhere") else 0
    assert 10 < len(lines) <= MOST_LINES + rows
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert not re.search(r"`|\*\*|^#|\x1b", text, flags=re.MULTILINE)
    assert lines[0].startswith(f"{topic.to_line()['topic']}")
    assert lines[0].endswith(f": {topic.summary}")
    assert lines[-1].strip() == topic.commands[-1]


def test_a_framework_s_row_names_what_was_run(bncli: Bncli) -> None:
    text = page(bncli, "other-frameworks")
    for one in CONVENTIONS:
        eps = re.escape(f"{one.default_eps:g}")
        source = re.escape(f"{one.package} {one.version}")
        assert re.search(
            rf"^ {one.framework} +{one.default_momentum:g}.* {eps} +{one.variance} +{source}$",
            text,
            flags=re.MULTILINE,
        ), one


def test_without_a_topic_every_one_is_listed_in_its_group_on_a_line(bncli: Bncli) -> None:
    text = bncli("explain").out
    assert max(map(len, text.splitlines())) <= 80
    assert all(line == line.rstrip() for line in text.splitlines())
    at = -1
    for group, names in GROUPS.items():
        for line in (rf"{group}$", *(rf"  {name} +\S.*$" for name in names)):
            found = re.search(f"^{line}", text, flags=re.MULTILINE)
            assert found is not None, line
            assert found.start() > at
            at = found.start()
    assert re.findall(r"^  (BN\d{3}) (\w+)", text, flags=re.MULTILINE) == [(r.code, r.name) for r in RULES]


def test_every_markdown_file_is_a_topic() -> None:
    import bncli.cli.explain

    folder = Path(bncli.cli.explain.__file__).parent
    assert {path.stem for path in folder.glob("*.md")} == {
        name for names in GROUPS.values() for name in names
    }


@pytest.mark.parametrize("asked", ["BN006", "bn006", "dead_channel", "Dead-Channel", " dead channel "])
def test_a_rule_is_found_by_code_and_by_name(bncli: Bncli, asked: str) -> None:
    assert page(bncli, asked) == page(bncli, "BN006")
    assert page(bncli, "BN006") == bncli("inspect-stats", "--explain", "dead_channel").out


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("momentun", "momentum"),
        ("recalibrate", "recalibration"),
        ("batch-size", "batch-size-1"),
        ("BN0011", "BN011 counter_multiple, BN001 never_updated"),
        ("gamma", "weight-and-bias, names-elsewhere"),  # spelt like none: the pages that mention it
    ],
)
def test_an_unknown_topic_is_answered_with_the_nearest(bncli: Bncli, asked: str, nearest: str) -> None:
    outcome = bncli("explain", asked)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(
        f"bncli: error: explain: there is no topic {asked!r}; the nearest: {nearest}"
    )
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("asked", [" ", "zzz", "x" * 500, "\x1b[31m", "../../errors"])
def test_a_topic_like_no_other_leads_to_the_list(bncli: Bncli, asked: str) -> None:
    outcome = bncli("explain", asked)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.endswith("(bncli explain lists all)\n")
    assert len(outcome.err) < 200
    assert "\x1b" not in outcome.err


def test_json_has_the_text_and_its_commands(bncli: Bncli) -> None:
    found = bncli("explain", "momentum", "--json").json
    assert (found["topic"], found["group"]) == ("momentum", "Running statistics")
    assert found["commands"] == ["bncli history ."]
    assert found["text"].startswith(f"# momentum: {found['summary']}\n")
    listed = bncli("explain", "--json").json["topics"]
    assert [one["topic"] for one in listed] == [topic.to_line()["topic"] for topic in TOPICS]


def test_pages_are_shown_without_torch() -> None:
    code = (
        "import sys; from bncli.cli.app import main; "
        "codes = [main(['explain']), main(['explain', 'BN014']), "
        "main(['inspect-stats', '--explain', 'all'])]; "
        "print(codes, sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[0, 0, 0] []\n")


def test_a_terminal_gets_colours_and_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from bncli.cli.tables.explain import rendered
    from bncli.cli.tables.table import console_for_results

    for name in ("NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = find_topic("momentum").text
    piped = rendered(console_for_results(), text)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = rendered(console_for_results(), text)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).split() == piped.split()


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, as a reader would stand in it."""
    path = tmp_path_factory.mktemp("reader") / "run"
    shutil.copytree(finished_run, path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_options_exist(command: str) -> None:
    program, name, *words = shlex.split(command)
    assert program == "bncli"
    known = {option for parameter in registered(app).commands[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def costs(command: str) -> object:
    """To evaluate takes seconds, which the quick tests have not."""
    return pytest.param(command, marks=pytest.mark.slow) if command.startswith("bncli eval") else command


@pytest.mark.parametrize("command", [costs(command) for command in COMMANDS])
def test_a_command_works_as_printed(
    bncli: Bncli, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(folder)
    outcome = bncli(*shlex.split(command)[1:])
    # 1 is an answer: best.pt and last.pt may differ, and a tiny network may give a warning
    assert outcome.code in {0, 1}, outcome.err
    assert "error:" not in outcome.err
    assert len(outcome.out.splitlines()) > 3


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def run_code(name: str) -> dict[str, object]:
    """The names that the code of a page leaves behind; it is given a network, a layer, images and batches."""
    (code,) = find_topic(name).code("python")
    images = torch.randn(8, 3, 8, 8)
    names = {
        "torch": torch,
        "bncli": library,
        "model": network(),
        "bn": nn.BatchNorm2d(3),
        "images": images,
        "loader": [images[:4], images[4:]],
    }
    exec(code, names)
    return names


def test_weight_and_bias_fold_into_one_multiplication_and_one_addition() -> None:
    names = run_code("weight-and-bias")
    bn, x = names["bn"].eval(), names["images"]
    expected = names["scale"][:, None, None] * x + names["shift"][:, None, None]
    torch.testing.assert_close(bn(x), expected)
    assert [name for name, _ in bn.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in bn.named_buffers()][:2] == ["running_mean", "running_var"]


def test_a_single_image_gets_the_logits_it_gets_in_a_batch_and_train_mode_may_refuse_it() -> None:
    names = run_code("batch-size-1")
    model, images = names["model"], names["images"]
    torch.testing.assert_close(names["logits"], model(images)[:1])
    model.train()
    assert not torch.allclose(model(images[:1]), model(images)[:1], atol=1e-3)
    (message,) = re.findall(r"ValueError: (.*?)\.", find_topic("batch-size-1").text)
    with pytest.raises(ValueError, match=message):
        nn.BatchNorm2d(3)(torch.randn(1, 3, 1, 1))


def test_without_running_statistics_eval_mode_uses_the_batch() -> None:
    bn, x = run_code("track-running-stats")["bn"], torch.randn(4, 3, 2, 2)
    assert bn.running_mean is None
    assert sorted(bn.state_dict()) == ["bias", "weight"]
    assert not torch.allclose(bn(x)[:1], bn(x[:1]), atol=1e-3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        bn(torch.randn(1, 3, 1, 1))


def test_only_eval_mode_keeps_running_statistics_as_they_are() -> None:
    names = run_code("frozen-layers")
    model, images = names["model"], names["images"]
    before = model[1].running_mean.clone()
    model(images)
    assert (model.training, model[1].training) == (True, False)
    assert torch.equal(model[1].running_mean, before)
    model.requires_grad_(False).train()
    model(images)
    assert not torch.equal(model[1].running_mean, before)


def test_fixed_batches_give_equal_bits(capsys: pytest.CaptureFixture[str]) -> None:
    fixed, images = (run_code("batch-invariance")[name] for name in ("fixed", "images"))
    assert "same bits" in capsys.readouterr().out
    assert torch.equal(fixed(images)[:1], fixed(images[:1]))


def test_recalibrate_puts_the_statistics_of_the_images_in_place() -> None:
    names = run_code("recalibration")
    inputs = names["model"][0](names["images"]).detach().double()
    torch.testing.assert_close(names["model"][1].running_mean.double(), inputs.mean((0, 2, 3)))
    expected = inputs.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(names["model"][1].running_var.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_code_for_several_gpus_runs() -> None:
    names = run_code("many-gpus")  # without a process group: by one process
    layer = names["model"][1]
    assert isinstance(layer, nn.SyncBatchNorm)
    seen = names["model"][0](names["images"]).detach()
    torch.testing.assert_close(layer.running_mean, seen.mean((0, 2, 3)))


def test_the_formulas_of_both_modes_and_of_momentum_are_those_of_pytorch() -> None:
    bn, x = nn.BatchNorm2d(3).double(), torch.randn(8, 3, 4, 4).double() * 2 + 5
    assert (bn.training, bn.momentum, bn.eps) == (True, 0.1, 1e-5)
    mean, biased, unbiased = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False), x.var((0, 2, 3))
    with torch.no_grad():
        bn.weight.uniform_(0.5, 2)
        bn.bias.uniform_()

    def formula(mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        normalised = (x - mean[:, None, None]) / torch.sqrt(var + bn.eps)[:, None, None]
        return bn.weight[:, None, None] * normalised + bn.bias[:, None, None]

    torch.testing.assert_close(bn(x), formula(mean, biased))
    torch.testing.assert_close(bn.running_mean, 0.9 * torch.zeros(3).double() + 0.1 * mean)
    torch.testing.assert_close(bn.running_var, 0.9 * torch.ones(3).double() + 0.1 * unbiased)
    torch.testing.assert_close(bn.eval()(x), formula(bn.running_mean, bn.running_var))


def numbers(name: str, pattern: str) -> list[float]:
    """What a pattern finds in a page, whose lines may break anywhere, as numbers."""
    found = re.search(pattern, " ".join(find_topic(name).text.split()))
    assert found is not None, pattern
    return [float(value) for value in found.groups()]


def averages(momentum: float | None, num_batches: int) -> torch.Tensor:
    """running_mean of channel i after batches that are 0 in it but 1 in the i-th from the end."""
    bn = nn.BatchNorm1d(num_batches, momentum=momentum)
    for row in torch.eye(num_batches).flip(0):
        bn(row.expand(2, num_batches))
    return bn.running_mean


def test_the_numbers_of_the_momentum_page_are_what_pytorch_does() -> None:
    weights = numbers("momentum", r"last batch weighs ([\d.]+), the one before it ([\d.]+), then ([\d.]+):")
    torch.testing.assert_close(averages(0.1, 3), torch.tensor(weights))
    torch.testing.assert_close(averages(None, 5), torch.full((5,), 0.2))  # momentum=None: the same for each
    (batches,) = numbers("momentum", r"\(2 - m\) / m = (\d+) batches")
    w = averages(0.1, 200).double()
    assert float(1 / w.square().sum()) == pytest.approx(batches, rel=1e-3)  # variance of a weighted mean
    (first,) = numbers("momentum", r"less than 1 % from the (\d+)th batch on")
    bn, left = nn.BatchNorm1d(1), []
    for _ in range(50):
        bn(torch.zeros(2, 1))
        left.append(float(bn.running_var))
    assert next(i for i, value in enumerate(left, start=1) if value < 0.01) == first


def test_the_variance_of_all_images_is_that_within_and_that_between_batches() -> None:
    batches = torch.randn(5, 8).double() + torch.arange(5)[:, None]
    within, between = batches.var(1, unbiased=False).mean(), batches.mean(1).var(unbiased=False)
    torch.testing.assert_close(within + between, batches.var(unbiased=False))


def test_the_finding_page_counts_the_rules_and_knows_their_names() -> None:
    text = find_topic("findings").text
    assert f"by {len(RULES)} rules" in text
    assert {rule.name for rule in RULES} >= {
        "never_updated",
        "initial_residue",
        "counter_unequal",
        "eps_decides",
    }
    mentioned = set(re.findall(r"`(\w+_\w+)`", text))
    assert mentioned <= {rule.name for rule in RULES}


@pytest.mark.parametrize("one", PAGES, ids=lambda page: page.code)
def test_each_rule_says_what_it_means_costs_knows_and_how_to_mend_it(bncli: Bncli, one: object) -> None:
    text = " ".join(page(bncli, one.code).split())
    parts = [
        one.theory,
        f"Cost: {one.cost}",
        f"Known: {one.can_know}",
        f"Unknown: {one.cannot_know}",
        f"Fix: {one.advice}",
    ]
    parts += [f"--threshold {limit.name}={limit.default:.6g}: {limit.meaning}" for limit in one.thresholds]
    parts += [f"Source: {one.source}."]
    places = [text.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert re.search(r"arXiv:\d{4}\.\d{5}|#\d+|PyTorch documentation", one.source)


def test_rules_and_pages_have_the_same_names_in_the_same_order() -> None:
    assert [(rule.code, rule.name) for rule in RULES] == [(page.code, page.name) for page in PAGES]
    assert [rule.find.__name__ for rule in RULES] == [page.name for page in PAGES]
    assert [page.code for page in PAGES] == [f"BN{number:03}" for number in range(1, len(PAGES) + 1)]


CLAIMS: dict[str, Callable[[], bool]] = {
    # the quotation must be in the page; the function recomputes it
    "BN001: In eval mode the layer does not normalise": lambda: torch.allclose(
        nn.BatchNorm1d(2).eval()(torch.ones(2, 2) * 7), torch.full((2, 2), 7.0), rtol=1e-4
    ),
    "BN002: 0.25 % beside a variance of 2": lambda: round(100 * (1 - (0.995) ** 0.5), 2) == 0.25,
    "BN002: by 4 % beside 0.1": lambda: round(100 * (((0.99 * 0.1 + 0.01) / 0.1) ** 0.5 - 1)) == 4,
    "BN006: a deviation below 0.1": lambda: (0.01 / (0.01 + 1)) ** 0.5 < 0.1,
    "BN008: At bias = -4.75 |weight| it is one in a million": lambda: (
        round(float(torch.special.ndtr(torch.tensor(-4.75, dtype=torch.float64))) * 1e6) == 1
    ),
    "BN011: momentum m acts as 1 - (1 - m)^2": lambda: torch.allclose(
        twice(momentum=0.1), torch.tensor(1 - (1 - 0.1) ** 2)
    ),
    "BN012: Near 64 deviations neighbouring bfloat16 numbers are half a deviation apart": lambda: (
        spacing(64, torch.bfloat16) == 0.5 == spacing(512, torch.float16)
    ),
    "BN014: with decay 0.9999 it holds 95 % of its start after 500 steps": lambda: (
        round(0.9999**500, 2) == 0.95
    ),
    "BN015: 19 with 0.1, 3 with 0.5, 1.02 with 0.99": lambda: (
        [round((2 - m) / m, 2) for m in (0.1, 0.5, 0.99)] == [19, 3, 1.02]
    ),
}


def twice(momentum: float) -> torch.Tensor:
    """The weight that a batch gets that is counted twice."""
    bn = nn.BatchNorm1d(1, momentum=momentum)
    for _ in range(2):
        bn(torch.ones(2, 1))
    return bn.running_mean


def spacing(number: float, dtype: torch.dtype) -> float:
    """The distance to the next number of this type."""
    value = torch.tensor(number, dtype=dtype)
    return float(value.view(torch.int16).add(1).view(dtype) - value)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_number_in_a_page_is_right(claim: str) -> None:
    name, quotation = claim.split(": ", 1)
    assert quotation in " ".join(find_topic(name).text.split())
    assert CLAIMS[claim]()
