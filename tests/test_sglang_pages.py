"""What SGLang's backend is made of, without SGLang: pages by name, pools, options, weights.

Under SGLang itself: `test_sglang_storage.py` and `test_sglang_engine.py`.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tierkv.config import Config
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import Form as GeometryForm
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.engines.options import config_of, part_of
from tierkv.engines.sglang.host import TensorPlace, form_of, places_in
from tierkv.engines.sglang.layout import block_tokens_of, weights_of
from tierkv.engines.sglang.pages import Pages
from tierkv.engines.weights import weights_identity

TOKENS = 4
NAMES = [f"page {number}" for number in range(6)]


class Pool:
    """A host pool as SGLang's are: pieces of these sizes for each page, or none to point at."""

    page_size = TOKENS

    def __init__(
        self, sizes: tuple[int, ...], *, pages: int = 6, has_pointers: bool = True
    ) -> None:
        self.parts = [torch.randint(0, 256, (pages, s), dtype=torch.uint8) for s in sizes]
        self._has_pointers = has_pointers

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]] | None:
        if not self._has_pointers:
            raise NotImplementedError
        pages = [index // TOKENS for index in indices[::TOKENS].tolist()]
        rows = [part[page] for page in pages for part in self.parts]
        return [row.data_ptr() for row in rows], [row.numel() for row in rows]

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return torch.cat([part[index // TOKENS] for part in self.parts])

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(sum(part.shape[1] for part in self.parts), dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        for part, row in zip(
            self.parts, data_page.split([p.shape[1] for p in self.parts]), strict=True
        ):
            part[index // TOKENS] = row


def where(pages: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(page * TOKENS, (page + 1) * TOKENS) for page in pages])


def opened(directory: Path, pool: Pool, *, by_pointers: bool) -> Pages:
    form = form_of(pool, by_pointers=by_pointers)
    tokens = block_tokens_of(pool, form)
    options = {"host": "8MiB", "cold": "16MiB", "directory": str(directory)}
    config = config_of(options, place="options", block_tokens=tokens)
    layers, size = form.shape
    geometry = KVGeometry(layers=layers, kv_heads=1, head_dim=size // tokens, dtype="uint8",
                          form=GeometryForm.LATENT)  # fmt: skip
    layout = Layout(geometry, tokens, engine_layout=str(form), targets=config.pages.targets)
    pages = Pages(config, layout)
    pages.open()
    return pages


@pytest.mark.parametrize("by_pointers", [True, False])
@pytest.mark.parametrize("sizes", [(4096,), (2048, 2048), (64,) * 6, (512, 40, 7)])
def test_any_page_is_found_at_any_time_in_this_life_and_the_next(
    tmp_path: Path, sizes: tuple[int, ...], by_pointers: bool
) -> None:
    rng, pool = random.Random(1), Pool(sizes)
    form = form_of(pool, by_pointers=by_pointers)
    assert form.is_flat is not by_pointers
    order = rng.sample(range(6), 6)
    kept = {NAMES[page]: pool.get_data_page(page * TOKENS) for page in range(5)}
    pages = opened(tmp_path, pool, by_pointers=by_pointers)
    for page in order:
        if page < 5:
            places = places_in(pool, form, 1, where([page]))
            assert places is not None
            assert pages.write([NAMES[page]], places) == [True]
    for _ in range(2):
        assert pages.leading(NAMES) == 5
        assert pages.leading(NAMES[3:]) == 2
        assert pages.has(NAMES[::-1]) == [False] + [True] * 5
        for part in pool.parts:
            part.zero_()
        places = places_in(pool, form, 6, where(order))
        assert places is not None
        read = pages.read([NAMES[page] for page in order], places)
        assert read == [page < 5 for page in order]
        for page in range(5):
            assert torch.equal(pool.get_data_page(page * TOKENS), kept[NAMES[page]])
        pages.close()
        assert pages.leading(NAMES) == 0
        pages = opened(tmp_path, pool, by_pointers=by_pointers)
    assert pages.clear()
    assert not any(pages.has(NAMES))
    pages.close()
    pages = opened(tmp_path, pool, by_pointers=by_pointers)
    assert not any(pages.has(NAMES))
    pages.close()


def test_a_pool_without_pointers_is_flat_and_other_indices_have_no_places() -> None:
    pool = Pool((64, 64), has_pointers=False)
    form = form_of(pool, by_pointers=True)
    assert form.is_flat
    assert places_in(pool, form, 2, where([0])) is None
    assert places_in(pool, form, 2, None) is None


def test_a_tensor_that_is_not_one_run_is_filled_beside_it() -> None:
    form = form_of(Pool((64,)), by_pointers=False)
    apart = torch.zeros(64, 2, dtype=torch.uint8)[:, 0]
    place = TensorPlace(form, apart)
    assert place.fits
    place.target()[:] = 7
    place.filled()
    assert torch.equal(apart, torch.full((64,), 7, dtype=torch.uint8))
    assert not TensorPlace(form, torch.zeros(63, dtype=torch.uint8)).fits


def test_unknown_options_are_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="here: unknown hots; known: config, host, cold, direc"):
        config_of({"hots": 1}, place="here", block_tokens=16)
    with pytest.raises(ConfigError, match=r"here: tiers\.host\.capacity: "):
        config_of({"host": "a lot"}, place="here", block_tokens=16)
    assert config_of({"mine": 1}, place="here", block_tokens=64, more=["mine"]).block_tokens == 64


def test_a_part_of_a_configuration_has_its_share_and_what_is_off_stays_off() -> None:
    config = Config.model_validate({"tiers": {"host": {"capacity": "8GiB"}}})
    part = part_of(config, 0.25, least_bytes=1 << 20, has_log=False)
    assert part.tiers.host.capacity == 2 << 30
    assert bool(part.tiers.cold.capacity) == bool(config.tiers.cold.capacity)
    assert part_of(config, 0, least_bytes=1 << 20, has_log=False).tiers.host.capacity == 1 << 20


def test_weights_are_known_by_their_bytes_and_not_by_what_lies_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first")
    first = weights_identity(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    assert weights_identity(tmp_path) == first
    assert weights_identity(tmp_path, more="int8") != first
    file.write_bytes(b"other")
    assert weights_identity(tmp_path) != first
    assert weights_identity(file) == weights_identity(tmp_path)


@pytest.mark.parametrize("form", ["name=PATH", "PATH", {"lora_path": "PATH"}, {"name": "PATH"}])
def test_adapters_are_known_by_their_bytes_too(tmp_path: Path, form: str | dict[str, str]) -> None:
    class Arguments:
        model_path = "org/model"

    (tmp_path / "adapter_config.json").write_text("{}")
    if isinstance(form, str):
        given: object = [form.replace("PATH", str(tmp_path))]
    else:
        filled = {key: str(tmp_path) for key in form}
        given = [filled] if "lora_path" in form else filled
    arguments = Arguments()
    bare = weights_of(None, arguments, None)
    vars(arguments)["lora_paths"] = given
    first = weights_of(None, arguments, None)
    assert first != bare
    assert weights_of("ours", arguments, None).startswith("ours; ")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert weights_of(None, arguments, None) != first


def test_what_is_read_last_of_a_batch_goes_first(tmp_path: Path) -> None:
    """Of a batch as large as host memory the first pages stay when others come."""
    size = 1 << 20
    pool = Pool((size,), pages=8)
    form = form_of(pool, by_pointers=True)
    layout = Layout(KVGeometry(layers=1, kv_heads=1, head_dim=size // TOKENS, dtype="uint8",
                               form=GeometryForm.LATENT), TOKENS)  # fmt: skip
    config = config_of({"host": "8MiB"}, place="", block_tokens=TOKENS)
    config = part_of(config, 1, least_bytes=0, has_log=False)
    pages = Pages(config, layout)
    pages.open()
    names = [str(number) for number in range(12)]
    places = places_in(pool, form, 8, where(list(range(8))))
    assert places is not None
    assert all(pages.write(names[:8], places))
    assert all(pages.write(names[8:10], places[:2]))
    assert np.array_equal(pages.has(names[:10]), [True] * 6 + [False] * 2 + [True] * 2)
    pages.close()
