"""Configurations that somebody may write by mistake or in malice: the catalogue of `configs`.

Every setting of `Config` is met with every kind of wrong value for its kind, and with a wrong
name; then come texts that are wrong as a whole, files that are no files, and configurations that
are well formed and absurd: those load, and it is for `Store.open` to work or to refuse.
"""

from __future__ import annotations

import codecs
import os
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import BaseModel

from tierkv.config import Config, NamespaceConfig
from tierkv.config_yaml import FILE_BYTES_MAX

#: A configuration for a tiny model, all of it beneath the file's own directory.
SMALL: Final = """\
block_tokens: 4
pages: {hot: 1KiB, warm: 4KiB, cold: 8KiB}
tiers:
  device: {device: cpu, capacity: 0}
  host: {capacity: 64KiB, prefault_threads: 1, register_cuda: "off"}
  cold: {capacity: 64KiB, directory: cold, segment_cold_pages: 1, threads: 1}
transfer: {link_profiles: null, flush_deadline_ms: 5000}
namespaces:
  default: {}
  a: {salt: s, host_quota: 50%, cold_quota: 50%, ttl_s: 3600}
event_log: null
"""


class Bad(NamedTuple):
    """A file, how to put it there, and words that its refusal has; None: it loads."""

    name: str
    put: Callable[[Path], object]
    words: str | None


_ANY: Final = (
    "[1, 2]", "{a: 1}", "!!python/object/apply:os.system ['touch executed']", "!env HOME",
    "&x 16KiB", "*x", '"\\ud800"', "017", "0x1F", "1_000", "1:30", "!!binary aGk=",
)  # fmt: skip
_NUMBER: Final = (".inf", "-.inf", ".nan", "-1", "'8'", "true", "null", "", "''", "eight", "9" * 60)
_COUNT: Final = (*_NUMBER, "1.5", "1e3", "8KiB", "99999999999", "-99999999999")
_SIZE: Final = (
    ".inf", ".nan", "-1", "-1GiB", "1.5", "1e9", "true", "null", "", "''", "big", "9" * 60, "64G",
    "64g", "64gib", "64Gb", "GiB", "64 G i B", "1,5GiB", "5 %%", "99999999999TiB", "'64'",
    "0.0000000001B", "64Gi", "64 gigabytes", "\N{FULLWIDTH DIGIT SIX}GiB",
)  # fmt: skip
_SHARE: Final = (*_SIZE, "0%", "101%", "-5%", "'%'", "1e1%", "100.0000001%")
_SWITCH: Final = ("1", "0", "1.5", "'true'", "yes please", "null", "", "''", "[true]")
_CHOICE: Final = ("1", "1.5", "true", "null", "", "''", "'no such'", "auto auto", "x" * 5000)
_PATH: Final = ("5", "1.5", "true", "''", "/", "/a/..", "../" * 100, '"a\\0b"', "a" * 5000)
_TEXT: Final = ("17", "1.5", "true", "null", "", "s" * 257, '"a\\nb"', '"\\e[31m"', "ü" * 129)

#: Wrong values by the last part of a key; else by the type of the default.
_BY_NAME: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("hot", "warm", "cold", "piece", "inflight_max", "staging"), (*_SIZE, "5%")),
    "capacity": (*_SHARE, "64", "4095"),
    **dict.fromkeys(("host_quota", "cold_quota"), _SHARE),
    **dict.fromkeys(("directory", "event_log", "link_profiles", "key_file"), _PATH),
    "salt": _TEXT,
    "ttl_s": (".inf", "-.inf", ".nan", "-1", "0", "'8'", "true", "1e999", "1e300", "5m", "9" * 60),
    "numa": ("-1", "1024", "1.5", "true", "null", "''", "all"),
}
#: Sections, and a key that holds one.
_SECTION: Final = ("16", "text", "true", "null", "", "[a, b]", "'{}'", "- a", "1.5")


def settings() -> dict[tuple[str, ...], object]:
    """Every key of a configuration by its path, with its default; a tenant's beneath ``a``."""
    found: dict[tuple[str, ...], object] = {}

    def walk(section: BaseModel, prefix: tuple[str, ...]) -> None:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                walk(value, (*prefix, name))
            elif name != "namespaces":
                found[*prefix, name] = value

    walk(Config(), ())
    walk(NamespaceConfig(), ("namespaces", "a"))
    return found


@lru_cache(maxsize=1)
def catalogue() -> list[Bad]:
    """Every bad configuration, always in this order."""
    made = [*_values(), *_names(), *_sections()]
    made += [Bad(name, _text(data), words) for name, data, words in _TEXTS]
    made += [Bad(name, put, words) for name, put, words in _FILES]
    return made + [Bad(f"absurd: {text[:60]}", _text(absurd(text)), None) for text in _ABSURD]


def _values() -> Iterator[Bad]:
    for path, default in settings().items():
        for value in (*wrong_values(path[-1], default), *_ANY):
            name = f"{'.'.join(path)}: {value[:40]}"
            yield Bad(name, _text(nested(path, value)), ".".join(path))


def wrong_values(name: str, default: object) -> tuple[str, ...]:
    """What no setting of this name accepts."""
    known = _BY_NAME.get(name)
    if known is None and isinstance(default, bool):
        known = _SWITCH
    elif known is None:
        known = _COUNT if isinstance(default, int | float) else _CHOICE
    return known


def _names() -> Iterator[Bad]:
    """Every key misspelt, in capitals, with a dash, twice, and with another's beside it."""
    for path in settings():
        *above, name = path
        where = ".".join(path)
        odd = {name[:-2] + name[-1], name.upper(), f"{name}s", f"{name}.x", f"'{name}\\n'"}
        odd |= {name.replace("_", "-") + "-x", f'"{name}\\0"', f"<<{name}"}
        for wrong in sorted(odd):
            yield Bad(f"{where} as {wrong}", _text(nested((*above, wrong), "1")), "unknown key")
        yield Bad(f"{where} open", _text(nested((*above, f"<<: {{{name}"), "1")), "")
        twice = nested(path, "1") + "  " * len(above) + f"{name}: 1\n"
        yield Bad(f"{where} twice", _text(twice), "is set twice")


def _sections() -> Iterator[Bad]:
    sections = {path[:end] for path in settings() for end in range(1, len(path))}
    for path in sorted(sections):
        for value in _SECTION:
            yield Bad(f"section {'.'.join(path)}: {value}", _text(nested(path, value)), "")
    for name in (*_TENANTS,):
        yield Bad(f"tenant {name[:40]}", _text(nested(("namespaces", name), "{}")), "")


def nested(path: tuple[str, ...], value: str) -> str:
    """A text that sets `path` to `value` and nothing else."""
    lines = [f"{'  ' * depth}{key}:" for depth, key in enumerate(path)]
    return "\n".join(lines) + f" {value}\n"


def absurd(text: str) -> str:
    """`SMALL` with the last of several equal keys: each line of `text` is ``path: value``."""
    made = SMALL
    for line in text.split("; "):
        key, _, value = line.partition(": ")
        section, _, name = key.rpartition(".")
        made = _set(made, section, name, value)
    return made


def _set(text: str, section: str, name: str, value: str) -> str:
    """Set a key in a section of `SMALL` that is written on one line, or at the top."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        head, brace, rest = line.partition("{")
        if not section and line.startswith(f"{name}:"):
            lines[number] = f"{name}: {value}"
        elif brace and head.strip() == f"{section.rpartition('.')[2]}:":
            parts = [p for p in rest.rstrip("}").split(", ") if p and not p.startswith(f"{name}:")]
            lines[number] = f"{head}{{{', '.join([*parts, f'{name}: {value}'])}}}"
    return "\n".join(lines)


def _text(data: str | bytes) -> Callable[[Path], object]:
    made = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return lambda path: path.write_bytes(made)


_TENANTS: Final = (
    "''", "'a b'", "a/b", ".a", "-a", "..", "a" * 64, "αβγ", "'a\\0'", '"a\\nb"', "'a:b'", "123",
    "~", "true", "1.5", "'%s'", '"\\u202e"', "a\\b", "_a", "'*'",
)  # fmt: skip

_BOMB: Final = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
)
_NOISE: Final = random.Random("bad configs").randbytes(4096)

#: Texts that are wrong as a whole: name, text, words of the refusal.
_TEXTS: Final[tuple[tuple[str, str | bytes, str], ...]] = (
    ("nothing", "", "no settings"),
    ("blanks", " \n\n   \n", "no settings"),
    ("a comment", "# x", "no settings"),
    ("null", "null", "no settings"),
    ("a list", "- a\n- b", "not a list"),
    ("a word", "hello", "not a single value"),
    ("json text", '"a: 1"', "not a single value"),
    ("two documents", "block_tokens: 1\n---\nblock_tokens: 2", "second document"),
    ("a document's end", "block_tokens: 1\n...\nblock_tokens: 2", ""),
    ("a directive", "%YAML 1.1\n---\nblock_tokens: 1", "directives"),
    ("a tag directive", "%TAG ! tag:x,2000:\n---\na: 1", "directives"),
    ("an unknown directive", "%FOO bar\n---\nblok: 1", ""),
    ("a tab for an indent", "pages:\n\thot: 1KiB", "use spaces"),
    ("a tab at the beginning", "\tpages: {}", "use spaces"),
    ("a wrong indent", "pages:\n  hot: 1KiB\n warm: 2MiB", ""),
    ("no blank behind the colon", "block_tokens:16", "not a single value"),
    ("two colons", "block_tokens: 16: 17", "not allowed"),
    ("an equals sign", "block_tokens = 16", "not a single value"),
    ("toml", "[pages]\nhot = 1", ""),
    ("ini", "[pages]\nhot: 1KiB", ""),
    ("json cut short", '{"pages": {"hot": "1KiB"', ""),
    ("json and more", '{"pages": {}}}', ""),
    ("json with a comment", '{"pages": {}} // x', ""),
    ("xml", "<pages hot='1KiB'/>", "not a single value"),
    ("a shell variable", "tiers: {cold: {capacity: ${SIZE}}}", ""),
    ("a template", "tiers: {cold: {capacity: {{ size }}}}", ""),
    ("an open quote", "event_log: 'abc\n", ""),
    ("an open double quote", 'event_log: "abc', ""),
    ("an open brace", "pages: {hot: 1KiB", ""),
    ("a closing brace", "pages: }", ""),
    ("a bad escape", 'event_log: "\\q"', ""),
    ("an escape beyond Unicode", 'event_log: "\\UFFFFFFFF"', ""),
    ("half a character as a key", '"\\ud800": 1', "half a character"),
    ("an at sign", "event_log: @home", ""),
    ("a backtick", "event_log: `touch executed`", ""),
    ("a percent sign first", "event_log: %x", ""),
    ("a NUL", "event_log: a\0b", "control character"),
    ("a NUL at the end", "block_tokens: 16\n\0", "control character"),
    ("a terminal escape", "event_log: \x1b[31mx", "control character"),
    ("a bell", "block_tokens: 16 # \a", "control character"),
    ("C1 controls", "event_log: a\x9b31m", "control character"),
    ("a surrogate", "event_log: \ud800", "not UTF-8"),
    ("Latin-1", b"event_log: caf\xe9", "not UTF-8"),
    ("a cut character", b"event_log: \xe2\x82", "not UTF-8"),
    ("an overlong NUL", b"event_log: \xc0\x80", "not UTF-8"),
    ("bytes beyond Unicode", b"a: \xf5\x80\x80\x80", "not UTF-8"),
    ("UTF-16", "block_tokens: 16\n".encode("utf-16"), "not UTF-8"),
    ("UTF-16 without a mark", "block_tokens: 16\n".encode("utf-16-le"), "control character"),
    ("UTF-32", "block_tokens: 16\n".encode("utf-32"), ""),
    ("a byte order mark within", b"pages: {}\n" + codecs.BOM_UTF8 + b"block_tokens: 16", ""),
    ("noise", _NOISE, "not UTF-8"),
    ("noise in ASCII", bytes(byte & 127 for byte in _NOISE), ""),
    ("gzip", b"\x1f\x8b\x08" + _NOISE[:100], ""),
    ("an ELF file", b"\x7fELF\2\1\1" + bytes(64), "control character"),
    ("a long line", "event_log: " + "a" * 900_000, "4095"),
    ("a long quoted line", 'event_log: "' + "a" * 900_000 + '"', "4095"),
    ("a long key", "? " + "k" * 900_000 + "\n: 1", "unknown key"),
    ("a long comment", "blok: 1 #" + "c" * 900_000, "unknown key"),
    ("a long tag", "a: " + "!" * 900_000, "tags"),
    ("a long anchor", "a: &" + "x" * 900_000 + " 1", "anchors"),
    ("a long number", "block_tokens: " + "9" * 900_000, "too many digits"),
    ("a long escape", 'event_log: "' + "\\x41" * 200_000 + '"', "4095"),
    ("half a million line ends", "\n" * 500_000 + "blok: 1", ":500001:1: "),
    ("carriage returns", "\r" * 500_000 + "blok: 1", "unknown key"),
    ("a mebibyte and more", "#" * (FILE_BYTES_MAX + 1), "larger than"),
    ("many lists", "a: " + "[" * 500_000, "nested deeper"),
    ("many lists, closed", "a: " + "[" * 5_000 + "]" * 5_000, "nested deeper"),
    ("many mappings", "{a: " * 100_000, "nested deeper"),
    ("many dashes", "- " * 400_000, "nested deeper"),
    ("many questions", "? " * 400_000, ""),
    ("many indents", "\n".join(" " * n + "a:" for n in range(1000)), "nested deeper"),
    ("many keys", "".join(f"k{n}: 1\n" for n in range(60_000)), ""),
    ("many values", "a: [" + "1," * 400_000 + "1]", "keys and values"),
    ("many tenants", "namespaces:\n" + "".join(f"  t{n}: {{}}\n" for n in range(1025)), "1024"),
    ("many documents", "---\n" * 200_000, "no settings"),
    ("many equal keys", "block_tokens: 1\n" * 5_000, "is set twice"),
    ("an alias bomb", _BOMB, "aliases"),
    ("an alias of itself", "a: &a [*a]", "aliases"),
    ("an alias of a key", "? &k pages\n: *k", "aliases"),
    ("a merge key", "pages: {<<: {hot: 1KiB}}", "merge keys"),
    ("a merge of an alias", "a: &a {hot: 1KiB}\npages: {<<: *a}", "merge keys"),
    ("a merge of a list", "pages: {<<: [{hot: 1KiB}]}", "merge keys"),
    ("a call", "!!python/object/apply:os.system ['touch executed']", "tags"),
    ("a call as a key", "? !!python/object/apply:os.system ['touch executed']\n: 1", ""),
    ("a module", "pages: !!python/module:antigravity {}", "tags"),
    ("a name", "pages: !!python/name:os.system {}", "tags"),
    ("an object", "pages: !!python/object/new:subprocess.Popen [[touch, executed]]", "tags"),
    ("a set", "pages: !!set {hot}", "tags"),
    ("an ordered map", "pages: !!omap [hot: 1KiB]", "tags"),
    ("a verbatim tag", "pages: !<tag:yaml.org,2002:map> {}", "tags"),
    ("a number as a key", "1: 2", "a key must be text"),
    ("null as a key", "~: 2", "a key must be text"),
    ("a list as a key", "? [a]\n: 1", "plain text"),
    ("warm below hot", "pages: {hot: 8KiB, warm: 4KiB}", "less than pages.hot"),
    ("cold below warm", "pages: {warm: 2MiB, cold: 1MiB}", "less than pages.warm"),
    ("percent of a GPU", "tiers: {device: {device: cuda, capacity: 5%}}", "device: cpu"),
)


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _locked_away(path: Path) -> None:
    path.write_text("block_tokens: 0\n")
    path.chmod(0)


#: Files that are none, or cannot be read.
_FILES: Final[tuple[tuple[str, Callable[[Path], object], str], ...]] = (
    ("no file", lambda _path: None, "no such file"),
    ("a directory", Path.mkdir, "is a directory"),
    ("a pipe", os.mkfifo, "not a regular file"),
    ("a link to nothing", lambda path: path.symlink_to("absent"), "no such file"),
    ("a link to itself", _link_to_itself, "cannot be read"),
    ("a link to endless zeros", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ("a link to a directory", lambda path: path.symlink_to("."), "is a directory"),
    ("a file for none to read", _locked_away, ""),
)

#: Well formed and absurd, on top of `SMALL`; ``DIR`` stands for what the file's directory holds.
_ABSURD: Final = (
    "tiers.host.capacity: 9000TiB",
    "tiers.host.capacity: 0",
    "tiers.host.capacity: 4096",
    "tiers.host.capacity: 0; tiers.cold.capacity: 0",
    "tiers.cold.capacity: 9000TiB",
    "tiers.cold.capacity: 8000000TiB",
    "tiers.cold.capacity: 4096",
    "tiers.cold.capacity: 9000TiB; tiers.cold.segment_cold_pages: 4096",
    "tiers.device.capacity: 9000TiB",
    "tiers.device.capacity: 4096",
    "tiers.device.device: cuda:999; tiers.device.capacity: 1MiB",
    "tiers.cold.engine: gds",
    "tiers.cold.directory: file",
    "tiers.cold.directory: file/below",
    "tiers.cold.directory: ../cold-beside",
    "tiers.cold.directory: a/../../cold-beside/./b",
    "tiers.cold.directory: " + "d/" * 1500 + "d",
    "tiers.cold.directory: " + "n" * 256,
    "tiers.cold.directory: loop",
    "tiers.cold.directory: pipe",
    "tiers.cold.directory: open",
    "tiers.cold.directory: /proc/tierkv",
    "tiers.cold.directory: /sys/tierkv",
    "tiers.cold.directory: /dev/null",
    "tiers.cold.directory: '%s{0}$(touch executed)'",
    "tiers.cold.segment_cold_pages: 4096",
    "tiers.cold.threads: 256",
    "tiers.cold.piece: 1",
    "tiers.cold.piece: 9000TiB",
    "tiers.cold.breaker_slow_ms: 1",
    "tiers.cold.breaker_faults: 1",
    "tiers.cold.sync: always",
    "tiers.host.numa: 1023",
    "tiers.host.prefault_threads: 256",
    "tiers.host.register_threads: 64",
    "transfer.inflight_max: 1",
    "transfer.inflight_max: 9000TiB",
    "transfer.staging: 1",
    "transfer.demand_deadline_ms: 1",
    "transfer.put_deadline_ms: 1",
    "transfer.flush_deadline_ms: 1",
    "block_tokens: 4096",
    "block_tokens: 4095",
    "block_tokens: 1",
    "pages.hot: 1; pages.warm: 1; pages.cold: 1",
    "pages.warm: 3000",
    "pages.warm: 4097; pages.cold: 8193",
    "pages.cold: 9000TiB",
    "pages.warm: 9000TiB; pages.cold: 9000TiB",
    "namespaces.a.ttl_s: 1e-300",
    "namespaces.a.ttl_s: 1e9",
    "namespaces.a.host_quota: 0",
    "namespaces.a.cold_quota: 1",
    "namespaces.a.host_quota: 0; namespaces.a.cold_quota: 0",
    "namespaces.default.host_quota: 1; namespaces.default.cold_quota: 1",
    "event_log: file/log",
    "event_log: loop",
    "event_log: .",
    "event_log: log/below/here",
    "event_log: /dev/full",
    "event_log: pipe",
)


def furnish(folder: Path) -> None:
    """Put what `_ABSURD` names into a directory."""
    (folder / "file").write_bytes(b"mine")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe", 0o600)
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
