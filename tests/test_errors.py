from __future__ import annotations

import pytest

from fastlvm.errors import brief, shown

DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize("value", ["x" * 5000, "a\nb", "\ud800", list(range(5000)), {"a": "x" * 5000}, 10**400, DEEP])
def test_a_value_from_a_file_takes_a_part_of_one_line(value):
    text = shown(value)
    assert len(text) <= 200 and text.isprintable()
    text.encode()


def test_short_values_are_shown_whole():
    for value in ("fp32", ["fp32"], None, 1.5, 2**64, {"a": 1}):
        assert shown(value) == repr(value)


def test_an_error_of_a_library_takes_a_part_of_one_line():
    assert brief(ValueError("expected\n  one\x00 thing")) == "expected one thing"
    assert brief("weight\ud800") == "weight"
    assert len(brief("x" * 5000)) <= 200
    assert brief("blocks.0.weight") == "blocks.0.weight"
