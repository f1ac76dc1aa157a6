from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from tierkv import ConfigError
from tierkv.core import registry as registry_module
from tierkv.core.keys import KeyChain
from tierkv.core.registry import Registry
from tierkv.core.stats import Stats
from tierkv.plan.policies import POLICIES
from tierkv.tiers.files import FILE_ENGINES

KINDS = Registry(
    "kinds", {"chain": "tierkv.core.keys:KeyChain", "odd": "tierkv.core.keys:KEY_BYTES"}
)


def test_a_name_loads_its_class() -> None:
    assert KINDS.load("chain") is KeyChain
    assert KINDS.names() == ["chain", "odd"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chian", "kinds: unknown name 'chian'; did you mean 'chain'?"),
        ("zzz", "known: chain, odd"),
        ("odd", "is not a class"),
        ("", "known: chain, odd"),
    ],
)
def test_a_wrong_name_is_a_config_error_with_the_cure(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KINDS.load(name)
    assert message in str(caught.value)


def test_another_package_adds_a_kind_but_cannot_replace_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [
        EntryPoint("stats", "tierkv.core.stats:Stats", "tierkv.kinds"),
        EntryPoint("chain", "tierkv.core.stats:Stats", "tierkv.kinds"),
    ]

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [p for p in points if p.group == group and name in (None, p.name)]

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    assert KINDS.names() == ["chain", "odd", "stats"]
    assert KINDS.load("stats") is Stats
    assert KINDS.load("chain") is KeyChain


@pytest.mark.parametrize("family", [POLICIES, FILE_ENGINES], ids=["policies", "files"])
def test_every_registered_name_loads(family: Registry) -> None:
    for name in family:
        assert isinstance(family.load(name), type)
