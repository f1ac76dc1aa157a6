"""Protected stores: configuration, keys that are gone, check and drill, and all that can fail."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tests.cold_directories import (
    GEOMETRY,
    NAMESPACES,
    config_of,
    flip_page,
    run_command,
    slot_of,
    tokens_of,
)
from tierkv.config import Config, load_config
from tierkv.core.errors import ConfigError, TierFailed
from tierkv.core.geometry import Layout
from tierkv.store import Store
from tierkv.testing.drills import Tally, crashes, flips, flips_site, life, nth_fault
from tierkv.testing.tiers import FINGERPRINT, PLAN
from tierkv.tiers.files.base import FileEngine
from tierkv.tiers.seals import SEALS, aes_gcm
from tierkv.tiers.seals.base import Seal
from tierkv.tiers.seals.key_file import make_key, read_key
from tierkv.tiers.segments import SegmentTier
from tierkv.upkeep import DrillKind
from tierkv.upkeep.drill import run_drill
from tierkv.upkeep.report import LayoutReport, examine

KEY = bytes(range(32))
BLOCKS = 40
PROTECTIONS = ["hmac", "aes-256-gcm"]

protections = pytest.mark.parametrize("protection", PROTECTIONS)

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY.hex(), encoding="ascii")
    path.chmod(0o600)
    return path


def opened(directory: Path, protection: str, key: Path | None) -> Store:
    said = config_of(directory).model_dump()
    said["tiers"]["cold"] |= {"protection": protection, "key_file": key}
    config = Config.model_validate(said)
    return Store.open(config, Layout(GEOMETRY, targets=config.pages.targets, model="m"))


def data_of(store: Store, seed: int) -> np.ndarray:
    shape = (store.plan.layers, BLOCKS, store.plan.block_layer_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def filled(directory: Path, protection: str, key: Path) -> Path:
    """The folder of a store with a prompt in each namespace, closed cleanly."""
    with opened(directory, protection, key) as store:
        for seed, name in enumerate(NAMESPACES):
            put = store.put(tokens_of(BLOCKS, seed), data_of(store, seed), namespace=name)
            assert put == BLOCKS
        assert store.flush()
    (folder,) = directory.iterdir()
    return folder


def blocks_found(store: Store) -> int:
    """Blocks of both prompts that are given; other bytes than were put fail here."""
    count = 0
    for seed, name in enumerate(NAMESPACES):
        expected = data_of(store, seed)
        out = np.zeros_like(expected)
        got = store.get(store.match(tokens_of(BLOCKS, seed), namespace=name), out)
        assert np.array_equal(out[:, :got], expected[:, :got])
        count += got
    return count


def digests(directory: Path) -> dict[str, str]:
    """Every file beneath but locks, whose text is the last opener's."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "lock"
    }


# ---- a store


@protections
def test_a_protected_store_finds_what_it_held(protection: str, tmp_path: Path, key: Path) -> None:
    filled(tmp_path / "cold", protection, key)
    with opened(tmp_path / "cold", protection, key) as store:
        assert blocks_found(store) == 2 * BLOCKS
        store.check()


@protections
def test_without_its_key_file_a_directory_is_refused_and_not_changed(
    protection: str, tmp_path: Path, key: Path
) -> None:
    cold = tmp_path / "cold"
    filled(cold, protection, key)
    before = digests(cold)
    key.unlink()
    with pytest.raises(ConfigError, match=r"key: No such file or directory; cure: make one with"):
        opened(cold, protection, key)
    make_key(key)
    with pytest.raises(TierFailed, match="was not made with this key"):
        opened(cold, protection, key)
    with pytest.raises(TierFailed, match=f"protected by {protection}, and .* is none; cure: "):
        opened(cold, "none", None)
    assert digests(cold) == before
    key.write_text(KEY.hex(), encoding="ascii")
    with opened(cold, protection, key) as store:
        assert blocks_found(store) == 2 * BLOCKS


@protections
def test_a_key_is_read_before_anything_is_made_on_the_disk(
    protection: str, tmp_path: Path, key: Path
) -> None:
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        opened(tmp_path / "cold", protection, key)
    assert not (tmp_path / "cold").exists()


@pytest.mark.parametrize(
    ("cold", "message"),
    [
        ("{protection: hmac}", "protection: hmac needs one; make it with: tierkv keygen FILE"),
        ("{key_file: k}", "a key protects nothing with protection: none; set hmac or aes-256-gcm"),
        ("{protection: none, key_file: k}", "protects nothing"),
        ("{protection: aes}", "unknown name 'aes'; known: none, hmac, aes-256-gcm"),
        ("{protection: hmack, key_file: k}", "did you mean 'hmac'?"),
        ("{protection: hmac, key_file: ''}", "must be a path"),
    ],
)
def test_a_mistaken_protection_is_told_with_its_line(
    cold: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"tiers:\n  cold: {cold}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert ":2:" in str(caught.value)


def test_without_the_library_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ConfigError, match=r"cure: pip install 'tierkv-offload\[crypto\]'"):
        opened(tmp_path / "cold", "aes-256-gcm", key)
    opened(tmp_path / "cold", "hmac", key).close()


def test_keygen_makes_a_key_for_nobody_else_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made"
    assert run_command("keygen", path) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    first = read_key(path)
    assert len(set(first)) > 8
    assert run_command("keygen", path) == 2
    assert "something is there" in capsys.readouterr().err
    assert read_key(path) == first
    assert run_command("keygen", tmp_path / "none" / "key") == 2
    make_key(tmp_path / "second")
    assert read_key(tmp_path / "second") != first


# ---- check, scrub, drill


def flawed(cold: Path, key: Path | None = None) -> tuple[LayoutReport, set[int | None]]:
    (report,) = examine(cold, deep=True, key_file=key)
    return report, {flaw.page for flaw in report.damage}


def forge(folder: Path, page: int) -> None:
    """Change a byte of a payload, and make both checksums right."""
    path, at = slot_of(folder, page)
    data = bytearray(path.read_bytes())
    header = slice(at, at + 4096)
    data[at + 4096 + 99] ^= 1
    head, payload = data[header], bytes(data[at + 4096 : at + 4096 + 32768])
    head[4064:4080] = xxhash.xxh3_128_digest(payload, xxhash.xxh3_64_intdigest(head[:4064]))
    head[4080:4096] = xxhash.xxh3_128_digest(bytes(head[:4080]))
    data[header] = head
    path.write_bytes(data)


@protections
def test_faults_are_found_without_the_key_and_forgeries_with_it(
    protection: str, tmp_path: Path, key: Path
) -> None:
    cold = tmp_path / "cold"
    folder = filled(cold, protection, key)
    assert [flawed(cold, k)[1] for k in (None, key)] == [set(), set()]
    before = digests(cold)
    flip_page(folder, 2, 4096 + 5)
    flip_page(folder, 4, 100)
    forge(folder, 6)
    damaged = digests(cold)
    assert damaged != before
    blind, without = flawed(cold)
    seeing, found = flawed(cold, key)
    assert (without, blind.has_key) == ({2, 4}, False)
    assert (found, seeing.has_key) == ({2, 4, 6}, True)
    assert blind.pages_kept == seeing.pages_kept == blind.pages - blind.pages_free - 1
    assert digests(cold) == damaged


@protections
def test_check_and_scrub_say_what_they_could_not_verify(
    protection: str,
    tmp_path: Path,
    key: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    cold = tmp_path / "cold"
    folder = filled(cold, protection, key)
    for command in (("check", cold, "--deep"), ("scrub", cold, "--once", "--rate", "9GB/s")):
        assert run_command(*command) == 0
        out = capsys.readouterr().out
        assert f"{protection}, looked at without the key: checksums find faults" in out
        assert "checksums of headers and payloads verify, not tags" in out
        assert run_command(*command, "--key-file", key) == 0
        out = capsys.readouterr().out
        assert f"{protection}, tags verified with the key" in out
        assert "ok: headers and payloads verify" in out
    forge(folder, 3)
    assert run_command("check", cold, "--deep") == 0
    assert run_command("check", cold, "--deep", "--key-file", key, "--json", tmp_path / "r") == 1
    assert run_command("scrub", cold, "--once", "--key-file", key) == 1
    (said,) = json.loads((tmp_path / "r").read_text(encoding="utf-8"))["layouts"]
    assert (said["protection"], said["key_used"]) == (protection, True)


@protections
def test_another_key_is_refused_by_check_and_changes_nothing(
    protection: str, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cold = tmp_path / "cold"
    filled(cold, protection, key)
    before = digests(cold)
    make_key(tmp_path / "other")
    for command in ("check", "scrub"):
        assert run_command(command, cold, "--key-file", tmp_path / "other") == 2
        assert "was not made with this key" in capsys.readouterr().err
    assert run_command("drill", "corrupt", cold, "--key-file", tmp_path / "other") == 2
    assert digests(cold) == before


@protections
def test_a_lost_segment_header_costs_its_segment_and_check_says_so(
    protection: str, tmp_path: Path, key: Path
) -> None:
    cold = tmp_path / "cold"
    folder = filled(cold, protection, key)
    path, _ = slot_of(folder, 0)
    path.write_bytes(bytes(4096) + path.read_bytes()[4096:])
    for chosen in (None, key):
        report, damaged = flawed(cold, chosen)
        assert damaged >= set(range(8))
        assert report.pages_dropped == 8


def test_a_key_for_a_directory_without_protection_is_only_noted(tmp_path: Path, key: Path) -> None:
    with opened(tmp_path / "cold", "none", None) as store:
        store.put(tokens_of(BLOCKS, 0), data_of(store, 0))
    report, damaged = flawed(tmp_path / "cold", key)
    assert not damaged
    assert ["it is not protected" in flaw.what for flaw in report.flaws] == [True]


@protections
@pytest.mark.parametrize("kind", list(DrillKind))
def test_drills_hold_on_a_protected_directory_and_need_its_key(
    protection: str, kind: DrillKind, tmp_path: Path, key: Path
) -> None:
    cold = tmp_path / "cold"
    filled(cold, protection, key)
    (outcome,) = run_drill(cold, kind, seed=3, count=5, key_file=key)
    assert outcome.held, outcome
    assert outcome.pages >= 16
    with pytest.raises(ConfigError, match=r"without its key; cure: --key-file"):
        run_drill(cold, kind, seed=3)


def test_a_drill_finds_a_seal_that_verifies_nothing(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "cold", "aes-256-gcm", key)
    real = aes_gcm.AesGcmSeal.open

    def careless(
        self: Seal, key: bytes, said: object, nonce: bytes, tag: bytes, page: object
    ) -> bool:
        kept = bytes(page)
        if not real(self, key, said, nonce, tag, page):
            page[:] = kept
        return True

    monkeypatch.setattr(aes_gcm.AesGcmSeal, "open", careless)
    (outcome,) = run_drill(tmp_path / "cold", DrillKind.CORRUPT, seed=1, count=12, key_file=key)
    assert outcome.wrong
    assert not outcome.held


# ---- the drills of reliability, on protected tiers


@pytest.fixture(params=PROTECTIONS)
def sealed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, key: Path
) -> Iterator[list[str]]:
    """Every drill's tiers and stores are protected; what they kept of other runs is forgotten.

    Gives the protections of the tiers that the drills of lives have made.
    """
    seal = SEALS.load(request.param)(KEY)
    made: list[str] = []

    def tier_on(files: FileEngine) -> SegmentTier:
        sizes = {"pages_max": life.PAGES, "segment_cold_pages": 2}
        tier = SegmentTier(files, PLAN, FINGERPRINT, **sizes, seal=seal)
        made.append(tier._directory.shape.protection)
        return tier

    said = flips.CONFIG.model_dump()
    said["tiers"]["cold"] |= {"protection": request.param, "key_file": key}
    caches: list[Callable[[], None]] = [
        flips_site.images.cache_clear,
        flips.systematic.cache_clear,
    ]
    monkeypatch.setattr(life, "tier_on", tier_on)
    monkeypatch.setattr(crashes, "_moment", None)
    for module in (flips, flips_site):
        monkeypatch.setattr(module, "CONFIG", Config.model_validate(said))
    monkeypatch.setattr(flips_site, "SegmentTier", partial(SegmentTier, seal=seal))
    for clear in caches:
        clear()
    yield made
    for clear in caches:
        clear()
    crashes._moment = None


def expect_nothing_wrong(tally: Tally) -> None:
    assert tally.holds, "\n".join(line for lines in tally.wrong.values() for line in lines[:20])


def test_a_crash_at_any_call_of_a_protected_tier_costs_no_durable_page(
    sealed: list[str],
) -> None:
    expect_nothing_wrong(crashes.run(6_000, seed=1))
    assert len(sealed) > 6_000
    assert "none" not in sealed


def test_a_fault_at_any_call_of_a_protected_tier_costs_no_durable_page(
    sealed: list[str],
) -> None:
    expect_nothing_wrong(nth_fault.run(3_000, seed=1))
    assert len(sealed) > 3_000
    assert "none" not in sealed


@pytest.mark.usefixtures("sealed")
def test_damage_of_a_protected_tier_costs_what_it_touches() -> None:
    assert b'"format":2' in flips_site.images()[0].files["manifest"]
    expect_nothing_wrong(flips.run(4_000, seed=1))
