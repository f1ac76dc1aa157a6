"""One life of `lmcache server` with tierkv below it, and of an engine that uses the server.

    python tools/lmcache_life.py ORDER.json ANSWER.json     see `tierkv.testing.life`
    python tools/lmcache_life.py --serve TROUBLE ...        lmcache's own command line, troubled

The server is LMCache's, in a process of its own that ends with this one. The engine is played: K
and V are a function of all tokens so far, of the model's name and of the dtype, and the answer is a
digest of what lies in its cache when it has loaded what it can and computed the rest, so that wrong
bytes are other tokens. It talks to the server as LMCache's own bench client does: its cache is in
shared memory, and the server copies. Between turns the server's first level is cleared.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch

from tierkv.testing.life import Answer, Ask, Life, Said, Trouble, main, troubled

QUIET: Final = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
CHUNK: Final = 32
#: Tokens of a block of the engine's cache; a chunk is some of them.
BLOCK: Final = 16
LAYERS: Final = 4
HEADS: Final = 8
DIM: Final = 128
#: Blocks of one ask, and asks that are answered together.
ASK_BLOCKS: Final = 44
ASKS: Final = 8
INSTANCE: Final = 1000
WAIT_S: Final = 180.0
LOAD_S: Final = 30.0


class Engine:
    """The played engine, with or without a server."""

    def __init__(self, model: str, dtype: str, server: Server | None = None) -> None:
        self.model = model
        self._server = server
        # LMCache takes block 0 for one that holds nothing.
        shape = (2, 1 + ASKS * ASK_BLOCKS, BLOCK, HEADS, DIM)
        self.caches = [torch.zeros(shape, dtype=getattr(torch, dtype)) for _ in range(LAYERS)]
        if server is not None:
            server.register(model, self.caches)
        self._asked = 0
        self._looking = threading.Lock()

    def turn(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer some asks together."""
        assert len(asks) <= ASKS, f"{len(asks)} asks, and there is room for {ASKS}"
        with ThreadPoolExecutor(ASKS) as pool:
            return list(pool.map(self._answer, range(len(asks)), asks))

    def _answer(self, place: int, ask: Ask) -> Answer:
        first, size = 1 + place * ASK_BLOCKS, len(ask.tokens)
        for cache in self.caches:
            cache[:, first : first + ASK_BLOCKS] = torch.nan  # nothing of an earlier ask
        loaded, session = 0, None
        if self._server is not None:
            self._asked += 1
            session = Session(self._server, self.model, f"{self._asked}-{place}", ask, first)
            # One after the other: LMCache misses what another lookup is just bringing up.
            with self._looking:
                found = session.found()
            if ask.is_cancelled:
                session.end()
                return Answer(tokens=[])
            loaded = session.load(found)
        for start in range(loaded, size, BLOCK):
            self._compute(ask.tokens[: start + BLOCK], first + start // BLOCK)
        if session is not None:
            session.store(loaded)
            session.end()
        return Answer(tokens=self._said(ask, first, -(-size // BLOCK)), reused=loaded)

    def _compute(self, tokens: list[int], block: int) -> None:
        """Fill a block of the cache with what the tokens up to its end give."""
        text = f"{self.model} {self.caches[0].dtype} {tokens}"
        seed = np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16]))
        values = np.random.Generator(seed).random((LAYERS, 2, BLOCK, HEADS, DIM), np.float32)
        for cache, layer in zip(self.caches, values, strict=True):
            cache[:, block] = torch.from_numpy(layer)

    def _said(self, ask: Ask, first: int, blocks: int) -> list[int]:
        """The new tokens: a digest of the prompt and of what lies in the cache."""
        digest = hashlib.blake2b(repr(ask.tokens).encode(), digest_size=32)
        for cache in self.caches:
            part = cache[:, first : first + blocks].contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
        rng = np.random.default_rng(list(digest.digest()))
        return [int(token) for token in rng.integers(0, 40_000, ask.count)]


class Session:
    """One ask, in the server's words. `first` is its first block in the engine's cache."""

    def __init__(self, server: Server, model: str, name: str, ask: Ask, first: int) -> None:
        self._server = server
        self._model = model
        self._name = name
        self._ask = ask
        self._first = first
        self._whole = len(ask.tokens) // CHUNK * CHUNK

    def found(self) -> int:
        """How many tokens the server has brought to its first level."""
        client = self._server.client
        client.lookup(self._key(0, self._whole), 1).result(timeout=WAIT_S)
        ends = time.monotonic() + LOAD_S
        while time.monotonic() < ends:
            chunks = client.query_prefetch_status(self._name).result(timeout=WAIT_S)
            if chunks is not None:
                return int(chunks) * CHUNK
            time.sleep(0.005)
        return 0

    def load(self, tokens: int) -> int:
        """Have the first tokens put into the engine's cache; gives how many are there."""
        return tokens if tokens and self._moved("submit_retrieve", 0, tokens) else 0

    def store(self, start: int) -> None:
        """Have whole chunks from `start` on stored."""
        if start < self._whole:
            self._moved("submit_store", start, self._whole)

    def end(self) -> None:
        """Nothing more is asked."""
        self._server.client.end_session(self._name).result(timeout=WAIT_S)

    def _key(self, start: int, end: int, worker: int | None = None) -> Any:  # noqa: ANN401
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        return IPCCacheServerKey(
            model_name=self._model, world_size=1, worker_id=worker, token_ids=(*self._ask.tokens,),
            start=start, end=end, request_id=self._name, cache_salt=self._ask.tenant,
            num_kv_readers=1,
        )  # fmt: skip

    def _moved(self, how: str, start: int, end: int) -> bool:
        context = self._server.context
        event = context.create_recorded_event()
        blocks = list(range(self._first + start // BLOCK, self._first + end // BLOCK))
        more = {"skip_first_n_tokens": 0} if how == "submit_retrieve" else {}
        future = getattr(context, how)(
            self._name, self._key(start, end, 0), self._server.caches, [blocks], event,
            CHUNK // BLOCK, **more,
        )  # fmt: skip
        return bool(future.result(timeout=WAIT_S))


class Server:
    """`lmcache server` in a process of its own, and a client of it. A context manager."""

    def __init__(self, adapter: dict[str, Any], *, trouble: Trouble | None = None,
                 level_gb: float = 0.5) -> None:  # fmt: skip
        self._port, self._http = free_port(), free_port()
        command = [sys.executable, __file__, "--serve", trouble or "none", "server"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--http-port", str(self._http), "--chunk-size", str(CHUNK)]
        command += ["--l1-size-gb", str(level_gb), "--no-l1-use-lazy", "--shm-name", ""]
        command += ["--eviction-policy", "LRU", "--disable-metrics", "--max-workers", "2"]
        self._command = [*command, "--l2-adapter", json.dumps(adapter)]
        self.caches: dict[str, torch.Tensor] = {}
        self.client: Any = None
        self.context: Any = None

    def __enter__(self) -> Self:
        import zmq
        from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

        self.process = subprocess.Popen(self._command, env={**os.environ, **QUIET})
        wait_until(self._is_up, "the server to start")
        self._zmq = zmq.Context()
        self.client = RequestClientFactory.create(
            f"tcp://127.0.0.1:{self._port}", context=self._zmq
        )
        return self

    def register(self, model: str, caches: list[torch.Tensor]) -> None:
        """Give the server an engine's cache, a tensor for each layer."""
        from lmcache.utils import EngineType
        from lmcache.v1.multiprocess import posix_shm
        from lmcache.v1.multiprocess.group_view import EngineGroupInfo
        from lmcache.v1.multiprocess.transfer_context import create_transfer_context

        self.caches = {f"layer.{number}": cache for number, cache in enumerate(caches)}
        self.context = create_transfer_context(
            self.caches, mode="lmcache_driven", instance_id=INSTANCE, req_client=self.client
        )
        layers = EngineGroupInfo(
            engine_group_id=0, layer_indices=tuple(range(len(caches))), tokens_per_block=BLOCK
        )
        self.context.register(
            self.caches, model, 1, CHUNK // BLOCK, WAIT_S, layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[layers], engine_type=EngineType.VLLM,
        )  # fmt: skip
        # Both have it mapped: without its name nothing is left behind, however they end.
        for name in list(posix_shm._OWNED_NAMES):
            posix_shm.shm_unlink(name)

    def settle(self) -> None:
        """Wait until everything was handed to tierkv, and clear the server's own first level."""
        quiet = 0

        def is_settled() -> bool:
            nonlocal quiet
            stores = self.status()["storage_manager"]["store_controllers"].values()
            busy = sum(s["pending_keys_count"] + s["in_flight_task_count"] for s in stores)
            quiet = 0 if busy else quiet + 1
            return quiet > 2  # twice, as between the two counts a key is in neither

        wait_until(is_settled, "stores to end", every_s=0.02)
        self.client.clear(force=False).result(timeout=WAIT_S)

    def status(self) -> dict[str, Any]:
        """As `GET /status`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/status", timeout=60) as reply:
            return dict(json.load(reply))

    def kill(self) -> None:
        """End the server in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None and self.context is not None:
            with suppress(TimeoutError):
                self.context.unregister().result(timeout=WAIT_S)
        if self.context is not None:
            self.context.close()
        if self.client is not None:
            self.client.close()
            self._zmq.destroy(linger=0)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended with {self.process.returncode}")
        try:
            return bool(self.status())
        except OSError:
            return False


def live(life: Life) -> Said:
    """Live one life."""
    model = f"life-{life.model}"  # LMCache knows a model's weights by its name alone
    if life.directory is None:
        engine = Engine(model, life.dtype)
        return Said(turns=[engine.turn(asks) for asks in life.turns])
    options = {"host": life.host, "cold": life.cold, "directory": life.directory}
    turns = []
    with Server(adapter(options), trouble=life.trouble) as server:
        engine = Engine(model, life.dtype, server)
        for asks in life.turns:
            turns.append(engine.turn(asks))
            server.settle()
        print(json.dumps([one.get("counts") for one in server.status()["storage_manager"][
            "l2_adapters"]]))  # fmt: skip
    return Said(turns=turns)


def adapter(options: dict[str, Any]) -> dict[str, Any]:
    """What `--l2-adapter` says of tierkv."""
    return {
        "type": "plugin",
        "module_path": "tierkv.engines.lmcache",
        "class_name": "TierKVL2Adapter",
        "adapter_params": options,
    }


def wait_until(is_so: Callable[[], bool], what: str, *, every_s: float = 0.1) -> None:
    """Look again and again; TimeoutError after `WAIT_S`."""
    ends = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() > ends:
            raise TimeoutError(f"waited for {what}")
        time.sleep(every_s)


def free_port() -> int:
    """A port that nobody has, for now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serve(trouble: str, command: list[str]) -> None:
    """LMCache's command line in this process, which ends with the one that started it."""
    from lmcache.cli.main import main as lmcache

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with troubled(None if trouble == "none" else Trouble(trouble)):
        lmcache(command)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], sys.argv[3:])
    else:
        main(live)
