"""What the source of a modeling module says: fingerprints of functions and classes, and what a mixer calls.

Read from the file rather than from the functions, which decorators and other packages wrap.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import tokenize
from collections.abc import Container
from dataclasses import dataclass
from types import ModuleType

KNOWN = {  # function -> the fingerprints of what fastlvm's stands for; one more where only the arithmetic's order moved
    "causal_conv1d_fn": {"1a6f5a558d60525c"},
    "causal_conv1d_update": {"ee7c7ea30c79b245"},
    "mamba_inner_fn": {"4faa8e288d817fb6"},
    "mamba_selective_scan": {"77642c70d66939ab"},
    "mamba_selective_state_update": {"50f2492929048299"},
    "mamba2_split_conv1d_scan_combined": {"1ea0131653a74834"},
    "mamba2_chunk_scan": {"a0a6c2e597400c91", "94d6c55cf9480e62"},
    "mamba2_selective_state_update": {"3db7442be9da7f23"},
}

FORWARDS = {  # mixer -> the fingerprints of its forward, of which `_mixers` takes one token
    "MambaMixer": {"a4385edd28d8be51", "bf5faa4b62fa7b66", "0efff806f26c90d6"},
    "FalconMambaMixer": {"d61fef2c33b7c328", "ad44d343e5ac88aa", "ff53f067e8677e63"},
    "JambaMambaMixer": {"9dda5c36a14f57fa", "ad5a1d5a1b8783ff", "2026f6daf1c3497e"},
}

_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
_LAYOUT = {tokenize.NEWLINE: "\n", tokenize.INDENT: ">", tokenize.DEDENT: "<"}


@dataclass(frozen=True)
class Source:
    """Fingerprints of a module's functions and its mixers' forwards, and the names that each class's forward calls."""

    functions: dict[str, str]
    forwards: dict[str, str]
    called: dict[str, set[str]]


def read(module: ModuleType, known: Container[str] = KNOWN) -> Source | None:
    """The source of a module, fingerprints of what is `known` by name; None where there is none to read."""
    try:
        text = inspect.getsource(module)
    except (OSError, TypeError):
        return None
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    named = [x for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and x.name in known]
    functions = {x.name: fingerprint(lines, x) for x in named}
    classes = {x.name: _forward(x) for x in tree.body if isinstance(x, ast.ClassDef)}
    forwards = {name: fingerprint(lines, x) for name, x in classes.items() if x is not None and name in FORWARDS}
    return Source(functions, forwards, {name: _called(x) for name, x in classes.items()})


def fingerprint(lines: list[str], node: ast.FunctionDef | ast.ClassDef) -> str:
    """A hash of a function or class from that word on, the same for any comments, line breaks and indentation."""
    text = "".join(lines[node.lineno - 1 : node.end_lineno])
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kept = [_LAYOUT.get(token.type, token.string) for token in tokens if token.type not in _IGNORED]
    return hashlib.sha256(" ".join(kept).encode()).hexdigest()[:16]


def _forward(owner: ast.ClassDef) -> ast.FunctionDef | None:
    return next((x for x in owner.body if isinstance(x, ast.FunctionDef) and x.name == "forward"), None)


def _called(forward: ast.FunctionDef | None) -> set[str]:
    calls = (x.func for x in ast.walk(forward) if isinstance(x, ast.Call)) if forward is not None else ()
    return {x.id for x in calls if isinstance(x, ast.Name)}
