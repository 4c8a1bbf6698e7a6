"""The topics of `bncli explain`: their groups and order, and how a name finds its topic.

A topic is a Markdown file beside this one, whose heading is its name and what it is about. Its code blocks of
`sh` hold commands that work as printed where `last.pt` is a checkpoint; those of `python` run. A rule's topic
is made from its page. Each fits one screen: 22 lines of 80 columns, without
the table of frameworks.
"""

import difflib
import re
from dataclasses import dataclass
from importlib.resources import files

from bncli.batchnorm.audit.rule_definition import RulePage
from bncli.batchnorm.audit.rule_pages import PAGES
from bncli.batchnorm.conventions import CONVENTIONS
from bncli.errors import BncliError

GROUPS = {
    "Train mode and eval mode": (
        "train-and-eval",
        "weight-and-bias",
        "batch-size-1",
        "track-running-stats",
        "frozen-layers",
    ),
    "Running statistics": (
        "momentum",
        "population-statistics",
        "recalibration",
        "averaging",
        "gap",
        "other-frameworks",
        "names-elsewhere",
        "conversion",
    ),
    "Equal bits, and GPUs": (
        "batch-invariance",
        "gpu",
        "many-gpus",
        "many-processes",
        "communication",
    ),
    "Files": ("checkpoint-files", "runs", "your-images", "export", "engines"),
    "What inspect-stats finds": ("findings",),
}
MAX_NEAREST = 3


@dataclass(frozen=True)
class Topic:
    """One page of `bncli explain`."""

    name: str
    also: str | None  # a second name: that of a rule, whose first is its code
    group: str
    summary: str  # one line
    text: str  # Markdown, with the heading

    @property
    def commands(self) -> list[str]:
        """The command lines of its `sh` blocks, without comments."""
        return [line.split("  #")[0].strip() for block in self.code("sh") for line in block.splitlines()]

    def code(self, language: str) -> list[str]:
        """Its code blocks in this language."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, flags=re.MULTILINE | re.DOTALL)

    def to_dict(self) -> dict[str, object]:
        """The topic as plain values."""
        return {**self.to_line(), "text": self.text, "commands": self.commands, "python": self.code("python")}

    def to_line(self) -> dict[str, str]:
        """What the list of topics tells of it, as plain values."""
        name = self.name if self.also is None else f"{self.name} {self.also}"
        return {"topic": name, "group": self.group, "summary": self.summary}


def all_topics() -> list[Topic]:
    """Every topic, by group; the rules come last, by code."""
    topics = [_read(name, group) for group, names in GROUPS.items() for name in names]
    return topics + [topic_of_rule(page) for page in PAGES]


def find_topic(asked: str) -> Topic:
    """The topic of this name, in either case, with dashes or underscores.

    Raises BncliError, with the nearest names, for anything else.
    """
    topics = all_topics()
    wanted = _plain(asked)
    for topic in topics:
        if wanted in _names(topic):
            return topic
    near = _nearest(wanted, topics)
    nearest = f"; the nearest: {', '.join(near)}" if near else ""
    raise BncliError(f"explain: there is no topic {asked[:60]!r}{nearest} (bncli explain lists all)")


def topic_of_rule(page: RulePage) -> Topic:
    """The page of a rule as a topic."""
    limits = [f"--threshold {limit.name}={limit.default:.6g}" for limit in page.thresholds]
    notes = {
        "Cost": page.cost,
        "Known": page.can_know,
        "Unknown": page.cannot_know,
        "Fix": page.advice,
        **{
            name: f"{limit.meaning} ({limit.reason})."
            for name, limit in zip(limits, page.thresholds, strict=True)
        },
        "Source": f"{page.source}.",
    }
    listed = "\n".join(f"- **{name}**: {text}" for name, text in notes.items())
    command = f"bncli inspect-stats last.pt --select {page.code}"
    text = (
        f"# {page.code} {page.name} ({page.severity}): {page.summary}\n\n{page.theory}\n\n"
        f"{listed}\n\n```sh\n{command}\n```\n"
    )
    return Topic(page.code, page.name, "What inspect-stats finds", page.summary, text)


def _read(name: str, group: str) -> Topic:
    text = (files("bncli.cli.explain") / f"{name}.md").read_text(encoding="utf-8")
    text = text.replace("TABLE OF CONVENTIONS\n", _table_of_conventions())
    text = text.replace("TABLE OF NAMES\n", _table_of_names())
    summary = text.splitlines()[0].removeprefix(f"# {name}: ")
    return Topic(name, None, group, summary, text)


def _table_of_conventions() -> str:
    """A row for each framework, from the code that reads its files."""
    lines = ["| framework | momentum | eps | variance | source |", "|---|---|---|---|---|"]
    for one in CONVENTIONS:
        of_old = ", of the old" if one.momentum_weighs == "old average" else ""
        lines.append(
            f"| {one.framework} | {one.default_momentum:g}{of_old} | {one.default_eps:g} | {one.variance} |"
            f" {one.package} {one.version} |"
        )
    return "\n".join(lines) + "\n"


def _table_of_names() -> str:
    """A row for each set of names, with the frameworks that have it."""
    frameworks: dict[tuple[str, ...], list[str]] = {}
    for one in CONVENTIONS:
        statistics = f"{one.running_mean}, {one.running_var}"
        names = (f"{one.weight}, {one.bias}", statistics, one.counter or "-")
        frameworks.setdefault(names, []).append(one.framework)
    lines = ["| framework | weight, bias | running_mean, running_var | counts |", "|---|---|---|---|"]
    lines += [f"| {', '.join(those)} | {' | '.join(names)} |" for names, those in frameworks.items()]
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _names(topic: Topic) -> list[str]:
    return [_plain(name) for name in (topic.name, topic.also) if name is not None]


def _nearest(wanted: str, topics: list[Topic]) -> list[str]:
    """Up to three names: those that are spelt alike or hold the word, then topics whose text has it."""
    if not wanted:
        return []
    names = {name: topic.to_line()["topic"] for topic in topics for name in _names(topic)}
    alike = [name for name in names if name.startswith(wanted)]
    alike += difflib.get_close_matches(wanted, names, n=MAX_NEAREST, cutoff=0.6)
    word = re.compile(rf"\b{re.escape(wanted)}\b")
    mention = [topic.to_line()["topic"] for topic in topics if word.search(_plain(topic.text))]
    return list(dict.fromkeys([names[name] for name in alike] + mention))[:MAX_NEAREST]
