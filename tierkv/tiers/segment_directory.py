"""The cold tier's directory: lock, manifest, and segment files; knows nothing of pages' contents.

Names::

    lock                    flock held while the directory is open; holds the pid, for the message
    manifest                see `segment_manifest`
    segment-00000003.tkv    see `segment_format`
    *.tmp                   one of the above being made; removed at the next open

Invariants:
- A manifest or segment under its final name is complete: tmp name, sync, rename, sync of the root.
- `begin` makes the epoch durable before a page can be written, and no epoch is used twice, so a
  generation (epoch << 40 | count) never comes back, even if a directory is restored from a copy of
  its segments.
- The manifest says `clean` only between a good `close` and the next `begin`.

A lost or damaged manifest is made again from the segment headers: it holds nothing else that a
cache could not do without.

Where the store has a protection, nothing is changed before the key has been shown to be the right
one: by the manifest's tag, or, where there is no manifest, by that of a segment header. A key that
fits neither, or none, is refused. Single owner, except `ensure` and `segments`: any thread.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from tierkv.core.errors import CorruptData, GeometryMismatch, TierFailed
from tierkv.core.geometry import ALIGN_BYTES, PagePlan
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.seals import NO_SEAL
from tierkv.tiers.seals.base import Seal, SegmentSeal
from tierkv.tiers.segment_format import (
    SEGMENT_HEADER_BYTES,
    STORE_ID_BYTES,
    SegmentShape,
)
from tierkv.tiers.segment_header_io import HeaderIO
from tierkv.tiers.segment_manifest import (
    MANIFEST_BYTES_MAX,
    Manifest,
    expect_seal,
    manifest_text,
    padded,
    parse_manifest,
)
from tierkv.tiers.withheld import blocked_segments

logger = logging.getLogger(__name__)

EPOCH_SHIFT: Final = 40
_EPOCHS_MAX: Final = (1 << 24) - 1
_SEGMENT_NAME: Final = re.compile(r"segment-(\d{8})\.tkv", re.ASCII)
_TMP_NAME: Final = re.compile(r"(manifest|segment-\d{8}|probe-\d+-\d+)\.tmp", re.ASCII)


@dataclass(slots=True)
class SegmentFile:
    """An open segment: its handle, how many slots its length holds, its keys if it is protected."""

    number: int
    handle: int
    slots: int
    seal: SegmentSeal | None = None


class SegmentDirectory:
    """Segment files by number beneath one locked root."""

    def __init__(
        self,
        files: FileEngine,
        plan: PagePlan,
        fingerprint: bytes,
        *,
        pages_max: int,
        pages_per_segment: int,
        seal: Seal | None = None,
    ) -> None:
        self.segments: dict[int, SegmentFile] = {}
        #: What `open` found wrong and put right, in words.
        self.findings: list[str] = []
        #: Pages of segments that can be neither opened nor made, as of `open`.
        self.withheld: list[int] = []
        self.shape = SegmentShape.of(
            plan,
            fingerprint=fingerprint,
            store_id=b"",
            pages_per_segment=pages_per_segment,
            protection=NO_SEAL if seal is None else seal.name,
        )
        self._seal = seal
        self._headers = HeaderIO(files, seal)
        #: Protected segments whose header cannot be read; their pages need its salt.
        self._unread: set[int] = set()
        self._files = files
        self._plan = plan
        self._pages_max = pages_max
        self._manifest: Manifest | None = None
        self._lock_handle: int | None = None
        self._creating = threading.Lock()

    def open(self) -> bool:
        """Lock the directory and open its segments; True if it was closed cleanly.

        Segments beyond the capacity and segments of another store are removed. Raises TierFailed
        if the directory is in use, unsafe, or holds another layout; nothing is changed then.
        """
        self._lock_handle = self._take_lock()
        try:
            manifest = self._load_manifest()
            self.shape = SegmentShape.of(
                self._plan,
                fingerprint=self.shape.fingerprint,
                store_id=bytes.fromhex(manifest.store_id),
                pages_per_segment=manifest.pages_per_segment,
                protection=manifest.protection,
            )
            self._remove_stale_files()
            for name, number in self._segment_names():
                self._open_segment(name, number)
            self._withhold()
        except BaseException:
            self.release()
            raise
        for number in set(manifest.segments) - set(self.segments):
            if number * manifest.pages_per_segment < self._pages_max:
                self.findings.append(f"segment {number} of the manifest is missing")
        self._manifest = manifest
        return manifest.clean

    def begin(self, epoch_seen: int) -> int:
        """Start and make durable an epoch above `epoch_seen` and all earlier ones; returns it."""
        manifest = self._opened()
        epoch = max(manifest.epoch, epoch_seen) + 1
        if epoch > _EPOCHS_MAX:
            raise TierFailed("no epochs are left in the cold directory; cure: remove its contents")
        self._write_manifest(epoch=epoch, clean=False)
        return epoch

    def first_generation(self, epoch: int) -> int:
        """Where the generations of this start begin.

        Under a protection nobody can foresee it: a directory that is put back as it was gives its
        epochs again, and an earlier life's write of a page may not pass for this one's.
        """
        first = b"" if self._seal is None else secrets.token_bytes(EPOCH_SHIFT // 8)
        return (epoch << EPOCH_SHIFT) + (int.from_bytes(first, "little") >> 1)

    def ensure(self, page: int) -> SegmentFile:
        """The segment of `page`, made or grown if need be. Raises OSError. Any thread."""
        number = self.shape.segment_of(page)
        slot = page % self.shape.pages_per_segment
        segment = self.segments.get(number)
        if segment is not None and slot < segment.slots:
            return segment
        # Rare: once per segment. The second thread in finds the first one's segment.
        with self._creating:
            if number in self._unread:  # made anew it would lose what a later start may read
                raise OSError(errno.EIO, "its header could not be read", _segment_name(number))
            slots = self.slots_wanted(number)
            segment = self.segments.get(number)
            if segment is None:
                segment = self._create(number, slots)
                self.segments[number] = segment
            elif slot >= segment.slots:
                self._files.preallocate(segment.handle, self.shape.segment_bytes(slots))
                segment.slots = slots
            return segment

    def slots_wanted(self, number: int) -> int:
        """Slots of a segment that the capacity covers."""
        per_segment = self.shape.pages_per_segment
        return max(0, min(per_segment, self._pages_max - number * per_segment))

    def close(self, *, clean: bool) -> None:
        """Write down how it ended, and unlock, whatever happens."""
        try:
            self._write_manifest(epoch=self._opened().epoch, clean=clean)
        finally:
            self.release()

    def release(self) -> None:
        """Close all handles and unlock, writing nothing."""
        for segment in self.segments.values():
            self._files.close(segment.handle)
        self.segments.clear()
        self._unread.clear()
        self._manifest = None
        if self._lock_handle is not None:
            self._files.close(self._lock_handle)
            self._lock_handle = None

    def check(self) -> list[str]:
        """What is wrong with the manifest, segment headers or names now; empty if all is well."""
        found: list[str] = []
        try:
            if self._read_manifest() != self._manifest:
                found.append("manifest: it is not the one that was written")
        except (CorruptData, TierFailed, OSError) as error:
            found.append(f"manifest: {error}")
        for number, segment in sorted(self.segments.items()):
            try:
                self._headers.expect(segment.handle, self.shape, number)
            except (CorruptData, GeometryMismatch, OSError, TierFailed) as error:
                found.append(f"segment {number}: {error}")
        known = {"lock", "manifest"} | {_segment_name(number) for number in self.segments}
        found += [f"unknown file {name!r}" for name in self._files.names() if name not in known]
        return found

    def _opened(self) -> Manifest:
        if self._manifest is None:
            raise TierFailed("the cold tier is not open")
        return self._manifest

    def _take_lock(self) -> int:
        try:
            handle = self._files.lock("lock")
        except BlockingIOError as error:
            raise TierFailed(
                f"the cold directory is in use by {self._lock_holder()}; cure: stop it, or give "
                "this store a directory of its own"
            ) from error
        text = aligned_array(ALIGN_BYTES, ALIGN_BYTES)
        text[:] = padded(f"pid {os.getpid()}".encode())
        # The text only serves the message above; the lock holds without it.
        with suppress(OSError):
            self._files.write(handle, 0, [text.data])
        return handle

    def _lock_holder(self) -> str:
        try:
            text = bytes(self._read_file("lock")[:64]).split(b"\n")[0].decode("ascii")
        except (CorruptData, OSError, UnicodeDecodeError):
            return "another process"
        return text if re.fullmatch(r"pid \d{1,10}", text, re.ASCII) else "another process"

    def _segment_names(self) -> list[tuple[str, int]]:
        matches = ((name, _SEGMENT_NAME.fullmatch(name)) for name in self._files.names())
        return [(name, int(match[1])) for name, match in matches if match]

    def _remove_stale_files(self) -> None:
        """Remove half-made files, and segments that lie wholly beyond the capacity."""
        stale = [name for name in self._files.names() if _TMP_NAME.fullmatch(name)]
        stale += [name for name, number in self._segment_names() if not self.slots_wanted(number)]
        for name in stale:
            self._files.unlink(name)
        if stale:
            self._files.sync_root()

    def _open_segment(self, name: str, number: int) -> None:
        handle = self._files.open(name)
        seal = None
        try:
            seal = self._headers.expect(handle, self.shape, number)
        except TierFailed as error:
            raise TierFailed(f"{name} is {error}") from None
        except GeometryMismatch as error:
            # Its name is ours and needed, and no page in it can be one that this store wrote.
            self._files.close(handle)
            self._files.unlink(name)
            self._found(f"{name} was removed: {error}")
            return
        except CorruptData as error:
            # Pages say themselves whose they are, so the header is all that is lost.
            seal = self._headers.write_again(handle, self.shape, number)
            self._found(f"{name}: its header was made again: {error}")
        except OSError as error:
            self._found(f"{name}: its header cannot be read: {error}")
            if self._seal is not None:
                self._files.close(handle)
                self._unread.add(number)
                return
        slots = (self._files.size(handle) - SEGMENT_HEADER_BYTES) // self.shape.slot_bytes
        slots = max(0, min(slots, self.slots_wanted(number)))
        self.segments[number] = SegmentFile(number, handle, slots, seal)

    def _withhold(self) -> None:
        """Find the segments that something else blocks, or whose keys cannot be had now."""
        size = self.shape.pages_per_segment
        absent = set(range(-(-self._pages_max // size))) - self.segments.keys()
        found = blocked_segments(self._files, [(n, _segment_name(n)) for n in sorted(absent)])
        self.findings += found.values()
        numbers = sorted({*found, *self._unread})
        self.withheld = [n * size + slot for n in numbers for slot in range(self.slots_wanted(n))]

    def _found(self, finding: str) -> None:
        self.findings.append(finding)
        logger.warning("cold directory repaired finding=%s", finding)

    def _create(self, number: int, slots: int) -> SegmentFile:
        tmp = f"segment-{number:08d}.tmp"
        # A link or pipe that somebody put there is no file, so `open` could not remove it.
        with suppress(FileNotFoundError):
            self._files.unlink(tmp)
        handle = self._files.open(tmp, create=True)
        try:
            self._files.preallocate(handle, self.shape.segment_bytes(slots))
            seal = self._headers.write_new(handle, self.shape, number)
            self._files.rename(tmp, _segment_name(number))
            self._files.sync_root()
        except OSError:
            self._files.close(handle)
            # A file that got its final name is complete; the next open adopts it.
            with suppress(OSError):
                self._files.unlink(tmp)
            raise
        return SegmentFile(number, handle, slots, seal)

    def _load_manifest(self) -> Manifest:
        """The manifest, made again if it is lost. TierFailed if it is not for us."""
        try:
            manifest = self._read_manifest()
        except CorruptData as error:
            self._found(f"the manifest was made again: {error}")
            manifest = None
        if manifest is None:
            manifest = self._manifest_of_segments()
        self._expect_ours(manifest)
        return manifest

    def _read_manifest(self) -> Manifest | None:
        """The manifest, None if there is none. CorruptData if damaged, TierFailed if not for us."""
        if "manifest" not in self._files.names():
            return None
        text = bytes(self._read_file("manifest"))
        manifest = parse_manifest(text)
        self._expect_seal(text, manifest)
        return manifest

    def _expect_seal(self, text: bytes, manifest: Manifest) -> None:
        """TierFailed unless the manifest is protected as this store is, by its key."""
        expect_seal(text, manifest, self._seal)

    def _manifest_of_segments(self) -> Manifest:
        """A manifest from the segment headers, or a new store's."""
        plan = self._plan
        shape = self._headers.first_shape([name for name, _ in self._segment_names()], self.shape)
        return Manifest(
            format=shape.version,
            store_id=(shape.store_id or secrets.token_bytes(STORE_ID_BYTES)).hex(),
            fingerprint=shape.fingerprint.hex(),
            layers=plan.layers,
            block_tokens=plan.block_tokens,
            block_layer_bytes=plan.block_layer_bytes,
            warm_page_blocks=shape.warm_page_blocks,
            warm_page_bytes=shape.warm_page_bytes,
            pages_per_segment=shape.pages_per_segment,
            segments=[],
            epoch=0,
            clean=False,
            protection=shape.protection,
        )

    def _expect_ours(self, manifest: Manifest) -> None:
        cure = "cure: another directory for this model, or remove the contents of this one"
        fingerprint = self.shape.fingerprint.hex()
        if manifest.fingerprint != fingerprint:
            raise TierFailed(
                "the cold directory holds another layout (fingerprint "
                f"{manifest.fingerprint[:16]}, expected {fingerprint[:16]}); {cure}"
            )
        for name in ("layers", "block_layer_bytes", "warm_page_blocks", "warm_page_bytes"):
            found, expected = getattr(manifest, name), getattr(self._plan, name)
            if found != expected:
                raise TierFailed(
                    f"the cold directory holds pages with {name} {found}, expected {expected}; "
                    f"set the same page sizes, or {cure}"
                )

    def _write_manifest(self, *, epoch: int, clean: bool) -> None:
        manifest = msgspec.structs.replace(
            self._opened(), epoch=epoch, clean=clean, segments=sorted(self.segments)
        )
        text = manifest_text(manifest, self._seal)
        data = aligned_array(len(text), ALIGN_BYTES)
        data[:] = text
        with suppress(FileNotFoundError):
            self._files.unlink("manifest.tmp")
        handle = self._files.open("manifest.tmp", create=True)
        try:
            self._files.write(handle, 0, [data.data])
            self._files.sync(handle)
        finally:
            self._files.close(handle)
        self._files.rename("manifest.tmp", "manifest")
        self._files.sync_root()
        self._manifest = manifest

    def _read_file(self, name: str) -> npt.NDArray[np.uint8]:
        """A small file of ours, whole. Raises CorruptData if it is of an impossible length."""
        handle = self._files.open(name)
        try:
            size = self._files.size(handle)
            if size % ALIGN_BYTES or size > MANIFEST_BYTES_MAX:
                raise CorruptData(f"{name}: impossible length of {size} bytes")
            data = aligned_array(size, ALIGN_BYTES)
            self._files.read(handle, 0, [data.data])
        finally:
            self._files.close(handle)
        return data


def _segment_name(number: int) -> str:
    return f"segment-{number:08d}.tkv"
