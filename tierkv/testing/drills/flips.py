"""Damage at rest: what lies in the cold directory is changed while nobody looks, and opened.

Images of a directory are made once, by a real `Store`; each case damages a copy and opens it. Even
cases flip one bit: of every byte of the manifest, the segment headers and the page headers, in
order, bytes that say something first. Odd cases draw a damage of `DAMAGES`, or two.

What must hold. It opens, unless the damage makes the manifest or a header say, with a good
checksum, what is to be refused (another layout or format, no epoch left). Every block that is given
has the bytes that were put under its key; every page that the damage did not touch is found; the
planner's invariants hold; no file appears. Most cases ask the tier and a planner, which is quick,
and of every `STORE_EVERY` two ask a whole `Store`, by prompt.

In this class are faults, and an attacker who makes a header's own checksum good again: a payload's
checksum is seeded with its header, so such a page is a miss. Out of it is who makes the payload's
checksum good too: xxh3 has no key, so whoever may write to the directory can make any bytes verify.
The directory's mode, checked at the start, is what keeps such a one out.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
import xxhash

from tierkv.core.errors import TierFailed
from tierkv.core.tier import PageLabel, RecoveredPage
from tierkv.plan import events as ev
from tierkv.plan.planner import Planner
from tierkv.store import Store
from tierkv.testing.drills import base
from tierkv.testing.drills.base import Tally, Wrong
from tierkv.testing.drills.flips_site import (
    CONFIG,
    HEADER,
    LAYOUT,
    PAGES_MAX,
    PER_SEGMENT,
    PLAN,
    SLOT,
    SPEC,
    Bytes,
    Image,
    Place,
    Prompt,
    Site,
    bytes_of,
    disk_of,
    images,
    prompt_of,
    prompts,
    slot_of,
    tier_on,
)
from tierkv.testing.files import MemoryFiles
from tierkv.tiers.files.base import aligned_array
from tierkv.tiers.segment_format import SEGMENT_HEADER_BYTES
from tierkv.tiers.segments import SegmentTier

NAME: Final = "flips"
STORE_EVERY: Final = 96


class Harm(NamedTuple):
    """What a damage was, which pages it may cost (None: any), and whether a start may refuse it."""

    words: str
    pages: frozenset[int] | None = frozenset()
    may_refuse: bool = False


Damage: TypeAlias = Callable[[Image, Site, random.Random], Harm]


def run(cases: int, seed: int) -> Tally:
    """Damage and open, `cases` times."""
    return base.run_cases(NAME, _case, cases, seed)


def replay(seed: int, case: int) -> None:
    """One case again; raises what was wrong with it."""
    _case(base.case_random(NAME, seed, case), case)


def _case(rng: random.Random, number: int) -> None:
    site, files, harm = _damaged(rng, number)
    disk = disk_of(files)
    ask = _ask_store if number % STORE_EVERY in (0, 1) else _ask_tier
    try:
        ask(disk, site, harm)
        segments = {slot_of(page)[0] for page in range(PAGES_MAX)}
        odd = set(disk.names()) - set(files) - segments - {"lock", "manifest"}
        if odd:
            raise Wrong(base.LEAKED, f"left behind: {sorted(odd)}")
    except Wrong as wrong:
        raise Wrong(wrong.kind, f"{harm.words}: {wrong.words}") from wrong
    except Exception as error:
        if not (harm.may_refuse and isinstance(error, TierFailed)):
            raise Wrong(base.BROKEN, f"{harm.words}: {error!r}") from error
    finally:
        disk.shutdown()


def _damaged(rng: random.Random, number: int) -> tuple[Site, Image, Harm]:
    """The site, a copy of its files with the damage of a case, and what that may cost."""
    site, place = systematic()[number // 2 % len(systematic())]
    site = rng.choice(images()) if number % 2 else site
    files = {name: bytearray(data) for name, data in site.files.items()}
    if number % 2 == 0:
        return site, files, _flip(files, place, 1 << rng.randrange(8))
    harm = rng.choice(DAMAGES)(files, site, rng)
    if rng.random() < 0.2:
        more = rng.choice(DAMAGES)(files, site, rng)
        words = f"{harm.words} {more.words}"
        refuse = harm.may_refuse or more.may_refuse  # or a segment says what is here:
        refuse |= "manifest" in words and "forged segment" in words
        return site, files, Harm(f"{harm.words}, then {more.words}", None, refuse)
    return site, files, harm


def _ask_tier(disk: MemoryFiles, site: Site, harm: Harm) -> None:
    tier = tier_on(disk)
    found = tier.open()
    _plan_with(tuple(found))
    good = _read(tier, found)
    tier.close()
    lost = set() if harm.pages is None else site.stored.keys() - harm.pages - good
    if lost:
        raise Wrong(base.LOST, f"pages {sorted(lost)} were not touched and are not found")


@lru_cache(maxsize=4096)
def _plan_with(found: tuple[RecoveredPage, ...]) -> None:
    """Let a planner take over what was found; it is pure, so the same once is enough."""
    planner = Planner(SPEC)
    planner.handle(ev.Recovered([*found]), 0)
    planner.check()


def _read(tier: SegmentTier, found: list[RecoveredPage]) -> set[int]:
    """Pages that verify, each block of them held against what was put under its key."""
    outs = [aligned_array(PLAN.warm_page_bytes, 4096) for _ in found]
    shape = PLAN.layers, PLAN.warm_page_blocks, PLAN.block_layer_bytes
    good: set[int] = set()
    verified = tier.read_pages([one.page for one in found], outs)
    for one, out, is_good in zip(found, outs, verified, strict=True):
        if not is_good:
            continue
        good.add(one.page)
        rows = out[: PLAN.warm_page_blocks * PLAN.block_bytes].reshape(shape)
        positions, expected = _expected(one.label)
        if not np.array_equal(rows[:, positions], expected):
            raise Wrong(base.WRONG_BYTES, f"page {one.page}, blocks {positions}")
    return good


@lru_cache(maxsize=4096)
def _expected(label: PageLabel) -> tuple[list[int], Bytes]:
    """Positions of a page's blocks, and the bytes that were put under their keys there."""
    rows = [bytes_of(block.key) for block in label.blocks]
    return [block.position for block in label.blocks], np.stack(rows, axis=1)


def _ask_store(disk: MemoryFiles, site: Site, harm: Harm) -> None:
    with Store.open(CONFIG, LAYOUT, files_for=lambda _root: disk) as store:
        ask(store, site, harm)


def ask(store: Store, site: Site, harm: Harm) -> None:
    """Read every prompt from a store that was opened on damage, and use it. Raises `Wrong`."""
    for prompt in prompts():
        _get(store, prompt, _promised(prompt, site, harm))
    store.check()
    if any(any(table.pins) for table in store._runtime.planner.tables.values()):
        raise Wrong(base.LEAKED, "pages are pinned and nobody reads")
    new = prompt_of("default", [7] * 32)
    if store.put(new.tokens, new.rows) != len(new.keys):
        raise Wrong(base.BROKEN, "a new prompt could not be put")
    _get(store, new, len(new.keys))


def _get(store: Store, prompt: Prompt, least: int) -> None:
    """Read what is there of a prompt: at least so many blocks, each with its own bytes."""
    match = store.match(prompt.tokens, namespace=prompt.namespace)
    rows = np.zeros((PLAN.layers, match.blocks, PLAN.block_layer_bytes), np.uint8)
    count = store.get(match, rows)
    if not np.array_equal(rows[:, :count], prompt.rows[:, :count]):
        raise Wrong(base.WRONG_BYTES, f"in the first {count} blocks of a prompt")
    if count < least:
        raise Wrong(base.LOST, f"a prompt gave {count} blocks, {least} were not touched")


def _promised(prompt: Prompt, site: Site, harm: Harm) -> int:
    """Blocks of a prompt whose pages, and all pages before them, were not touched."""
    if harm.pages is None:
        return 0
    touched = {-1, *harm.pages}
    pages = [site.page_of.get(key, -1) for key in prompt.keys]
    return next((i for i, page in enumerate(pages) if page in touched), len(pages))


@lru_cache(maxsize=1)
def systematic() -> list[tuple[Site, Place]]:
    """Every byte of the manifest and of all headers of every image; first what says something."""
    first: list[tuple[Site, Place]] = []
    rest: list[tuple[Site, Place]] = []
    for site in images():
        said = site.files["manifest"].rindex(b"\n", 0, 1024)
        parts = [("manifest", 0, said, len(site.files["manifest"]))]
        parts += [(name, 0, 104, SEGMENT_HEADER_BYTES) for name in site.segments]
        parts += [(*slot_of(p), 156 + 68 * blocks, HEADER) for p, blocks in site.stored.items()]
        for name, at, says, size in parts:
            for offset in range(size):
                side = first if offset < says or offset >= size - 32 else rest
                side.append((site, (name, at + offset)))
    return first + rest


def _flip(files: Image, place: Place, mask: int) -> Harm:
    """Flip bits of one byte; it may cost the page that it is in, and nothing where none is."""
    name, offset = place
    files[name][offset : offset + 1] = bytes(byte ^ mask for byte in files[name][offset:][:1])
    words = f"{name} byte {offset} ^ {mask:#04x}"
    if not name.startswith("segment-") or offset < SEGMENT_HEADER_BYTES:
        return Harm(words)
    page = int(name[8:16]) * PER_SEGMENT + (offset - SEGMENT_HEADER_BYTES) // SLOT
    return Harm(words, frozenset({page}))


def _payload(files: Image, site: Site, rng: random.Random) -> Harm:
    name, at = slot_of(rng.choice([*site.stored]))
    place = name, at + HEADER + rng.randrange(PLAN.warm_page_bytes)
    return _flip(files, place, 1 << rng.randrange(8)) if name in files else Harm("nothing")


def _forge(what: str, files: Image, site: Site, rng: random.Random) -> Harm:
    """Change a field of a page's or segment's header and make the header's checksum good."""
    name, at = slot_of(rng.choice([*site.stored]))
    fields, size = (_PAGE_FIELDS, HEADER) if what == "page" else (_SEGMENT_FIELDS, 4096)
    at = at if what == "page" else 0
    field, kind, offset = rng.choice(fields.split()).split(":")
    header = files.get(name, bytearray())[at : at + size]
    if len(header) == size:
        _change(header, kind, int(offset), rng)
        files[name][at : at + size] = header[:-16] + xxhash.xxh3_128_digest(header[:-16])
    # A generation of the last epoch leaves none for the next start; a version may be a later one.
    may_refuse = f"{what} {field}" in ("page generation", "page version", "segment version")
    return Harm(f"{name} at {at}: forged {what} {field}", None, may_refuse)


def _change(header: bytearray, kind: str, offset: int, rng: random.Random) -> None:
    """Another value for a field: near the old one, at the ends of its range, or anything."""
    size = struct.calcsize(f"<{kind}")
    if kind.endswith("s"):
        made = [rng.randbytes(size), bytes(size), b"other".ljust(size, b"\0")]
        made += [rng.choice(prompts()[0].keys)]
        header[offset : offset + size] = rng.choice(made)[:size]
        return
    top = 1 << 8 * size
    old = int.from_bytes(header[offset : offset + size], "little")
    values = (0, 1, 2, old + 1, old - 1, top - 1, top >> 1, rng.randrange(top), old ^ 4096)
    header[offset : offset + size] = (rng.choice(values) % top).to_bytes(size, "little")


def _forge_manifest(files: Image, site: Site, rng: random.Random) -> Harm:
    """A field of the manifest changed, or all of it, with a good checksum."""
    line = site.files["manifest"].partition(b"\n")[0]
    said = msgspec.json.decode(line, type=dict[str, object])
    field = rng.choice(sorted(said))
    wild: tuple[object, ...] = (0, -1, 1, 2, 1 << 24, (1 << 64) - 1, "", "0" * 32, [], [-1], None)
    said[field] = rng.choice(wild)
    deep = b"[" * 200_000
    lines = (b"", b"[]", deep, b'{"format":1,"x":' + deep, b'{"format":%s}' % (b"9" * 6000), b"\0")
    line = msgspec.json.encode(said) if rng.random() < 0.7 else rng.choice(lines)
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"
    files["manifest"] = bytearray(text.ljust(-(-len(text) // 4096) * 4096))
    return Harm(f"manifest: forged {field} {said[field]!r} or {line[:16]!r}", None, may_refuse=True)


def _truncate(files: Image, site: Site, rng: random.Random) -> Harm:
    name = rng.choice(site.segments)
    size = rng.randrange(len(site.files[name]))
    del files.get(name, bytearray())[size:]
    lost = {page for page in site.pages_in(name) if slot_of(page)[1] + SLOT > size}
    return Harm(f"{name} cut to {size}", frozenset(lost))


def _delete(files: Image, site: Site, rng: random.Random) -> Harm:
    name = rng.choice([*site.segments, "manifest", "lock"])
    files.pop(name, None)
    return Harm(f"{name} deleted", site.pages_in(name))


def _swap_segments(files: Image, site: Site, rng: random.Random) -> Harm:
    one, two = rng.sample(site.segments, 2)
    files[one], files[two] = files.get(two, bytearray()), files.get(one, bytearray())
    return Harm(f"{one} and {two} swapped", site.pages_in(one) | site.pages_in(two))


def _overwrite(files: Image, site: Site, rng: random.Random) -> Harm:
    """A slot, its header, its payload or a sector: as another page's, as earlier, or as nobody's.

    That is a misdirected write, a lost one, a torn one. Half the time the other gets it in return.
    """
    other, page = rng.sample([*site.stored], 2)
    at = rng.randrange(SLOT // 512) * 512
    start, stop = rng.choice(((0, SLOT), (0, HEADER), (HEADER, SLOT), (at, at + 512)))
    (source, source_at), (name, at) = slot_of(other), slot_of(page)
    theirs = site.files[source][source_at + start : source_at + stop]
    earlier = site.earlier.get(name, b"")[at + start : at + stop]
    noise = rng.choice((bytes(stop - start), rng.randbytes(stop - start)))
    kind, piece = rng.choice((("theirs", theirs), ("earlier", earlier), ("noise", noise)))
    pieces = {page: (name, at + start, piece)}
    if kind == "theirs" and rng.random() < 0.5:
        mine = site.files[name][at + start : at + stop]
        pieces[other] = (source, source_at + start, mine)
    for file, first, data in pieces.values():
        room = len(files.get(file, b"")) - first
        if room > 0:
            files[file][first : first + min(room, len(data))] = data[:room]
    return Harm(f"page {page} bytes {start}..{stop}: {kind} of {other}", frozenset(pieces))


def _stale(files: Image, site: Site, rng: random.Random) -> Harm:
    """A segment, the manifest, or everything but the manifest as it was earlier."""
    chosen = rng.choice([[name] for name in site.earlier] + [[*site.earlier.keys() - {"manifest"}]])
    files.update({name: bytearray(site.earlier[name]) for name in chosen})
    # Older pages are whole, and hold what was there then; a stale manifest costs nothing.
    return Harm(f"stale {chosen}", frozenset() if chosen in (["manifest"], ["lock"]) else None)


#: Name, kind and offset of what is forged; a block's entry is 68 bytes, the first at 156.
_PAGE_FIELDS: Final = (
    "version:I:8 header_bytes:I:12 page:Q:16 generation:Q:24 store_id:16s:32 fingerprint:32s:48 "
    "payload_bytes:Q:80 block_count:I:88 namespace_bytes:B:92 namespace:5s:93 position:I:156 "
    "second_position:I:224 key:32s:160 second_key:32s:228 last_key:32s:636 parent:32s:192 "
    "second_parent:32s:260 padding:B:705 payload_checksum:16s:4064"
)
_SEGMENT_FIELDS: Final = (
    "version:I:8 header_bytes:I:12 page_bytes:Q:16 page_blocks:I:24 pages:I:28 number:Q:32 "
    "store_id:16s:40 fingerprint:32s:56 padding:B:200"
)
_forges: Final[list[Damage]] = [*[partial(_forge, "page")] * 3, partial(_forge, "segment")]
_pieces: Final[list[Damage]] = [_truncate, _delete, _swap_segments, _stale, *[_overwrite] * 4]
DAMAGES: Final[list[Damage]] = [_payload, _payload, _forge_manifest, *_forges, *_pieces]
