"""`bncli explain TOPIC`: one screen about BatchNorm, with the command that shows it on a checkpoint."""

from typing import Annotated

import typer

from bncli.cli.options import JsonOption


def complete_topic() -> list[tuple[str, str]]:
    """For the shell: the topics, and what each is about."""
    from bncli.cli.explain.topics import all_topics

    return [(name, topic.summary) for topic in all_topics() for name in (topic.name, topic.also) if name]


def explain_topic(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="TOPIC",
            help="A topic, or a rule of inspect-stats by code or name; without it, all are listed.",
            autocompletion=complete_topic,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Explain BatchNorm, one screen per topic.

    Each page ends with a command that shows it on a checkpoint of your own.

    Examples:
    bncli explain
    bncli explain train-and-eval
    bncli explain BN003
    """
    from bncli.cli.explain.topics import all_topics, find_topic
    from bncli.cli.tables.explain import show_list, show_topics
    from bncli.cli.tables.table import print_json

    found = None if topic is None else find_topic(topic)
    if as_json:
        listed = {"topics": [one.to_line() for one in all_topics()]}
        print_json(listed if found is None else found.to_dict())
    elif found is None:
        show_list(all_topics())
    else:
        show_topics([found])
    return 0
