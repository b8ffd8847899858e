"""The peers' own test files against fastlvm: `make conformance PEERS=path`.

A path is a checkout of state-spaces/mamba or of Dao-AILab/causal-conv1d, or a folder of both. Their test files are
copied to a temporary folder, where the literal "cuda" becomes the device and nothing else changes; `peers_run.py` runs
each of them with fastlvm's stand-ins installed. Printed is what became of the tests of every file, and for each that
did not pass a reason. The exit code is 1 where one failed, 2 where a path holds no such checkout, and else 0: also
without a path, or with one that does not exist, when there is nothing to run.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("causal_conv1d", "mamba_ssm")
COLUMNS = ("passed", "failed", "n.a.", "not run")
TITLES = {"failed": "failed", "n.a.": "not applicable", "not run": "not run"}
DEVICE = re.compile(r"""(["'])cuda(:\d+)?\1""")
SHOWN = 3  # tests named for each reason to fail
Record = dict[str, Any]


class Result(NamedTuple):
    file: str
    test: str
    outcome: str
    reason: str


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if not options.paths:
        print("skipped: no checkout is given; PEERS=path names one of mamba or causal-conv1d, or a folder of both")
    found: dict[str, Path] = {}
    for path in options.paths:
        if not path.exists():
            print(f"skipped: {path} is not there")
            continue
        here = checkouts(path)
        if not here:
            wants = f"a folder tests beside {' or '.join(PACKAGES)}, or a folder of such"
            print(f"{path} holds no checkout; wants {wants}", file=sys.stderr)
            return 2
        for checkout in here:
            if found.setdefault(checkout.name, checkout) != checkout:
                print(f"two checkouts are called {checkout.name}; run them one at a time", file=sys.stderr)
                return 2
    if not found:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return report(list(found.values()), Path(folder).resolve(), options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the peers' own test files against fastlvm")
    parser.add_argument("paths", nargs="*", type=Path, help="checkouts of mamba and causal-conv1d, or a folder of both")
    parser.add_argument("--device", default="cpu", help='what "cuda" becomes; "cuda" changes nothing')
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a test may take before it is given up")
    parser.add_argument("-k", default="", help="run the tests that match, as pytest's -k")
    return parser


def checkouts(path: Path) -> list[Path]:
    """The checkouts at `path`: itself, or folders in it."""
    folders = [path, *sorted(path.iterdir())] if path.is_dir() else []
    return [folder.resolve() for folder in folders if _is_checkout(folder)]


def _is_checkout(folder: Path) -> bool:
    return (folder / "tests").is_dir() and any((folder / name / "__init__.py").is_file() for name in PACKAGES)


def copied(checkout: Path, folder: Path, device: str) -> list[Path]:
    """Copy the tests of a checkout to `folder`, rewritten; returns the Python files in which there may be tests."""
    home = folder / checkout.name / "tests"
    shutil.copytree(checkout / "tests", home, ignore=shutil.ignore_patterns("__pycache__"))
    files = sorted(home.rglob("*.py"))
    for file in files:
        source = file.read_text(encoding="utf-8")
        file.write_text(source if device == "cuda" else rewritten(source, device), encoding="utf-8")
    return [file for file in files if file.name not in ("__init__.py", "conftest.py")]


def rewritten(source: str, device: str) -> str:
    """The source with `device` in place of every literal "cuda" or "cuda:0"."""
    lines = source.splitlines(keepends=True)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source  # pytest will say what is wrong with it
    for token in reversed(tokens):
        if token.type == tokenize.STRING and DEVICE.fullmatch(token.string):
            (row, start), (_, end) = token.start, token.end
            line, quote = lines[row - 1], token.string[0]
            lines[row - 1] = f"{line[:start]}{quote}{device}{quote}{line[end:]}"
    return "".join(lines)


def report(found: list[Path], folder: Path, options: argparse.Namespace) -> int:
    """Run everything, a row for each file as it ends, then the reasons; the exit code."""
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    files = [(checkout, file) for checkout in found for file in copied(checkout, folder, options.device)]
    width = max(len(_name(file, folder)) for _, file in files) if files else 0
    print(f"{'':{width}}", *(f"{column:>8}" for column in COLUMNS))
    every: list[Result] = []
    for checkout, file in files:
        results = list(run_file(checkout, file, folder, options))
        if results:
            print(f"{_name(file, folder):{width}}", _counts(results), flush=True)
        every += results
    print(f"{'all':{width}}", _counts(every))
    for outcome, title in TITLES.items():
        _print_reasons(title, [result for result in every if result.outcome == outcome])
    return int(any(result.outcome == "failed" for result in every))


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _counts(results: list[Result]) -> str:
    outcomes = [result.outcome for result in results]
    return " ".join(f"{outcomes.count(column):>8}" for column in COLUMNS)


def _print_reasons(title: str, results: list[Result]) -> None:
    groups: dict[tuple[str, str], list[str]] = {}
    for result in results:
        groups.setdefault((result.file, result.reason), []).append(result.test)
    if groups:
        print(f"\n{title}:")
    for (file, reason), tests in groups.items():
        print(f"  {len(tests)} of {file}: {reason}")
        if title == "failed":
            print(*(f"      {test}" for test in tests[:SHOWN]), sep="\n")


def run_file(checkout: Path, file: Path, folder: Path, options: argparse.Namespace) -> Iterator[Result]:
    """What became of the tests in a file. A process that dies is started again, for what is left."""
    name = _name(file, folder)
    if not (file.name.startswith("test_") or file.name.endswith("_test.py")):
        if not options.k:
            yield Result(name, name, "n.a.", "a script, no tests in it")
        return
    path = folder / "records.jsonl"
    path.write_text("", encoding="utf-8")
    records: list[Record] = []
    while not any("finished" in record for record in records):
        ending, last = _run(checkout, file, folder, path, options)
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not any("finished" in record for record in records):
            records.append(_death(name, records, ending, last, options.limit))
            with path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(records[-1]) + "\n")
    results = [
        Result(name, record["test"], record["outcome"], record["reason"]) for record in records if "test" in record
    ]
    if not results and not options.k:
        yield Result(name, name, "n.a.", "no tests in it")
    yield from results


def _run(checkout: Path, file: Path, folder: Path, records: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Run the file in a process of its own; how that ended, and the last line it wrote."""
    run = Path(__file__).with_name("peers_run.py")
    command: list[Any] = [sys.executable, run, file, "--checkout", checkout, "--records", records, "--folder", folder]
    command += ["--limit", options.limit, "--device", options.device, f"-k={options.k}"]
    log = folder / "log.txt"
    with log.open("wb") as out:
        code = subprocess.run(list(map(str, command)), stdout=out, stderr=out, cwd=folder, check=False).returncode
    said = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(said) if line.strip()), "nothing")
    return f"signal {-code}" if code < 0 else f"exit code {code}", last.strip()


def _death(name: str, records: list[Record], ending: str, last: str, limit: float) -> Record:
    """The record of the test that a process died of; of the file, where none had begun, which ends it."""
    done = {record["test"] for record in records if "test" in record}
    running = [record for record in records if "started" in record and record["started"] not in done]
    if not running:
        return {"test": name, "outcome": "failed", "reason": f"did not run: {last}", "finished": True}
    outcome, reason = "failed", f"the process died: {ending}"
    if ending == "exit code 1" and time.time() - running[-1]["at"] > limit:  # as `peers_run.py` ends itself
        outcome, reason = "not run", f"over {limit:g} s"
    return {"test": running[-1]["started"], "outcome": outcome, "reason": reason}


if __name__ == "__main__":
    sys.exit(main())
