"""Whatever a configuration file holds: it loads, or is refused with its place and a reason."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tierkv import cli, config_text, config_yaml
from tierkv.config import TTL_S_MAX, Config, load_config
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import Layout
from tierkv.memory import Rows
from tierkv.plan.event_log import replay
from tierkv.store import Match, Store
from tierkv.testing.drills import bad_configs, configs
from tierkv.testing.drills.base import BROKEN, LEAKED, WRONG_BYTES, Wrong, case_random
from tierkv.testing.drills.config_changes import changed

#: Changed files after the catalogue; `make reliability` does many times as many.
CHANGED = 1_000


@pytest.mark.usefixtures("quiet")
def test_every_bad_configuration_is_refused_with_its_place_or_works() -> None:
    tally = configs.run(len(bad_configs.catalogue()) + CHANGED, seed=1)

    assert tally.holds, tally.wrong


def test_the_catalogue_has_every_setting_with_every_kind_of_mistake() -> None:
    names = [bad.name for bad in bad_configs.catalogue()]

    assert len(names) >= 300
    assert len(set(names)) == len(names)
    for path in bad_configs.settings():
        mine = [name for name in names if name.startswith(".".join(path))]
        assert len(mine) >= 25, path
    assert sum(bad.words is None for bad in bad_configs.catalogue()) >= 50


@pytest.mark.parametrize("part", range(4))
def test_the_command_ends_with_2_for_every_bad_file_and_shows_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: int,
) -> None:
    for number, bad in list(enumerate(bad_configs.catalogue()))[part::20]:
        path = tmp_path / str(number) / "c.yaml"
        path.parent.mkdir()
        bad.put(path)
        monkeypatch.setattr(sys, "argv", ["tierkv", "config", "check", str(path)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        assert code == (0 if bad.words is None else 2), (bad.name, out, err)
        assert "Traceback" not in out + err, bad.name
        assert (out if code == 0 else err).startswith(f"{path}:"), bad.name


def test_the_real_command_is_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(bad_configs.SMALL)
    (tmp_path / "bad.yaml").write_text("blok: 1")
    configs.run_command(tmp_path / "good.yaml", is_good=True)
    configs.run_command(tmp_path / "bad.yaml", is_good=False)
    with pytest.raises(Wrong, match=r"\['check'\]: 2"):
        configs.run_command(tmp_path / "bad.yaml", is_good=True)


# ---- mistakes that are planted are found


def _raises(*_arguments: object) -> str:
    raise KeyError("oops")


def _makes(path: Path) -> Config:
    (path.parent / "made").mkdir()
    return Config()


def _runs(_path: Path) -> Config:
    subprocess.run(["true"], check=True)
    return Config()


def _takes(path: Path) -> Config:
    held = bytearray(100 << 20)
    return load_config(path) if held else Config()


def _sleeps(path: Path) -> Config:
    time.sleep(3)
    return load_config(path)


@pytest.mark.parametrize(
    ("where", "name", "planted", "words"),
    [
        (config_yaml, "_unknown_key", _raises, "KeyError"),
        (config_yaml, "_unknown_key", lambda *_: "unknown key\nno", "without place or reason"),
        (config_yaml, "_excerpt", lambda line, _place: f"\x1b{line}", "not for people"),
        (configs, "load_config", _makes, "os.mkdir"),
        (configs, "load_config", _runs, "subprocess.Popen"),
        (configs, "load_config", _takes, "MiB of memory"),
        (configs, "load_config", _sleeps, "it hung"),
    ],
)
def test_the_drill_finds_a_loader_that_does_what_it_must_not(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, planted: object, words: str
) -> None:
    bad = next(one for one in bad_configs.catalogue() if one.words == "unknown key")
    monkeypatch.setattr(configs, "catalogue", lambda: [bad])
    monkeypatch.setattr(configs, "MEMORY_BYTES_MAX", 64 << 20)
    monkeypatch.setattr(configs, "LIMIT_S", 1.5)
    assert configs.run(1, seed=1).holds
    monkeypatch.setattr(where, name, planted)

    tally = configs.run(1, seed=1)

    assert words in str(tally.wrong.get(BROKEN)), tally.wrong
    with pytest.raises(Wrong, match=words):
        configs.replay(1, 0)


def test_the_drill_finds_a_mistake_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    good = bad_configs.Bad("small", lambda path: path.write_text(bad_configs.SMALL), "unknown")
    monkeypatch.setattr(configs, "catalogue", lambda: [good])

    assert "it was accepted" in str(configs.run(1, seed=1).wrong[BROKEN])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A catalogue of one configuration, which is good."""
    good = bad_configs.Bad("small", lambda path: path.write_text(bad_configs.SMALL), None)
    monkeypatch.setattr(configs, "catalogue", lambda: [good])
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("small")
def test_the_drill_finds_a_store_that_fails_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.run(1, seed=1).holds

    def refuses(*_arguments: object, **_named: object) -> Store:
        raise OSError(5, "oops")

    monkeypatch.setattr(Store, "open", refuses)
    assert "oops" in str(configs.run(1, seed=1).wrong[BROKEN])


@pytest.mark.usefixtures("small")
def test_the_drill_finds_a_store_that_gives_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.get

    def other(self: Store, match: Match, out: Rows) -> int:
        count = real(self, match, out)
        np.asarray(out)[:, :count] ^= 1
        return count

    monkeypatch.setattr(Store, "get", other)
    assert configs.run(1, seed=1).wrong[WRONG_BYTES]


def _kept(left: list[Store]) -> Callable[[Store], None]:
    def close(store: Store) -> None:
        left.append(store)

    return close


@pytest.mark.usefixtures("small")
def test_the_drill_finds_threads_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Store] = []
    real = Store.close
    monkeypatch.setattr(Store, "close", _kept(left))

    wrong = configs.run(1, seed=1).wrong
    for store in left:
        real(store)

    assert wrong[LEAKED]


def test_a_changed_file_is_the_same_again_by_its_seed_and_number() -> None:
    def text(case: int) -> bytes:
        return changed(bad_configs.SMALL, case_random(configs.NAME, 7, case))[0]

    assert [text(case) for case in range(50)] == [text(case) for case in range(50)]
    assert len({text(case) for case in range(50)}) > 45


# ---- what the drill found


def opened(text: str, tmp_path: Path) -> Store:
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(tmp_path / "c.yaml")
    geometry = configs._GEOMETRY
    layout = Layout(geometry, targets=config.pages.targets, block_tokens=config.block_tokens)
    return Store.open(config, layout)


def small_with(key: str, value: str) -> str:
    return bad_configs.absurd(f"{key}: {value}")


@pytest.mark.parametrize("place", ["file/log", "loop", ".", "pipe", "open", "/dev/full"])
def test_an_event_log_that_cannot_be_is_a_config_error_and_leaves_nothing_open(
    tmp_path: Path, place: str
) -> None:
    bad_configs.furnish(tmp_path)
    for _ in range(2):  # the second finds the directory unlocked
        with pytest.raises(ConfigError, match=r"event_log: .*; cure: another file, or null"):
            opened(small_with("event_log", place), tmp_path)
    opened(bad_configs.SMALL, tmp_path).close()


def test_an_event_log_on_a_full_disk_ends_and_the_store_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(small_with("event_log", "log"), tmp_path)
    (tmp_path / "log").unlink()
    (tmp_path / "log").symlink_to("/dev/full")
    configs._serve(store, store.config)
    store.close()

    assert "event log ends here" in caplog.text
    opened(bad_configs.SMALL, tmp_path).close()


def test_an_event_log_replays_after_another_was_there(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 100_000)
    store = opened(small_with("event_log", "log"), tmp_path)
    configs._serve(store, store.config)
    store.close()

    assert replay((tmp_path / "log").read_bytes().splitlines()).different == []


@pytest.mark.parametrize("tier", ["host", "cold"])
def test_more_pages_than_can_be_kept_track_of_are_refused(tmp_path: Path, tier: str) -> None:
    with pytest.raises(ConfigError, match=rf"tiers\.{tier}\.capacity: .* raise pages\.warm"):
        opened(small_with(f"tiers.{tier}.capacity", "9000TiB"), tmp_path)


def test_a_time_to_live_beyond_a_life_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("namespaces: {a: {ttl_s: 1e300}}")
    with pytest.raises(ConfigError, match=r"ttl_s: must be at most 1000000000"):
        load_config(tmp_path / "c.yaml")
    opened(small_with("namespaces.a.ttl_s", f"{TTL_S_MAX:.0f}"), tmp_path).close()


def test_a_directory_below_many_is_made(tmp_path: Path) -> None:
    deep = "d/" * 1200 + "d"
    store = opened(small_with("tiers.cold.directory", deep), tmp_path)
    configs._serve(store, store.config)
    store.close()
    # Shallower again, for whoever removes the test's directory by recursion.
    for part in ("d/" * 800, "d/" * 400):
        (tmp_path / part.rstrip("/")).rename(tmp_path / f"moved-{len(part)}")


def test_the_number_of_keys_and_values_is_bounded() -> None:
    tenants = "".join(
        f"  t{n}:\n    salt: s\n    host_quota: 1%\n    cold_quota: 1%\n    ttl_s: 1\n"
        for n in range(1024)
    )
    assert config_text.read_document(f"namespaces:\n{tenants}").problems == []
    many = config_text.read_document("a: [" + "1," * config_text.EVENTS_MAX + "]")
    assert "keys and values" in many.problems[0].message
    assert many.root is None


def test_a_tag_without_end_is_refused_before_the_parser_sees_it() -> None:
    begun = time.process_time()
    document = config_text.read_document("a: 1\nb: " + "!" * 900_000)

    assert document.problems[0].place == (2, 4)
    assert "tags are not accepted" in document.problems[0].message
    assert time.process_time() - begun < 60, "by the square of its length it would be minutes"
