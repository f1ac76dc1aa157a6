"""Cold directories that tierkv 0.1.0 left, read by today's code; and formats that it must refuse.

How they were made is in `tests/golden/make.py`. They hold format 1 still: what is durable in them
must be found for ever, byte for byte, or the format's number must change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.golden.make import VARIANTS, Prompt, Variant, config_of, layout_of, made
from tierkv.core.errors import TierFailed
from tierkv.core.geometry import KVGeometry
from tierkv.store import Store

GOLDEN = Path(__file__).parent / "golden"
INDEX: dict[str, Any] = json.loads((GOLDEN / "format_1.json").read_text(encoding="utf-8"))
NAMES = sorted(INDEX)
BYTES_MAX = 200 << 10


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What a crash left is repaired, and logged."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def extracted(name: str, directory: Path) -> Path:
    """Unpack a golden directory where a store with `directory` looks for it."""
    root = directory / INDEX[name]["fingerprint"][:16]
    root.mkdir(mode=0o700, parents=True)
    with tarfile.open(GOLDEN / f"format_1_{name}.tar.gz") as tar:
        tar.extractall(root, filter="data")
    return root


def opened(name: str, directory: Path) -> Store:
    said = INDEX[name]
    config = config_of(directory, said["salts"], host=said["host"], cold=said["cold"])
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


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_script_still_tells_what_its_files_hold(variant: Variant) -> None:
    """Not their bytes: which of two pages is written first is for the threads to say."""
    files, said = made(variant)
    kept = INDEX[variant.name]

    assert files
    for what in ("fingerprint", "geometry", "salts"):
        assert said[what] == kept[what]


# ---- formats of later versions, with checksums that are right


def newer_manifest(root: Path) -> None:
    line = (root / "manifest").read_bytes().split(b"\n")[0]
    rewrite_manifest(root, line.replace(b'"format":1', b'"format":2'))


def newer_manifest_with_other_fields(root: Path) -> None:
    rewrite_manifest(root, b'{"format":2,"pages":[1,2],"store_id":7}')


def rewrite_manifest(root: Path, line: bytes) -> None:
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"
    (root / "manifest").write_bytes(text.ljust(4096))


def newer_segments(root: Path) -> None:
    for path in root.glob("segment-*.tkv"):
        data = bytearray(path.read_bytes())
        data[8:12] = struct.pack("<I", 2)
        data[4080:4096] = xxhash.xxh3_128_digest(bytes(data[:4080]))
        path.write_bytes(data)


def newer_segments_without_manifest(root: Path) -> None:
    newer_segments(root)
    (root / "manifest").unlink()


def all_newer(root: Path) -> None:
    newer_segments(root)
    newer_manifest(root)


@pytest.mark.parametrize("name", ["plain", "crashed"])
@pytest.mark.parametrize(
    "change",
    [
        newer_manifest,
        newer_manifest_with_other_fields,
        all_newer,
        newer_segments,
        newer_segments_without_manifest,
    ],
)
def test_a_newer_format_is_refused_and_nothing_of_it_changed(
    change: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    root = extracted(name, tmp_path)
    change(root)
    before = digests(root)
    with pytest.raises(TierFailed, match="of format 2, this version reads 1; cure: "):
        opened(name, tmp_path).close()

    assert digests(root) == before
