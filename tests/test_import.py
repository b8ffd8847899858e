"""What `import fastlvm` costs and pulls in, and which way the arrows between its packages run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastlvm

ROOT = Path(fastlvm.__file__).parent
HEAVY = ("torch", "mlx", "faiss", "triton")

# Package of fastlvm -> packages of it that it may import. errors and files are everybody's.
ARROWS = {
    "ops": {"kernels"},
    "models": {"ops"},
    "data": set(),
    "retrieval": {"data"},
    "gates": set(),
    "evaluation": {"retrieval", "data", "gates"},
    "training": {"models", "ops", "evaluation", "data", "retrieval"},
    "predictor": {"ops", "retrieval", "data"},  # the ops' numpy side, which is where csrc is reached
    "compat": {"ops", "models"},
}
EVERYBODY = {"errors", "files", "_C", "__version__"}
EXTRA = {  # module -> what it may import on top
    "predictor/export.py": {"training", "models"},
    "predictor/cuda.py": {"kernels"},
    "predictor/cuda_layers.py": {"kernels"},
    "predictor/cuda_search.py": {"kernels"},
}
WITHOUT_TORCH = ("data", "retrieval", "predictor", "gates", "errors.py", "files.py", "cli.py")
WITHOUT_TORCH += tuple(f"evaluation/{name}.py" for name in ("metrics", "baselines", "latency", "gates", "report"))
TORCH_ALLOWED = tuple(f"predictor/{name}.py" for name in ("export", "cuda", "cuda_layers", "cuda_load", "cuda_search"))


def _fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_lazy():
    code = f"import fastlvm, sys; dir(fastlvm); print([m for m in {HEAVY!r} if m in sys.modules])"
    assert _fresh(code) == "[]"


def test_naming_an_op_imports_no_framework():
    names = "fastlvm.ssm_scan, fastlvm.causal_conv1d, fastlvm.explain, fastlvm.set_num_threads, fastlvm.get_num_threads"
    code = f"import fastlvm, sys; {names}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert _fresh(code) == "[]"


def test_no_public_name_imports_a_framework():
    code = (
        "import fastlvm, sys; [getattr(fastlvm, name) for name in fastlvm._HOME];"
        f"import fastlvm.evaluation, fastlvm.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert _fresh(code) == "[]"


def test_the_first_tensor_does_not_load_the_compiler():
    """torch._dynamo takes seconds to import; only torch.compile should pay for it."""
    code = (
        "import sys, torch, fastlvm; u = torch.ones(1, 2, 3, requires_grad=True); A = -torch.ones(2, 4);"
        "fastlvm.causal_conv1d(fastlvm.ssm_scan(u, u, A, A, A), A).sum().backward();"
        "print(u.grad is not None, 'torch._dynamo' in sys.modules)"
    )
    assert _fresh(code) == "True False"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'ssm_scam'"):
        fastlvm.ssm_scam  # noqa: B018


def _imports(path: Path, *, everywhere: bool) -> set[str]:
    """Full names imported by a file: at module level, or everywhere in it; those only for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("fastlvm", *path.relative_to(ROOT).with_suffix("").parts)
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found.update(f"{origin}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def _files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", _files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows(path):
    name = path.relative_to(ROOT).as_posix()
    home = name.split("/")[0].removesuffix(".py")
    used = {m.split(".")[1] for m in _imports(path, everywhere=True) if m.startswith("fastlvm.")}
    if home != "cli" and name != "__main__.py":
        assert "cli" not in used, "nobody imports cli"
    if home in ARROWS:
        wrong = used - ARROWS[home] - EXTRA.get(name, set()) - EVERYBODY - {home}
        assert not wrong, f"{name} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", _files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_torch_where_there_must_be_none(path):
    name = path.relative_to(ROOT).as_posix()
    if name.startswith(WITHOUT_TORCH) and name not in TORCH_ALLOWED:
        frameworks = {m.split(".")[0] for m in _imports(path, everywhere=True)} & {"torch", "mlx", "triton"}
        assert not frameworks, f"{name} imports {sorted(frameworks)}"


@pytest.mark.parametrize("path", _files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_faiss_is_imported_in_retrieval_only_and_late(path):
    name = path.relative_to(ROOT).as_posix()
    roots = {m.split(".")[0] for m in _imports(path, everywhere=not name.startswith("retrieval/"))}
    assert "faiss" not in roots


def test_the_walker_sees_what_it_should(tmp_path):
    """The checks above are worth what this parser is."""
    probe = ROOT / "ops" / "_checks.py"
    assert "fastlvm.ops._arrays" in _imports(probe, everywhere=True)
    reference = ROOT / "ops" / "ssm_scan" / "reference.py"
    assert "torch" in _imports(reference, everywhere=True)
    assert not any(m.split(".")[0] == "torch" for m in _imports(reference, everywhere=False))
