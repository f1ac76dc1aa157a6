"""The engine's host pool: where its pages lie, and what form they have there.

A pool tells the pointers and sizes of a page's pieces (K and V, or one for each layer, or what a
state-space model keeps), and pages are then copied straight between the pool and the store. Where
it tells none, and for the interface without pointers, a page is one flat tensor that the pool makes
or takes. The two may put a page's bytes in another order, so a `Form` is part of a layout.

Pieces of one size that are equally far apart are one array with strides; others are gathered in a
scratch page. Pools belong to the engine, which keeps them while a call is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tierkv.memory import Bytes


class HostPool(Protocol):
    """What is used of SGLang's `HostKVCache`."""

    @property
    def page_size(self) -> int:
        """Tokens of a page."""

    def get_page_buffer_meta(
        self, indices: torch.Tensor
    ) -> tuple[Sequence[int], Sequence[int]] | None:
        """Addresses and sizes of the pieces of some pages, page by page."""

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """A page, flat."""

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """A tensor for a flat page."""

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Take a flat page."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a page's bytes come: the sizes of its pieces in order, or flat."""

    sizes: tuple[int, ...]
    is_flat: bool

    @property
    def page_bytes(self) -> int:
        """Bytes of a page; 0 where a pool has none of its own."""
        return sum(self.sizes)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, bytes) of a page in the store."""
        if len(set(self.sizes)) == 1:
            return len(self.sizes), self.sizes[0]
        return 1, self.page_bytes


def page_tokens(pool: HostPool) -> int:
    """By how many indices a page is named."""
    return int(getattr(pool, "logical_page_size", None) or pool.page_size or 1)


def form_of(pool: HostPool, *, by_pointers: bool) -> Form:
    """A pool's form: by pointers if that is wanted and the pool has them, or flat."""
    if by_pointers:
        try:
            pieces = pool.get_page_buffer_meta(torch.arange(page_tokens(pool)))
        except (NotImplementedError, ValueError):  # how pools say that they have none
            pieces = None
        if pieces is not None:
            return Form(tuple(map(int, pieces[1])), is_flat=False)
    page = pool.get_dummy_flat_data_page()
    return Form((page.numel() * page.element_size(),), is_flat=True)


def places_in(
    pool: HostPool, form: Form, count: int, indices: torch.Tensor | None
) -> list[Pieces] | list[FlatPage] | None:
    """Where `count` pages are that are named by these indices; None where they do not fit."""
    tokens = page_tokens(pool)
    if indices is None or indices.numel() != count * tokens:
        return None
    if form.is_flat:
        return [FlatPage(pool, form, int(index)) for index in indices[::tokens].tolist()]
    pieces = pool.get_page_buffer_meta(indices)
    if pieces is None or tuple(pieces[1]) != form.sizes * count:
        return None
    step = len(form.sizes)
    return [Pieces(form, pieces[0][at : at + step]) for at in range(0, count * step, step)]


class Pieces:
    """A page at some addresses."""

    def __init__(self, form: Form, addresses: Sequence[int]) -> None:
        self._form = form
        self._addresses = addresses
        self._scratch: Bytes | None = None

    def source(self) -> Bytes:
        """The page itself, or a copy of its pieces one behind the other."""
        whole = self._whole()
        if whole is not None:
            return whole
        return _row(self._form, np.concatenate(self._pieces()))

    def target(self) -> Bytes:
        """The page itself, or an array for its pieces."""
        whole = self._whole()
        if whole is None:
            whole = self._scratch = _row(self._form, np.empty(self._form.page_bytes, np.uint8))
        return whole

    def filled(self) -> None:
        """Spread the pieces to where they belong."""
        if self._scratch is not None:
            at, flat = 0, self._scratch.reshape(-1)
            for piece in self._pieces():
                piece[:] = flat[at : at + piece.size]
                at += piece.size
            self._scratch = None

    def _pieces(self) -> list[Bytes]:
        sizes = self._form.sizes
        return [_at(a, (s,), (1,)) for a, s in zip(self._addresses, sizes, strict=True)]

    def _whole(self) -> Bytes | None:
        """The pieces as one array, if they are equally far apart."""
        layers, size = self._form.shape
        first = self._addresses[0]
        if len(self._addresses) != layers:
            return None
        step = self._addresses[1] - first if layers > 1 else size
        if any(first + n * step != address for n, address in enumerate(self._addresses)):
            return None
        return _at(first, (layers, 1, size), (step, size, 1))


class FlatPage:
    """A page that its pool makes flat, and takes flat."""

    def __init__(self, pool: HostPool, form: Form, index: int) -> None:
        self._pool = pool
        self._form = form
        self._index = index
        self._page: torch.Tensor | None = None

    def source(self) -> Bytes:
        """The page, made flat."""
        return rows_of(self._pool.get_data_page(self._index, flat=True), self._form)

    def target(self) -> Bytes:
        """A flat page to be filled."""
        self._page = self._pool.get_dummy_flat_data_page()
        return rows_of(self._page, self._form)

    def filled(self) -> None:
        """Have the pool take the page."""
        if self._page is not None:
            self._pool.set_from_flat_data_page(self._index, self._page)
            self._page = None


class TensorPlace:
    """A page that the engine has, or wants, as a tensor of its own."""

    def __init__(self, form: Form, tensor: torch.Tensor) -> None:
        self._form = form
        self._tensor = tensor
        self._own: torch.Tensor | None = None

    @property
    def fits(self) -> bool:
        """Whether the tensor has as many bytes as a page."""
        return self._tensor.numel() * self._tensor.element_size() == self._form.page_bytes

    def source(self) -> Bytes:
        """The tensor's bytes."""
        return rows_of(self._tensor, self._form)

    def target(self) -> Bytes:
        """The tensor itself, or one like it where it is not one run of host memory."""
        tensor = self._tensor
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            tensor = self._own = torch.empty(tensor.shape, dtype=tensor.dtype)
        return rows_of(tensor, self._form)

    def filled(self) -> None:
        """Copy to the tensor what was filled beside it."""
        if self._own is not None:
            self._tensor.copy_(self._own)
            self._own = None


def rows_of(tensor: torch.Tensor, form: Form) -> Bytes:
    """A tensor's bytes as a page of the store; of one that is contiguous, the same memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _row(form, flat)


def _row(form: Form, flat: Bytes) -> Bytes:
    layers, size = form.shape
    return flat.reshape(layers, 1, size)


class _Memory:
    """Some of the engine's memory, as numpy asks for it."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": "|u1",
            "version": 3,
        }


def _at(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Bytes:
    return np.asarray(_Memory(address, shape, strides))
