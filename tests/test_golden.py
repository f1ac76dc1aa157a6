"""Cold directories that earlier versions left, read by today's code; and formats it must refuse.

How they were made is in `tests/golden/make.py`. They hold formats 1 and 2 still: what is durable in
them must be found for ever, byte for byte, or the format's number must change.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.golden.make import FORMATS, Prompt, Variant, config_of, layout_of, made, write_key
from tierkv.core.errors import TierFailed
from tierkv.core.geometry import KVGeometry
from tierkv.store import Store

GOLDEN = Path(__file__).parent / "golden"
INDEX: dict[str, Any] = {
    name: said | {"format": number}
    for number in FORMATS
    for name, said in json.loads((GOLDEN / f"format_{number}.json").read_text("utf-8")).items()
}
NAMES = sorted(INDEX)
PROTECTED = [name for name in NAMES if "protection" in INDEX[name]]
BYTES_MAX = 200 << 10

pytestmark = pytest.mark.usefixtures("quiet")


def extracted(name: str, directory: Path) -> Path:
    """Unpack a golden directory where a store with `directory` looks for it."""
    root = directory / INDEX[name]["fingerprint"][:16]
    root.mkdir(mode=0o700, parents=True)
    with tarfile.open(GOLDEN / f"format_{INDEX[name]['format']}_{name}.tar.gz") as tar:
        tar.extractall(root, filter="data")
    return root


def opened(name: str, directory: Path, *, protection: str | None = None) -> Store:
    """The store of a golden directory, or one with another protection."""
    said = INDEX[name]
    chosen = said.get("protection", "none") if protection is None else protection
    config = config_of(
        directory,
        said["salts"],
        host=said["host"],
        cold=said["cold"],
        protection=chosen,
        key_file=None if chosen == "none" else write_key(directory),
    )
    return Store.open(config, layout_of(KVGeometry(**said["geometry"]), config))


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file but the lock, whose text is the last opener's."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.iterdir()
        if path.name != "lock"
    }


def expect_prompts(name: str, store: Store) -> None:
    """Every durable prompt is found whole; of the others what is found is right."""
    for kind in ("durable", "others"):
        for said in INDEX[name][kind]:
            prompt = Prompt(**said)
            match = store.match(prompt.tokens, namespace=prompt.namespace)
            plan = store.plan
            out = np.zeros((plan.layers, match.blocks, plan.block_layer_bytes), np.uint8)
            got = store.get(match, out)
            expected = prompt.data(plan.layers, plan.block_layer_bytes)

            assert got == match.blocks
            assert kind == "others" or got == prompt.blocks, prompt
            assert np.array_equal(out, expected[:, :got]), prompt


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_the_ones_that_were_recorded(name: str, tmp_path: Path) -> None:
    assert digests(extracted(name, tmp_path)) == INDEX[name]["files"]


@pytest.mark.parametrize("name", NAMES)
def test_every_durable_prompt_is_found_byte_for_byte(name: str, tmp_path: Path) -> None:
    extracted(name, tmp_path)
    assert INDEX[name]["durable"]
    with opened(name, tmp_path) as store:
        expect_prompts(name, store)
        store.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_directory_goes_on_being_used(name: str, tmp_path: Path) -> None:
    extracted(name, tmp_path)
    new = Prompt(99, 7)
    with opened(name, tmp_path) as store:
        data = new.data(store.plan.layers, store.plan.block_layer_bytes)
        assert store.put(new.tokens, data) == 7
    with opened(name, tmp_path) as store:
        out = np.zeros_like(data)
        assert store.get(store.match(new.tokens), out) == 7
        assert np.array_equal(out, data)
        if name != "rewritten":  # it is full, so what is new takes the place of something
            expect_prompts(name, store)


def test_a_tenant_finds_nothing_in_anothers_name(tmp_path: Path) -> None:
    extracted("tenants", tmp_path)
    prompts = [Prompt(**said) for said in INDEX["tenants"]["durable"]]
    with opened("tenants", tmp_path) as store:
        for prompt in prompts:
            for other in {one.namespace for one in prompts} - {prompt.namespace}:
                assert store.match(prompt.tokens, namespace=other).blocks == 0


def test_a_changed_salt_finds_nothing(tmp_path: Path) -> None:
    extracted("tenants", tmp_path)
    said = INDEX["tenants"]
    salts = {name: salt + "!" for name, salt in said["salts"].items()}
    config = config_of(tmp_path, salts, host=said["host"], cold=said["cold"])
    with Store.open(config, layout_of(KVGeometry(**said["geometry"]), config)) as store:
        for prompt in (Prompt(**one) for one in said["durable"]):
            expected = prompt.blocks if prompt.namespace == "default" else 0
            assert store.match(prompt.tokens, namespace=prompt.namespace).blocks == expected


def test_the_crashed_directory_is_marked_unclean_and_its_torn_page_is_no_hit(
    tmp_path: Path,
) -> None:
    root = extracted("crashed", tmp_path)
    assert b'"clean":false' in (root / "manifest").read_bytes()
    torn = Prompt(**INDEX["crashed"]["others"][0])
    with opened("crashed", tmp_path) as store:
        assert store.match(torn.tokens).blocks == 16
        assert torn.blocks > 16
        expect_prompts("crashed", store)


def test_golden_files_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.glob("format_*")) < BYTES_MAX


@pytest.mark.parametrize(
    "variant",
    [variant for variants in FORMATS.values() for variant in variants],
    ids=lambda variant: variant.name,
)
def test_the_script_still_tells_what_its_files_hold(variant: Variant) -> None:
    """Not their bytes: which of two pages is written first is for the threads to say."""
    files, said = made(variant)
    kept = INDEX[variant.name]

    assert files
    for what in ("fingerprint", "geometry", "salts"):
        assert said[what] == kept[what]


@pytest.mark.parametrize("name", PROTECTED)
def test_a_protected_directory_is_refused_without_its_protection(name: str, tmp_path: Path) -> None:
    root = extracted(name, tmp_path)
    before = digests(root)
    for other in {"none", "hmac", "aes-256-gcm"} - {INDEX[name]["protection"]}:
        with pytest.raises(TierFailed, match=f"protected by .*protection is {other}; cure: "):
            opened(name, tmp_path, protection=other).close()
    assert digests(root) == before


# ---- formats of later versions, with checksums that are right


def newer_manifest(root: Path) -> None:
    line = (root / "manifest").read_bytes().split(b"\n")[0]
    rewrite_manifest(root, re.sub(rb'"format":\d', b'"format":3', line))


def newer_manifest_with_other_fields(root: Path) -> None:
    rewrite_manifest(root, b'{"format":3,"pages":[1,2],"store_id":7}')


def rewrite_manifest(root: Path, line: bytes) -> None:
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"
    (root / "manifest").write_bytes(text.ljust(4096))


def newer_segments(root: Path) -> None:
    for path in root.glob("segment-*.tkv"):
        data = bytearray(path.read_bytes())
        data[8:12] = struct.pack("<I", 3)
        data[4080:4096] = xxhash.xxh3_128_digest(bytes(data[:4080]))
        path.write_bytes(data)


def newer_pages(root: Path) -> None:
    """The last page of each segment is of a later version, in a segment of this one."""
    for path in root.glob("segment-*.tkv"):
        data = bytearray(path.read_bytes())
        at = data.rindex(b"TIERKVP\0")
        data[at + 8 : at + 12] = struct.pack("<I", 3)
        data[at + 4080 : at + 4096] = xxhash.xxh3_128_digest(bytes(data[at : at + 4080]))
        path.write_bytes(data)


def newer_segments_without_manifest(root: Path) -> None:
    newer_segments(root)
    (root / "manifest").unlink()


def all_newer(root: Path) -> None:
    newer_segments(root)
    newer_manifest(root)


@pytest.mark.parametrize("name", ["plain", "crashed", *PROTECTED])
@pytest.mark.parametrize(
    "change",
    [
        newer_manifest,
        newer_manifest_with_other_fields,
        all_newer,
        newer_segments,
        newer_segments_without_manifest,
        newer_pages,
    ],
)
def test_a_newer_format_is_refused_and_nothing_of_it_changed(
    change: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    root = extracted(name, tmp_path)
    change(root)
    before = digests(root)
    with pytest.raises(TierFailed, match="of format 3, this version reads 1 and 2; cure: "):
        opened(name, tmp_path).close()

    assert digests(root) == before
