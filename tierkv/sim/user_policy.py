"""A policy of one's own: `my.py:MyPolicy`, a program that the user names, run like `python my.py`.

What goes wrong in it is a ConfigError that names file and line; what it gives up is checked, since
a replay would go on with wrong figures.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Final, cast

from tierkv.core.errors import ConfigError
from tierkv.plan.policies.base import About, EvictionPolicy, Name

_PROMISED: Final = (
    *("may_refuse", "wants_names", "expect", "track", "touch", "renew", "forget", "evict"),
    "__len__",
)


def load_policy(program: str) -> type[EvictionPolicy]:
    """The class that `FILE.py:CLASS` names. Raises ConfigError where it is no policy."""
    path, name = split_program(program)
    try:
        module = _run_file(path)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the program raises
        raise ConfigError(told(path, error)) from None
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ConfigError(f"{path}: there is no class {name!r} in it")
    absent = [word for word in _PROMISED if not hasattr(found, word)]
    if absent:
        where = "see tierkv/plan/policies/base.py"
        raise ConfigError(f"{path}: {name} is no policy, it has no {', '.join(absent)}; {where}")
    return cast("type[EvictionPolicy]", found)


def split_program(program: str) -> tuple[Path, str]:
    """File and class of `FILE.py:CLASS`. Raises ConfigError for what is not written so."""
    file, colon, name = program.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not name.isidentifier():
        raise ConfigError(f"--policy {program!r}: write FILE.py:CLASS")
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"--policy {program!r}: {path} is no Python file")
    return path, name


def told(path: Path, error: BaseException) -> str:
    """`file:line: Error: text`, with the last line of that file that took part."""
    line: int | None = None
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    where = f"{path}:{line}" if line is not None else str(path)
    return f"{where}: {type(error).__name__}: {str(error)[:300]}"


def _run_file(path: Path) -> ModuleType:
    """The one place that runs a file: the user's own program, named on the command line."""
    spec = importlib.util.spec_from_file_location(f"tierkv_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Checked:
    """A policy whose evictions are looked at: raises ValueError for what it may not give up."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._tracked: set[int] = set()
        self.may_refuse = bool(policy.may_refuse)
        self.wants_names = bool(policy.wants_names)

    def expect(self, names: Iterable[Name]) -> None:
        """As the policy."""
        self._policy.expect(names)

    def track(self, page: int, now_ns: int, about: About) -> None:
        """As the policy."""
        self._tracked.add(page)
        self._policy.track(page, now_ns, about)

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        """As the policy."""
        self._policy.touch(pages, now_ns)

    def renew(self, pages: Iterable[int], now_ns: int) -> None:
        """As the policy."""
        self._policy.renew(pages, now_ns)

    def forget(self, page: int) -> None:
        """As the policy."""
        self._tracked.discard(page)
        self._policy.forget(page)

    def evict(
        self, count: int, is_evictable: Callable[[int], bool], now_ns: int, *, must: bool = False
    ) -> list[int]:
        """As the policy, and looked at."""
        victims = self._policy.evict(count, is_evictable, now_ns, must=must)
        if not isinstance(victims, list) or len(victims) > count:
            raise ValueError(f"evict({count}) has to give a list of at most {count} pages")
        for page in victims:
            if page not in self._tracked or not is_evictable(page):
                raise ValueError(f"evict gave {page!r}, which is not tracked or not evictable")
            self._tracked.discard(page)
        return victims

    def __len__(self) -> int:
        return len(self._policy)
