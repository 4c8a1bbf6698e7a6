"""The page as a program reads it: whole, closed to the outside, and with names that are text."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from bncli.report import Content, DrawingLibrary, Fact, render_page
from tests.report.conftest import layers_of

VOID = {"meta", "input", "img", "br", "hr", "link"}
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "a\x1b[31m\x00\u202eb\u2028c",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "\"'><svg onload=alert(1)>",
)


class Reader(HTMLParser):
    """Elements with their attributes, scripts with their text, and what anybody would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.seen: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def read(content: Content, library: Any) -> Reader:
    reader = Reader(render_page(content, library))
    assert reader.open == []
    return reader


def test_nothing_in_the_page_leads_out_of_it(content: Callable[..., Content], library: Any) -> None:
    page = read(content(layers_of({"a": 3})), library)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "base", "form"} or (
            tag == "form" and "action" not in attributes
        )
        assert not {"src", "action", "formaction", "srcset", "data", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        if tag == "a":
            assert attributes["href"].removeprefix("#") in ids


def test_the_browser_is_told_to_run_these_scripts_only_and_to_ask_for_nothing(
    content: Callable[..., Content], library: Any
) -> None:
    page = read(content(layers_of({"a": 3})), library)
    (policy,) = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests[1:]]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_wherever_they_come_from(
    content: Callable[..., Content], library: Any, name: str
) -> None:
    plain = read(content(layers_of({"a": 4, "b": 4}, running_var=[1.0, torch.nan, 1.0, 1.0])), library)
    layers = layers_of({name: 4, "b": 4}, running_var=[1.0, torch.nan, 1.0, 1.0])
    facts = (Fact(name, name),)
    page = read(
        content(
            layers, title=name, sources=(name,), facts=facts, notes=(name,), configuration=f"a:\n  b: {name}"
        ),
        library,
    )
    new = {"table", "tr", "th", "td", "tbody", "p", "details", "summary", "pre"}
    tags = [tag for tag, _ in page.elements if tag not in new]
    assert tags == [tag for tag, _ in plain.elements if tag not in new]
    assert page.data["layers"]["name"][0].isprintable()
    if name.isprintable():
        assert page.data["layers"]["name"][0] == name
        assert page.seen.count(name) >= 4
    own = "\n\N{EN SPACE}"  # of the template
    assert all(char.isprintable() or char in own for text in page.seen for char in text)


def test_each_part_is_there_only_where_its_data_are(content: Callable[..., Content], library: Any) -> None:
    page = read(content(layers_of({"a": 3}), how_to_measure="bncli report a --measure"), library)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert ids == {"verdict", "findings", "layers", "try", "sources", "data"}
    assert "bncli report a --measure" in page.text
    assert {name for name, value in page.data.items() if value is None} == {
        "training", "history", "comparison", "sweep", "gap", "channel",
    }  # fmt: skip


def test_findings_have_their_layer_their_channels_and_what_to_do(
    content: Callable[..., Content], library: Any
) -> None:
    made = content(layers_of({"a": 4, "b": 4}, running_var=[1.0, torch.nan, 1.0, torch.inf]))
    page = read(made, library)
    (finding,) = made.findings
    assert page.data["findings"] == [
        [{"layer": 0, "channels": [1, 3], "message": finding.message, "advice": finding.advice}]
    ]
    assert finding.advice in page.text
    assert "Needs repair" in page.text


def test_numbers_are_those_of_the_layers(content: Callable[..., Content], library: Any) -> None:
    layers = layers_of({"a": 3, "b": 5})
    data = read(content(layers), library).data
    values = b"".join(base64.b64decode(data["channels"]["running_var"]) for _ in range(1))
    found = torch.frombuffer(bytearray(values), dtype=torch.float32)
    assert torch.equal(found, torch.cat([layer.running_var for layer in layers]))
    assert data["layers"]["running_var_max"] == [
        pytest.approx(float(layer.running_var.max()), rel=1e-3) for layer in layers
    ]


def test_the_drawing_library_is_one_script_that_fetches_nothing_else() -> None:
    library = DrawingLibrary()
    script = library.script()
    assert 500_000 < len(script) < 1_200_000
    assert "vegaEmbed" in script
    assert not re.search(r"</script", script, flags=re.IGNORECASE)
    assert not re.search(r"^\s*(import|export)\b[^(]", script, flags=re.MULTILINE)


def test_without_its_package_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from bncli.errors import BncliError

    monkeypatch.setattr("bncli.report.library.find_spec", lambda name: None)
    with pytest.raises(BncliError, match=r'pip install "bncli\[report\]"'):
        DrawingLibrary()
