"""What the source of a modeling module says: the fingerprints of its functions, and which of them a mixer calls.

Read from the file rather than from the functions, which decorators and other packages wrap.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import tokenize
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

_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
_LAYOUT = {tokenize.NEWLINE: "\n", tokenize.INDENT: ">", tokenize.DEDENT: "<"}


@dataclass(frozen=True)
class Source:
    """Fingerprints of a module's functions, and the names that the forward of each of its classes calls."""

    functions: dict[str, str]
    called: dict[str, set[str]]


def read(module: ModuleType) -> Source | None:
    """The source of a module; None where there is none to read."""
    try:
        text = inspect.getsource(module)
    except (OSError, TypeError):
        return None
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    functions = {x.name: fingerprint(lines, x) for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in KNOWN}
    called = {x.name: _called(x) for x in tree.body if isinstance(x, ast.ClassDef)}
    return Source(functions, called)


def fingerprint(lines: list[str], function: ast.FunctionDef) -> str:
    """A hash of a function from its `def` on, the same for any comments, line breaks and width of the indentation."""
    text = "".join(lines[function.lineno - 1 : function.end_lineno])
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kept = [_LAYOUT.get(token.type, token.string) for token in tokens if token.type not in _IGNORED]
    return hashlib.sha256(" ".join(kept).encode()).hexdigest()[:16]


def _called(owner: ast.ClassDef) -> set[str]:
    forward = [x for x in owner.body if isinstance(x, ast.FunctionDef) and x.name == "forward"]
    calls = (x.func for function in forward for x in ast.walk(function) if isinstance(x, ast.Call))
    return {x.id for x in calls if isinstance(x, ast.Name)}
