"""Topics of `bncli explain` on the screen: Markdown rendered at most 80 columns wide, and their list."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.padding import Padding
from rich.text import Text
from rich.theme import Theme

from bncli.cli.explain.topics import Topic
from bncli.cli.messages import MAX_WIDTH, one_line
from bncli.cli.tables.table import console_for_results

# readable on a light background too; rich's own has a black one
THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "cyan", "markdown.item.bullet": ""})


class _LeftHeading(Heading):
    """At the margin; rich centres headings and draws a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(str(self.text), style="bold")


class _IndentedCode(CodeBlock):
    """Code behind four spaces; rich fills a coloured box, with an empty line above and below."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = Text(str(self.text).rstrip(), style="markdown.code_block")
        yield Padding(code, (0, 0, 0, 4))


class _Page(Markdown):
    elements = {  # noqa: RUF012  (rich declares it so)
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _IndentedCode,
        "code_block": _IndentedCode,
    }


def show_topics(topics: Sequence[Topic]) -> None:
    """A page after the other, with an empty line between them."""
    console = console_for_results()
    print("\n\n".join(rendered(console, topic.text) for topic in topics))


def rendered(console: Console, markdown: str) -> str:
    """The lines, with colours on a terminal only, and without the blanks that fill them up."""
    with console.use_theme(THEME), console.capture() as captured:
        console.print(_Page(markdown), width=min(console.width, MAX_WIDTH))
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def show_list(topics: Sequence[Topic]) -> None:
    """A line for each topic, by group, and how to go on."""
    console = console_for_results()
    names = {topic.name: one_line(topic.to_line()["topic"]) for topic in topics}
    width = max(map(len, names.values()))
    for group, members in groupby(topics, key=lambda topic: topic.group):
        console.print(group, style="bold")
        for topic in members:
            console.print(f"  {names[topic.name]:<{width}}  {topic.summary}")
        console.print()
    console.print("bncli explain TOPIC shows a page; last.pt in its commands is your checkpoint.")
