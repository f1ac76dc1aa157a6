from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tierkv import ConfigError
from tierkv.config import load_config
from tierkv.config_text import DEPTH_MAX, read_document
from tierkv.config_yaml import FILE_BYTES_MAX, PROBLEMS_MAX, ConfigFileError

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


# --- what is refused: by hand

# (name, text, line, column, part of the message)
BY_HAND: list[tuple[str, str, int, int, str]] = [
    ("empty", "", 1, 1, "holds no settings"),
    ("blank", "\n\n  \n", 1, 1, "holds no settings"),
    ("comment only", "# nothing\n", 1, 1, "holds no settings"),
    ("only a start", "---\n", 2, 1, "holds no settings"),
    ("null", "null", 1, 1, "holds no settings"),
    ("tilde", "~", 1, 1, "holds no settings"),
    ("a list", "- a\n- b\n", 1, 1, "must be a mapping (key: value), not a list"),
    ("a flow list", "[1, 2]", 1, 1, "not a list"),
    ("a word", "hello", 1, 1, "not a single value"),
    ("a number", "42", 1, 1, "not a single value"),
    ("a text", "'text'", 1, 1, "not a single value"),
    ("a block text", "|\n  text\n", 1, 1, "not a single value"),
    ("json string", '"a: 1"', 1, 1, "not a single value"),
    ("unknown key", "blok_tokens: 16", 1, 1, "did you mean 'block_tokens'?"),
    ("unknown far key", "zzz: 16", 1, 1, "known here: block_tokens, pages, tiers"),
    ("unknown nested", "tiers:\n  hots: {}", 2, 3, "did you mean 'host'?"),
    ("unknown deep", "tiers:\n  host:\n    capasity: 1GiB", 3, 5, "did you mean 'capacity'?"),
    ("unknown in tenant", "namespaces:\n  a:\n    quota: 1GiB", 3, 5, "did you mean"),
    ("wrong case", "Pages: {}", 1, 1, "did you mean 'pages'?"),
    ("dash for underscore", "block-tokens: 8", 1, 1, "did you mean 'block_tokens'?"),
    ("lmcache's unit", "tiers:\n  host:\n    size_gb: 4", 3, 5, "unknown key"),
    ("duplicate", "block_tokens: 16\nblock_tokens: 32", 2, 1, "first time in line 1"),
    ("duplicate nested", "pages:\n  hot: 1KiB\n  hot: 2KiB", 3, 3, "is set twice"),
    ("duplicate section", "pages: {hot: 1KiB}\npages: {hot: 2KiB}", 2, 1, "is set twice"),
    ("duplicate quoted", "pages:\n  hot: 1KiB\n  'hot': 2KiB", 3, 3, "is set twice"),
    ("duplicate tenant", "namespaces:\n  a: {}\n  a: {}", 3, 3, "is set twice"),
    ("anchor", "pages: &p {hot: 16KiB}", 1, 8, "anchors"),
    ("alias", "pages: {hot: &h 16KiB, warm: *h}", 1, 30, "aliases"),
    ("alias unknown", "pages: *nothing", 1, 8, "aliases"),
    ("alias key", "? *a\n: 1", 1, 3, "a key must be plain text"),
    ("anchored key", "&a pages: {}", 1, 1, "anchors"),
    ("merge", "pages:\n  <<: {hot: 1KiB}", 2, 3, "merge keys"),
    ("tag", "block_tokens: !!int '16'", 1, 15, "tags are not accepted"),
    ("python tag", "pages: !!python/object:os.system {}", 1, 8, "tags are not accepted"),
    (
        "python apply",
        "pages: !!python/object/apply:os.system ['id']",
        1,
        8,
        "tags are not accepted",
    ),
    ("local tag", "pages: !env HOME", 1, 8, "tags are not accepted"),
    ("bang", "block_tokens: ! 16", 1, 15, "tags are not accepted"),
    ("tagged key", "!!str pages: {}", 1, 1, "tags are not accepted"),
    ("binary", "event_log: !!binary aGk=", 1, 12, "tags are not accepted"),
    ("yaml 1.1", "%YAML 1.1\n---\nblock_tokens: 16", 2, 1, "directives"),
    ("yaml 1.2", "%YAML 1.2\n---\nblock_tokens: 16", 2, 1, "directives"),
    ("tag directive", "%TAG ! tag:x,2000:\n---\nblock_tokens: 16", 2, 1, "directives"),
    ("unknown directive version", "%YAML 99999.1\n---\na: 1", 1, 1, ""),
    ("two documents", "block_tokens: 16\n---\nblock_tokens: 32", 2, 1, "second document"),
    ("number key", "1: 2", 1, 1, "a key must be text"),
    ("null key", "~: 2", 1, 1, "a key must be text"),
    ("empty key", ": 2", 1, 1, "a key must be text"),
    ("true key", "true: 2", 1, 1, "a key must be text"),
    ("float key", "1.5: 2", 1, 1, "a key must be text"),
    ("octal key", "017: 2", 1, 1, "a key must be text"),
    ("tenant number", "namespaces:\n  123: {}", 2, 3, "a key must be text"),
    ("list key", "? [a, b]\n: 1", 1, 3, "a key must be plain text"),
    ("mapping key", "? {a: b}\n: 1", 1, 3, "a key must be plain text"),
    ("key without value", "block_tokens:\n", 1, 1, "must be a whole number"),
    ("section without value", "tiers:\n  host:\n", 2, 3, "must be a mapping"),
    ("section null", "tiers: null", 1, 8, "must be a mapping"),
    ("section a word", "tiers: host", 1, 8, "must be a mapping"),
    ("section a list", "tiers:\n- host\n", 2, 1, "must be a mapping"),
    ("section a number", "pages: 16384", 1, 8, "must be a mapping"),
    ("namespaces a list", "namespaces: [a, b]", 1, 13, "must be a mapping"),
    ("namespace null", "namespaces:\n  a:\n", 2, 3, "must be a mapping"),
    ("tab indents", "pages:\n\thot: 16KiB", 2, 1, "use spaces"),
    ("tab first", "\tpages: {}", 1, 1, "use spaces"),
    ("tab after spaces", "tiers:\n  host:\n  \tcapacity: 1GiB", 3, 4, ""),
    ("bad indent", "pages:\n  hot: 16KiB\n warm: 2MiB", 3, 2, ""),
    ("indent too deep", "block_tokens: 16\n  pages: {}", 2, 8, ""),
    ("colon twice", "block_tokens: 16: 17", 1, 17, "not allowed here"),
    ("no space", "block_tokens:16", 1, 1, "not a single value"),
    ("open brace", "pages: {hot: 16KiB", 1, 19, ""),
    ("open bracket", "pages: [", 1, 9, ""),
    ("open quote", "event_log: 'abc\n", 2, 1, "begun in line 1"),
    ("open double quote", 'event_log: "abc', 1, 16, "unexpected end"),
    ("closing brace", "pages: }", 1, 8, ""),
    ("bad escape", 'event_log: "\\q"', 1, 14, ""),
    ("escape beyond unicode", 'event_log: "\\UFFFFFFFF"', 1, 12, ""),
    ("escape surrogate", 'namespaces: {"\\uD800": {}}', 1, 14, "half a character"),
    ("value surrogate", 'namespaces: {a: {salt: "\\uDFFF"}}', 1, 24, "half a character"),
    ("at sign", "event_log: @home", 1, 12, ""),
    ("backtick", "event_log: `id`", 1, 12, ""),
    ("percent first", "event_log: %x", 1, 12, ""),
    ("control character", "event_log: a\x01b", 1, 13, "control character"),
    ("escape character", "a: 1\nevent_log: a\x1b[31mb", 2, 13, "control character"),
    ("null byte", "event_log: a\x00b", 1, 13, "control character"),
    ("json trailing", '{"pages": {}}}', 1, 14, ""),
    ("hot above warm", "pages:\n  hot: 4MiB", 2, 3, ""),
    ("warm above cold", "pages:\n  warm: 128MiB", 2, 3, ""),
    ("warm below hot", "pages:\n  warm: 4KiB", 2, 9, "less than pages.hot (16 KiB)"),
    ("cold below warm", "pages:\n  warm: 2MiB\n  cold: 1MiB", 3, 9, "less than pages.warm"),
    ("percent of pages", "pages:\n  hot: 5%", 2, 8, "a percentage (5%) has no meaning"),
    ("percent of piece", "tiers:\n  cold:\n    piece: 5%", 3, 12, "has no meaning"),
    ("percent on cuda", "tiers:\n  device: {device: cuda, capacity: 5%}", 2, 36, "device: cpu"),
    ("percent on auto", "tiers:\n  device: {capacity: 5%}", 2, 22, "device: cpu"),
    ("tenant with a space", "namespaces:\n  'a b': {}", 2, 3, "a namespace is named"),
    ("tenant with a slash", "namespaces:\n  a/b: {}", 2, 3, "a namespace is named"),
    ("tenant empty", "namespaces:\n  '': {}", 2, 3, "a namespace is named"),
    ("tenant with a dot first", "namespaces:\n  .a: {}", 2, 3, "a namespace is named"),
    ("tenant too long", "namespaces:\n  " + "a" * 64 + ": {}", 2, 3, "63 characters"),
    ("tenant in greek", "namespaces:\n  αβγ: {}", 2, 3, "a namespace is named"),
    ("salt a number", "namespaces:\n  a: {salt: 17}", 2, 13, "must be text"),
    ("salt too long", "namespaces:\n  a: {salt: " + "s" * 257 + "}", 2, 13, "256 bytes"),
    ("salt a line break", 'namespaces:\n  a: {salt: "a\\nb"}', 2, 13, "printable"),
    ("ttl zero", "namespaces:\n  a: {ttl_s: 0}", 2, 14, "must be more than 0"),
    ("ttl negative", "namespaces:\n  a: {ttl_s: -5}", 2, 14, "must be more than 0"),
    ("ttl nan", "namespaces:\n  a: {ttl_s: .nan}", 2, 14, "a finite number"),
    ("ttl inf", "namespaces:\n  a: {ttl_s: .inf}", 2, 14, "a finite number"),
    ("ttl huge", "namespaces:\n  a: {ttl_s: 1e999}", 2, 14, "a finite number"),
    ("ttl text", "namespaces:\n  a: {ttl_s: 5m}", 2, 14, "must be a number"),
    ("quota word", "namespaces:\n  a: {host_quota: all}", 2, 19, "is not a size"),
    ("quota above all", "namespaces:\n  a: {cold_quota: 150%}", 2, 19, "at most 100%"),
    ("quota zero", "namespaces:\n  a: {cold_quota: 0%}", 2, 19, "above 0%"),
    ("log directory", "event_log: /", 1, 12, "root directory"),
    ("log empty", "event_log: ''", 1, 12, "must be a path"),
    ("log number", "event_log: 5", 1, 12, "must be a path"),
    ("log list", "event_log: [a]", 1, 12, "must be a path"),
    ("log nul", 'event_log: "a\\0b"', 1, 12, "without NUL"),
    ("log too long", "event_log: " + "a" * 5000, 1, 12, "4095"),
    ("log nobody's home", "event_log: ~nosuchuser/x", 1, 12, "home directory"),
    ("directory root", "tiers:\n  cold: {directory: /}", 2, 21, "root directory"),
    ("directory dots", "tiers:\n  cold: {directory: /a/..}", 2, 21, "root directory"),
    ("hugepages no", "tiers:\n  host: {hugepages: no}", 2, 21, "did you mean 'off'?"),
    ("hugepages false", "tiers:\n  host: {hugepages: false}", 2, 21, "did you mean 'off'?"),
    ("hugepages always", "tiers:\n  host: {hugepages: always}", 2, 21, "off or auto or advise"),
    ("hugepages advice", "tiers:\n  host: {hugepages: advice}", 2, 21, "did you mean 'advise'?"),
    ("register true", "tiers:\n  host: {register_cuda: true}", 2, 25, "auto or off"),
    ("sync never", "tiers:\n  cold: {sync: never}", 2, 16, "flush or always"),
    ("engine typo", "tiers:\n  cold: {engine: drect}", 2, 18, "did you mean 'direct'?"),
    ("engine uring", "tiers:\n  cold: {engine: uring}", 2, 18, "known: auto, direct, portable"),
    ("policy typo", "tiers:\n  host: {policy: lruu}", 2, 18, "did you mean 'lru'?"),
    ("policy case", "tiers:\n  host: {policy: LRU}", 2, 18, "known: lru"),
    ("device gpu", "tiers:\n  device: {device: gpu}", 2, 20, "auto, cpu, cuda or cuda:N"),
    ("device minus", "tiers:\n  device: {device: 'cuda:-1'}", 2, 20, "cuda:N"),
    ("numa minus", "tiers:\n  host: {numa: -1}", 2, 16, "node number"),
    ("numa true", "tiers:\n  host: {numa: true}", 2, 16, "node number"),
    ("numa word", "tiers:\n  host: {numa: all}", 2, 16, "node number"),
    ("forgotten unit", "tiers:\n  host: {capacity: 64}", 2, 20, "for example 64GiB"),
    ("forgotten unit, cold", "tiers:\n  cold: {capacity: 500}", 2, 20, "for example 500GiB"),
]


@pytest.mark.parametrize(
    ("text", "line", "column", "part"),
    [pytest.param(*case[1:], id=case[0]) for case in BY_HAND],
)
def test_a_mistake_is_named_with_its_place_and_cure(
    tmp_path: Path, text: str, line: int, column: int, part: str
) -> None:
    error = refusal(write(tmp_path, text))
    assert any(part in problem.message for problem in error.problems), str(error)
    places = [problem.place for problem in error.problems if part in problem.message]
    if part:
        assert (line, column) in places, str(error)
    else:
        assert any(place.line in (line, line + 1) for place in places), str(error)


# --- what is refused: every setting with every kind of wrong value

WRONG_SIZES = [
    "-1", "-1GiB", "1.5", "1e9", "64G", "64g", "64gib", "64Gb", "64GiBs", "GiB", "big", "'64'",
    "''", "64 G i B", "1_000", "0x1000", "017", "1:30", ".inf", "-.inf", ".nan", "true", "no",
    "null", "[64GiB]", "{a: 1}", "99999999999999999999GiB", "1" * 50, "1,5GiB", "0.0000000001B",
]  # fmt: skip
WRONG_SHARES = ["0%", "101%", "-5%", "5 percent", "'%'", "1e1%", "50%%", "'5 0%'"]
WRONG_COUNTS = [
    "-1", "1.5", "'8'", "8 threads", "eight", "true", "null", "[8]", "{a: 8}", "0x10", "010",
    "1_0", "1e1", ".inf", ".nan", "9999999999", "9" * 60, "8KiB", "",
]  # fmt: skip
WRONG_NAMES = ["1", "1.5", "true", "null", "[a]", "{a: b}", "'no such'", "''", "0x1F"]

SIZES = ["pages.hot", "pages.warm", "pages.cold", "tiers.cold.piece", "transfer.inflight_max"]
SHARES = [
    "tiers.device.capacity", "tiers.host.capacity", "tiers.cold.capacity",
    "namespaces.a.host_quota", "namespaces.a.cold_quota",
]  # fmt: skip
COUNTS = [
    "block_tokens", "tiers.host.prefault_threads", "tiers.cold.segment_cold_pages",
    "tiers.cold.threads", "transfer.demand_deadline_ms", "transfer.put_deadline_ms",
    "transfer.flush_deadline_ms",
]  # fmt: skip
NAMES = [
    "tiers.device.device", "tiers.device.policy", "tiers.host.policy", "tiers.host.hugepages",
    "tiers.host.register_cuda", "tiers.cold.policy", "tiers.cold.engine", "tiers.cold.sync",
]  # fmt: skip

GENERATED = [
    *((path, value) for path in SIZES + SHARES for value in WRONG_SIZES),
    *((path, value) for path in SHARES for value in WRONG_SHARES),
    *((path, value) for path in COUNTS for value in WRONG_COUNTS),
    *((path, value) for path in NAMES for value in WRONG_NAMES),
]


def nested(path: str, value: str) -> tuple[str, int, int]:
    """A text that sets `path` to `value`, and the value's line and column."""
    keys = path.split(".")
    lines = [f"{'  ' * depth}{key}:" for depth, key in enumerate(keys)]
    column = len(lines[-1]) + 2
    lines[-1] += f" {value}"
    return "\n".join(lines) + "\n", len(lines), column


def test_there_are_at_least_three_hundred_bad_files() -> None:
    assert len(BY_HAND) + len(GENERATED) >= 300


@pytest.mark.parametrize("path", SIZES + SHARES + COUNTS + NAMES)
def test_every_setting_refuses_every_wrong_value_at_its_place(tmp_path: Path, path: str) -> None:
    for wrong_path, value in GENERATED:
        if wrong_path != path:
            continue
        text, line, column = nested(path, value)
        error = refusal(write(tmp_path, text))
        (problem,) = error.problems
        assert problem.path == path, (value, str(error))
        assert problem.place.line == line, (value, str(error))
        if value:
            assert problem.place.column == column, (value, str(error))
        assert "Traceback" not in error.report()


def test_all_problems_come_in_one_error_in_order_of_place(tmp_path: Path) -> None:
    text = """\
block_tokens: 0
pages:
  hot: 16G
  hot: 16KiB
  warm: &x 2MiB
tiers:
  host:
    capasity: 4GiB
    numa: north
namespaces: {a: {salt: 012}}
"""
    error = refusal(write(tmp_path, text))
    assert [problem.place.line for problem in error.problems] == [1, 4, 5, 8, 9, 10]
    assert [problem.path for problem in error.problems] == [
        "block_tokens",
        "pages.hot",
        "pages.warm",
        "tiers.host.capasity",
        "tiers.host.numa",
        "namespaces.a.salt",
    ]


def test_the_report_shows_the_line_with_a_caret(tmp_path: Path) -> None:
    path = write(tmp_path, "tiers:\n  host:\n    capasity: 4GiB\n")
    report = refusal(path).report().splitlines()
    assert report == [
        f"{path}:3:5: tiers.host.capasity: unknown key; did you mean 'capacity'?",
        "    3 |     capasity: 4GiB",
        "      |     ^",
    ]


def test_the_caret_stays_in_sight_in_a_long_line(tmp_path: Path) -> None:
    text = "{" + " " * 500 + "blok: 1}"
    head, line, caret = refusal(write(tmp_path, text)).report().splitlines()
    assert head.endswith("known here: block_tokens, pages, tiers, transfer, namespaces, event_log")
    assert len(line) < 100
    assert line[caret.index("^")] == "b"


def test_no_terminal_escape_of_a_file_reaches_the_report(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, '"\\e[31mkey": 1\nblok: \x9b31m'))
    assert "\x1b" not in error.report()
    assert "\x9b" not in error.report()


def test_many_problems_are_counted_not_all_written(tmp_path: Path) -> None:
    text = "".join(f"key{number}: 1\n" for number in range(PROBLEMS_MAX + 50))
    error = refusal(write(tmp_path, text))
    lines = str(error).splitlines()
    assert len(lines) == PROBLEMS_MAX + 1
    assert lines[-1].endswith("and 50 more problems")


def test_nesting_is_bounded(tmp_path: Path) -> None:
    deep = DEPTH_MAX + 1
    for text in ("[" * 20_000, "a: " + "[" * deep + "]" * deep, "? " * 20_000):
        error = refusal(write(tmp_path, text))
        assert "nested deeper" in str(error)


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    error = refusal(write(tmp_path, "\n".join(lines)))
    assert "aliases" in str(error)
    assert "anchors" in str(error)


# --- what is refused: files that are no files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path / "none.yaml"))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "is a directory" in str(refusal(tmp_path))


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in str(refusal(write(tmp_path, "{}") / "c.yaml"))


def test_a_name_that_no_file_can_have_is_refused() -> None:
    assert "cannot be read" in str(refusal(Path("a\0b")))
    assert "cannot be read" in str(refusal(Path("a" * 5000)))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in str(refusal(tmp_path / "pipe"))


def test_a_link_that_names_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in str(refusal(tmp_path / "loop"))


def test_more_than_a_mebibyte_is_refused_unread(tmp_path: Path) -> None:
    text = "#" * FILE_BYTES_MAX + "\n"
    assert "larger than 1 MiB" in str(refusal(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("data", "line", "column"),
    [
        (b"\xff\xfea\0:\0", 1, 1),
        (b"a: 1\nb: \xc3\x28", 2, 4),
        (b"caf\xe9: 1", 1, 4),
        ("é: 1\nü: ".encode() + b"\x80", 2, 4),
        (b"a: \xed\xa0\x80", 1, 4),
    ],
)
def test_what_is_not_utf8_is_refused_at_its_place(
    tmp_path: Path, data: bytes, line: int, column: int
) -> None:
    error = refusal(write(tmp_path, data))
    assert "is not UTF-8" in str(error)
    assert error.problems[0].place == (line, column)


# --- no text at all raises anything else

PIECES = st.sampled_from(
    ["\n", " ", "  ", "\t", ":", ": ", "- ", "? ", "[", "]", "{", "}", ",", "#", "&a ", "*a", "!",
     "!!int ", "|", ">", "'", '"', "%", "@", "`", "~", "---\n", "...\n", "<<", "\\", "\\x",
     "\ufeff", "\x85", "\u2028", "é", "0", "1e5", "64GiB", "5%", "tiers", "host",
     "capacity", "namespaces"]
)  # fmt: skip


@given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=60).map("".join)))
@example("%YAML 1" + "0" * 5000 + ".1\n---\na: 1")
@example("a: " + "9" * 5000)
@example("? - ? - ? -")
@example('"\\U00110000": 1')
@example("%TAG ! !\n%TAG ! !\n---\n")
@example("--- !<tag:x> a")
def test_any_text_gives_a_document_or_problems(text: str) -> None:
    document = read_document(text)
    assert document.problems or document.root is not None
    for problem in document.problems:
        assert problem.place >= (1, 1)


@given(data=st.data())
def test_a_damaged_reference_file_loads_or_is_refused_politely(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = bytearray(REFERENCE.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = write(tmp_path_factory.getbasetemp(), bytes(text), "damaged.yaml")
    with suppress(ConfigError):
        load_config(path)
        return
    refusal(path)
