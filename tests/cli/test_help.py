"""Every command explains itself, and the example it shows is one it takes."""

from __future__ import annotations

import shlex

import pytest
from typer.main import get_command

from cli.conftest import fastlvm
from fastlvm import gates
from fastlvm.cli import app

SYNOPSIS = {
    "payload build": "--vectors --keys --texts --encoder --source --out",
    "payload import": "--out",
    "payload info": "",
    "payload verify": "",
    "windows build": "--out --context --split --seed --group-by --groups",
    "windows import": "--payload --out",
    "windows align": "--payload --out --split --seed --allow-missing",
    "windows remap": "--payload --out --split --seed --min-coverage",
    "windows export": "--payload --split --out",
    "windows verify": "--payload",
    "index build": "--kind --out --recall --space",
    "index add": "--vectors --keys",
    "index remove": "--keys",
    "index verify": "",
    "train": "--model --payload --windows --objective --out --resume --hard-negatives --reverse --gate --set",
    "sweep": "--model --seeds --vary --jobs --payload --windows --out --set",
    "eval": "--payload --windows --split --index --rerank --limit --seed --out --gates --out-of-domain",
    "compare": "--out",
    "diagnose": "--payload --windows --index --split --sample --seed --out --json",
    "export": "--index --out --precision",
    "bench latency": "--context -k --threads --repeats --rerank --profile --gate --json",
    "predict": "--context -k --json --keep-context --rerank --candidates --keys --threads",
    "info": "--model --set",
    "demo": "--out",
}


def commands(group=None, words=()):
    group = group or get_command(app)
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*words, name))
        else:
            yield " ".join((*words, name)), found


ALL = dict(commands())


def test_the_commands_are_the_documented_ones():
    assert set(ALL) == set(SYNOPSIS)
    for name, options in SYNOPSIS.items():
        known = {option for parameter in ALL[name].params for option in parameter.opts}
        assert set(options.split()) <= known, name


@pytest.mark.parametrize("name", ALL)
def test_help_shows_an_example_that_parses(name):
    result = fastlvm(*name.split(), "--help")
    shown = " ".join(result.out.split())
    assert result.code == 0 and not result.err
    example = ALL[name].epilog.removeprefix("Example: ")
    assert f"Example: {example}" in shown
    words = shlex.split(example)
    assert words[: 1 + len(name.split())] == ["fastlvm", *name.split()]
    context = ALL[name].make_context(name, words[1 + len(name.split()) :])  # raises what the command line would
    assert all(value is not None for key, value in context.params.items() if f"--{key}" in words)


@pytest.mark.parametrize("words", [[], ["payload"], ["windows"], ["index"]])
def test_a_group_alone_shows_its_commands(words):
    result = fastlvm(*words)
    assert all(name.split()[len(words)] in result.out + result.err for name in ALL if name.split()[:-1] == words)


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["payload", "nonsense"],
        ["train"],
        ["info", "extra"],
        ["predict", "a", "--context", "c", "-k", "x"],
    ],
)
def test_usage_errors_exit_2(args):
    result = fastlvm(*args)
    assert result.code == 2 and result.err and not result.out


@pytest.mark.parametrize("name", ["eval", "bench latency", "train"])
def test_help_lists_the_gates(name):
    shown = "".join(letter for letter in fastlvm(*name.split(), "--help").out if letter.isalnum() or letter in "-,")
    assert ",".join(gates.names()) in shown
