"""Packages that a test pretends are not installed."""

import importlib.util

import pytest


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let `importlib.util.find_spec` find none of them."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in names else find(name))
