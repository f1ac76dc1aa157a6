from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError

from tierkv import ConfigError
from tierkv import config as config_module
from tierkv.config import Config, load_config, ram_bytes, read_config
from tierkv.config_yaml import ConfigFileError
from tierkv.core.geometry import GIB, KIB, MIB, PageTargets

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "configs" / "reference.yaml"

#: A problem line, as a person and an editor read it.
LINE = re.compile(r"^.+?:[1-9]\d*:[1-9]\d*: .+$")


def write(folder: Path, text: str | bytes, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path) -> ConfigFileError:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    error = caught.value
    assert isinstance(error, ConfigFileError)
    for line in str(error).splitlines():
        assert LINE.match(line), line
    assert error.report()
    return error


def leaves(section: BaseModel, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    found: dict[tuple[str, ...], object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= leaves(value, (*prefix, name))
        elif isinstance(value, dict):
            for key, item in value.items():
                found |= leaves(item, (*prefix, name, key))
        else:
            found[(*prefix, name)] = value
    return found


# --- what is accepted


def test_the_defaults_are_the_contract() -> None:
    config = Config()
    assert config.block_tokens == 16
    assert (config.pages.hot, config.pages.warm, config.pages.cold) == (16 * KIB, 2 * MIB, 64 * MIB)
    assert (config.tiers.device.capacity, config.tiers.device.device) == (0, "auto")
    assert (config.tiers.host.capacity, config.tiers.host.hugepages) == (4 * GIB, "auto")
    assert (config.tiers.host.numa, config.tiers.host.prefault_threads) == ("auto", 0)
    cold = config.tiers.cold
    assert (cold.capacity, cold.engine, cold.segment_cold_pages) == (0, "auto", 16)
    assert (cold.threads, cold.piece, cold.sync, cold.policy) == (8, 8 * MIB, "flush", "lru")
    assert cold.directory == Path.home() / ".cache/tierkv/cold"
    transfer = config.transfer
    assert (transfer.inflight_max, transfer.demand_deadline_ms) == (256 * MIB, 10_000)
    assert (transfer.put_deadline_ms, transfer.flush_deadline_ms) == (10_000, 60_000)
    assert config.event_log is None
    default = config.namespaces["default"]
    assert (default.salt, default.host_quota, default.ttl_s) == ("", 4 * GIB, None)
    assert config.pages.targets == PageTargets()


def test_the_reference_file_holds_every_setting_at_its_default() -> None:
    loaded = read_config(REFERENCE)
    #: The only value that is not the default: the file says so at its head.
    shown = {
        ("tiers", "cold", "capacity"): 64 * GIB,
        ("namespaces", "default", "cold_quota"): 64 * GIB,
    }
    expected = leaves(Config()) | shown
    assert leaves(loaded.value) == expected
    assert set(loaded.sources) == set(expected), "a setting is missing from the file"


def test_every_file_in_configs_loads() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(path)


def test_every_setting_has_a_description_for_editors() -> None:
    schema = Config.model_json_schema()
    for name, section in schema["$defs"].items():
        for key, field in section["properties"].items():
            assert "description" in field or "$ref" in field, (name, key)


def test_an_empty_mapping_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "{}")) == Config()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("64KiB", 64 * KIB),
        ("64 MiB", 64 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("'1 TiB'", 1 << 40),
        ("64GB", 64 * 10**9),
        ("64 kB", 64_000),
        ("65536B", 65536),
        ("0.1GiB", GIB // 10),
        ("0", 0),
        ("0GiB", 0),
    ],
)
def test_sizes_are_read_as_written(tmp_path: Path, text: str, size: int) -> None:
    config = load_config(write(tmp_path, f"tiers: {{host: {{capacity: {text}}}}}"))
    assert config.tiers.host.capacity == size


def test_percentages_are_resolved_when_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "ram_bytes", lambda: 100 * GIB)
    usage = SimpleNamespace(total=1000 * GIB)
    monkeypatch.setattr(config_module.shutil, "disk_usage", lambda _path: usage)
    text = f"""
tiers:
  device: {{device: cpu, capacity: 2.5%}}
  host: {{capacity: 80%}}
  cold: {{directory: {tmp_path}/not/yet/there, capacity: 50 %}}
namespaces:
  a: {{host_quota: 25%, cold_quota: 10GiB}}
  b: {{host_quota: 900GiB}}
"""
    config = load_config(write(tmp_path, text))
    assert config.tiers.device.capacity == 5 * GIB // 2
    assert config.tiers.host.capacity == 80 * GIB
    assert config.tiers.cold.capacity == 500 * GIB
    assert config.namespaces["a"].host_quota == 20 * GIB
    assert config.namespaces["a"].cold_quota == 10 * GIB
    assert config.namespaces["b"].host_quota == 80 * GIB, "no quota is more than its tier"
    assert config.namespaces["default"].cold_quota == 500 * GIB


def test_ram_is_never_more_than_the_machine_has() -> None:
    assert 0 < ram_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_relative_paths_start_at_the_files_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    text = "tiers: {cold: {directory: ../cold}}\nevent_log: log/events"
    (tmp_path / "conf").mkdir()
    config = load_config(write(tmp_path / "conf", text))
    assert config.tiers.cold.directory == tmp_path / "cold"
    assert config.event_log == tmp_path / "conf" / "log" / "events"


def test_python_takes_the_same_spellings_and_refuses_the_same_mistakes() -> None:
    config = Config.model_validate({"tiers": {"host": {"capacity": "2GiB"}}})
    assert config.tiers.host.capacity == 2 * GIB
    with pytest.raises(ValidationError):
        Config.model_validate({"tiers": {"host": {"capacity": "2G"}}})
    with pytest.raises(ValidationError):
        config.block_tokens = 8


def test_no_and_off_are_text_as_yaml_1_2_says(tmp_path: Path) -> None:
    text = "tiers: {host: {hugepages: off, numa: off, register_cuda: off}}\nnamespaces: {no: {}}"
    config = load_config(write(tmp_path, text))
    assert (config.tiers.host.hugepages, config.tiers.host.numa) == ("off", "off")
    assert "no" in config.namespaces


def test_a_byte_order_mark_and_crlf_lines_are_read(tmp_path: Path) -> None:
    data = "\ufeffblock_tokens: 32\r\npages:\r\n  hot: 32KiB\r\n".encode()
    assert load_config(write(tmp_path, data)).pages.hot == 32 * KIB


def test_sources_name_the_line_and_the_spelling(tmp_path: Path) -> None:
    loaded = read_config(write(tmp_path, "# comment\npages:\n  warm: 4 MiB\n"))
    source = loaded.sources["pages", "warm"]
    assert (source.line, source.text) == (3, "4 MiB")
