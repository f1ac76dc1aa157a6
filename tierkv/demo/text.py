"""The demo's text: a long real document made from the standard library's own docstrings.

The order is fixed, so that one Python version always gives the same document, and with it the
same block keys, in every process.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tierkv.core.errors import ConfigError

#: Modules whose docstrings explain something in whole sentences, in the order they are read.
_MODULES: Final = (
    "heapq",
    "textwrap",
    "random",
    "graphlib",
    "shutil",
    "tempfile",
    "statistics",
    "threading",
    "argparse",
    "datetime",
)

#: What is asked about the document: when nothing is stored yet, then when it is, and at last
#: after a restart, so that no answer is found because its own question was asked before.
QUESTIONS: Final = (
    "Explain in two sentences what this document is about.",
    "What does textwrap.dedent do, and when is it useful?",
    "What is a heap, and what can it be used for?",
)

#: A prompt so short that computing it costs about as much as looking it up.
SHORT_QUESTION: Final = "What is the capital of France?"

#: The modules a chat begins with, and what is said turn by turn.
CHAT_MODULES: Final = ("graphlib", "heapq")
CHAT_TURNS: Final = (
    "Here is a part of a manual. In one sentence, what is it about?",
    "What does a topological sort give?",
    "And what is a heap good for?",
)

CountTokens = Callable[[str], int]


def document(tokens_target: int, count_tokens: CountTokens) -> str:
    """Docstrings up to about `tokens_target` tokens, never more; whole docstrings only.

    Raises ConfigError if this Python comes without the sources of its standard library.
    """
    return _collect(_MODULES, tokens_target, count_tokens)


def chat_document(tokens_target: int, count_tokens: CountTokens) -> str:
    """As `document`, from the modules that the chat is about."""
    return _collect(CHAT_MODULES, tokens_target, count_tokens)


def _collect(modules: tuple[str, ...], tokens_target: int, count_tokens: CountTokens) -> str:
    parts: list[str] = []
    tokens = 0
    for section in _sections(modules):
        # A separator may fuse with what is beside it, so a sum is close to the count, not equal.
        size = count_tokens(section + "\n\n")
        if tokens + size > tokens_target:
            break
        parts.append(section)
        tokens += size
    if not parts:
        raise ConfigError(
            "the demo's document is made of the standard library's docstrings, and this Python"
            " has none (its .py sources are missing)"
        )
    return "\n\n".join(parts)


def _sections(modules: tuple[str, ...]) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in modules:
        path = root / f"{module}.py"
        if not path.is_file():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        text = ast.get_docstring(tree)
        yield f"# Module {module}\n\n{text}" if text else f"# Module {module}"
        for name, node in _definitions(tree, module):
            text = ast.get_docstring(node)
            if text:
                yield f"## {name}\n\n{text}"


def _definitions(
    tree: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Public classes, functions and methods, as they come in the source."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name)
