"""One test file of the peers in a process of its own, for `peers.py`: fastlvm stands in for their packages.

Their reference functions (`*_ref`) are read from the checkout, so that a test compares fastlvm with the original and
not with itself. What the checkout has besides and fastlvm has not can be imported, and ends the test that uses it.
What became of each test is a line of JSON, written when it ends; a process that dies leaves those before.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import faulthandler
import importlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastlvm
from fastlvm import compat
from fastlvm.compat._checks import UnsupportedError

PACKAGES = ("causal_conv1d", "mamba_ssm")
RANKS = ("passed", "n.a.", "not run", "failed")
OURS = f"{Path(fastlvm.__file__).parent}/"
GPU = f"{Path(torch.cuda.__file__).parent}/"


class MissingError(BaseException):
    """Not an Exception, so that no test takes it for one that it expects."""


class OverTimeError(BaseException):
    pass


class Missing:
    """In the place of a name that fastlvm does not have."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise MissingError(f"needs {self._name}, which fastlvm does not have")

    __call__ = __iter__ = __getitem__ = __mro_entries__ = __instancecheck__ = __subclasscheck__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "pytest")):  # pytest asks everything in a module what it is
            raise AttributeError(name)
        self._refuse()


def stand_in(checkout: Path) -> None:
    """Install fastlvm in the place of both packages, with what tests import of the checkout beside it."""
    compat.install(force=True)
    sources = {}
    for package in PACKAGES:
        for file in (checkout / package).rglob("*.py"):
            parts = file.relative_to(checkout).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    for name in sorted(sources):
        _fill(_module(name))
    for name, file in sources.items():
        _take_references(file, sys.modules[name])


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    module = ModuleType(name)
    module.__path__ = []
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
    return module


def _fill(module: ModuleType) -> None:
    def missing(name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return Missing(f"{module.__name__}.{name}")

    module.__getattr__ = missing  # type: ignore[method-assign]


def _take_references(file: Path, module: ModuleType) -> None:
    """Put the functions *_ref of a source file into the module; of the rest of the file only imports are run."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    references = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_ref")]
    if not references:
        return
    names = dict(vars(module))
    for node in _imports(tree.body):
        with contextlib.suppress(ImportError):
            exec(compile(ast.Module([node], []), str(file), "exec"), names)
    exec(compile(ast.Module(list(references), []), str(file), "exec"), names)
    for node in references:
        setattr(module, node.name, names[node.name])


def _imports(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Try | ast.If):
            yield from _imports(node.body)


def without_gpu(device: str, folder: str) -> None:
    """What tests ask of torch.cuda besides the literal: whether there is one, to wait for it, to go there."""
    if torch.cuda.is_available():
        return
    real = torch.cuda.is_available

    def is_available() -> bool:
        return sys._getframe(1).f_code.co_filename.startswith(folder) or real()

    torch.cuda.is_available = is_available
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(device)  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self.to(device)  # type: ignore[method-assign]


class Recorder:
    """A pytest plugin that writes a record of every test, and gives up those that take over `limit` seconds."""

    def __init__(self, path: Path, folder: str, limit: float) -> None:
        self._path, self._folder, self._limit = path, folder, limit
        self._phases: list[tuple[str, str]] = []
        lines = path.read_text(encoding="utf-8").splitlines()
        self._done = {json.loads(line).get("test") for line in lines}

    def write(self, **record: Any) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            message = report.longrepr[-1].removeprefix("Skipped: ")  # type: ignore[index]
            self.write(test=report.nodeid, outcome="n.a.", reason=_left_out(message))

    def pytest_exception_interact(self, call: pytest.CallInfo[Any], report: Any) -> None:
        if isinstance(report, pytest.CollectReport) and call.excinfo is not None:
            error = call.excinfo.value
            if isinstance(error, pytest.Collector.CollectError) and error.__cause__ is not None:
                error = error.__cause__
            outcome, reason = self._judge(error)
            self.write(test=report.nodeid, outcome=outcome, reason=reason)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._phases = []
        self.write(started=nodeid, at=time.time())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Any:
        _alarm(self._limit)
        # Ends the process where a call that does not return keeps Python from its alarm.
        faulthandler.dump_traceback_later(2 * self._limit + 30, exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            _alarm(0)
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> Any:
        report = yield
        if report.passed:
            self._phases.append(("passed", ""))
        elif report.skipped and hasattr(report, "wasxfail"):
            self._phases.append(("n.a.", f"the test expects to fail: {report.wasxfail.removeprefix('reason: ')}"))
        elif report.skipped:
            self._phases.append(("n.a.", _left_out(str(call.excinfo.value) if call.excinfo else "")))
        elif call.excinfo is None:
            self._phases.append(("failed", str(report.longrepr)))
        else:
            self._phases.append(self._judge(call.excinfo.value))
        return report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, reason = max(self._phases, key=lambda phase: RANKS.index(phase[0]))
        self.write(test=nodeid, outcome=outcome, reason=reason)

    def _judge(self, error: BaseException) -> tuple[str, str]:
        """Outcome and reason of a test that an error ended. What is raised below fastlvm is its failure."""
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, OverTimeError):
            return "not run", f"over {self._limit:g} s"
        if isinstance(error, MissingError | UnsupportedError):
            return "n.a.", str(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "not run", "not enough memory"
        if not any(frame.filename.startswith(OURS) for frame in frames):
            if isinstance(error, ImportError):
                return "n.a.", _unimportable(error)
            if frames and frames[-1].filename.startswith(GPU):
                return "n.a.", f"needs a GPU: {str(error).splitlines()[0]}"
        return "failed", self._place(frames) + _first_line(error)

    def _place(self, frames: traceback.StackSummary) -> str:
        inside = [frame for frame in frames if frame.filename.startswith(self._folder)]
        return f"line {inside[-1].lineno}, {inside[-1].line}: " if inside else ""


def _left_out(message: str) -> str:
    return f"the test skips it: {message}" if message else "the test skips it"


def _unimportable(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error).partition(" (")[0]
    ours = str(error.name).partition(".")[0] in PACKAGES
    return f"needs {error.name}, which {'fastlvm does not have' if ours else 'is not installed'}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _alarm(seconds: float) -> None:
    if hasattr(signal, "SIGALRM"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _over_time(*args: Any) -> None:
    raise OverTimeError


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("file", "--checkout", "--records", "--folder"):
        parser.add_argument(name, type=Path)
    for name in ("--device", "-k"):
        parser.add_argument(name)
    parser.add_argument("--limit", type=float)
    options = parser.parse_args()
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _over_time)
    folder = f"{options.folder}/"
    stand_in(options.checkout)
    without_gpu(options.device, folder)
    recorder = Recorder(options.records, folder, options.limit)
    arguments = ["-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", "-k", options.k]
    arguments += ["-c", f"{folder}pytest.ini", "--rootdir", str(options.folder), str(options.file)]
    if pytest.main(arguments, plugins=[recorder]) in (0, 1, 2, 5):
        recorder.write(finished=True)


if __name__ == "__main__":
    main()
