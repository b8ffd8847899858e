"""Arguments of the native search of inverted lists of RaBitQ codes: what is no array of the kind is refused by name."""

from __future__ import annotations

import array

import numpy as np
import pytest
from rabitq_plain import built, normal, same

from fastlvm import _C

ROOM = 7  # rows of the tail
LISTED = ("signs", "centroids", "centroid_scales", "level", "sizes", "ids", "blocks", "codes", "scales")
PARTS = (*LISTED, "tail_codes", "tail_scales")


def whole():
    """Everything that a native searcher is made of, of arrays that it may keep."""
    tail = {"tail_codes": np.ones((ROOM, 37), np.int8), "tail_scales": np.ones(ROOM, np.float32)}
    return {name: built(37)._parts[name] for name in LISTED} | tail


def native():
    return _C.Searcher(whole(), 2000)


def spoiled(values):
    """What an array may be given as instead, and is not to be taken."""
    found = {
        "nothing": None,
        "a list": values.tolist(),
        "a number": np.float64(3),
        "another dtype": values.astype(np.float64),
        "dates": np.zeros(values.shape, "datetime64[s]"),
        "one row less": np.ascontiguousarray(values[:-1]),
        "another axis": values[None],
    }
    if len(values) > 1:
        found["gaps"] = np.repeat(values, 2, axis=-1)[..., ::2]
        found["backwards"] = values[::-1]
    if values.dtype.itemsize > 1:
        found["another byte order"] = values.astype(values.dtype.newbyteorder())
    if values.ndim > 1:
        found["Fortran order"] = np.asfortranarray(values)
        found["one column less"] = np.ascontiguousarray(values[..., :-1])
    return found


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_part_is_named(part):
    parts = whole()
    with pytest.raises(ValueError, match=f"{part} is missing"):
        _C.Searcher({name: values for name, values in parts.items() if name != part}, 2000)
    for what, bad in spoiled(parts[part]).items():
        # Codes and sizes say how many rows, columns and lists there are: of others, others are named.
        named = "|".join(PARTS) if part in ("codes", "sizes") and what.startswith("one") else part
        if (part, what) == ("tail_codes", "one row less"):
            named = "tail_scales"
        with pytest.raises(ValueError, match=f"^({named}): "):
            _C.Searcher({**parts, part: bad}, 2000)


def test_numbers_that_lead_out_of_the_lists_are_refused():
    parts = whole()
    n = len(parts["ids"])
    for sizes in ([-1, n + 1], [n, 1], [n - 1, 0], [2**62, 2**62], [2**63 - 1, 2**63 - 1], [-(2**63), n]):
        bad = np.array([0, 0, 0, 0, 0, 0, *sizes], np.int64)
        with pytest.raises(ValueError, match=r"^(sizes|blocks): "):
            _C.Searcher({**parts, "sizes": bad}, 2000)
    ids = parts["ids"].copy()
    ids[5] = -1
    with pytest.raises(ValueError, match=r"^ids: wants 0 or more"):
        _C.Searcher({**parts, "ids": ids}, 2000)
    for empty in (np.empty((0, 37), np.int8), np.empty((n, 0), np.int8)):
        with pytest.raises(ValueError, match=r"^(codes|sizes): "):
            _C.Searcher({**parts, "codes": empty}, 2000)


def test_ids_of_the_tail_have_31_bits():
    most = 2**31 - 1 - ROOM
    for first in (-1, -(2**63), most + 1, 2**31, 2**63 - 1):
        with pytest.raises(ValueError, match=f"^tail_first: got {first}, wants ids below"):
            _C.Searcher(whole(), first)
    given = arguments() | {"candidates": 9999, "nprobe": 8, "tail": ROOM}
    _C.Searcher(whole() | {"tail_scales": np.full(ROOM, 1e6, np.float32)}, most).search(**given)
    assert given["ids"].max() >= most and given["ids"].max() < 2**31 - 1
    for arguments_of in ((whole(),), (), ([], 3)):
        with pytest.raises(TypeError):
            _C.Searcher(*arguments_of)


@pytest.mark.parametrize("isa", _C.isas())
def test_lists_may_be_empty_and_have_a_tail_all_the_same(isa):
    _C.set_isa(isa)
    none = {name: whole()[name][:0] for name in ("ids", "blocks", "codes", "scales")}
    searcher = _C.Searcher({**whole(), **none, "sizes": np.zeros(8, np.int64)}, 5)
    for nprobe in (1, 8):
        for threads in (1, 3):
            for tail in (0, 1, ROOM):
                given = arguments(k=9) | {"nprobe": nprobe, "threads": threads, "tail": tail}
                searcher.search(**given)
                np.testing.assert_array_equal(np.sort(given["ids"][:, :tail]), np.tile(np.arange(5, 5 + tail), (3, 1)))
                assert (given["ids"][:, tail:] == -1).all() and np.isneginf(given["scores"][:, tail:]).all()


def arguments(n=3, dim=37, k=4):
    return {
        "queries": normal(n, dim),
        "scores": np.empty((n, k), np.float32),
        "ids": np.empty((n, k), np.int64),
        "nprobe": 2,
        "candidates": 9,
        "excluded": np.full((n, 2), -1),
        "threads": 1,
        "tail": 0,
    }


def predict_arguments():
    given = arguments()
    del given["queries"]
    model = _C.Model(2, 37, [("last", {})])
    return {"model": model, "context": normal(3, 2, 37), "predicted": np.empty((3, 37), np.float32), **given}


def read_only(values):
    values.flags.writeable = False
    return values


NUMBERS = (
    ("nprobe", (0, -1, 9, -(2**63), 2**63 - 1)),
    ("candidates", (0, -1, -(2**63))),
    ("threads", (-1, 1025, -(2**31))),
    ("tail", (-1, ROOM + 1, -(2**63), 2**63 - 1)),
)


@pytest.mark.parametrize("call", ("search", "predict"))
def test_a_wrong_argument_is_named(call):
    given = (arguments if call == "search" else predict_arguments)()
    function = getattr(native(), call)
    function(**given)
    sizes = {"queries", "context"}  # of which others depend: of another length, others are named
    for name, values in given.items():
        if not isinstance(values, np.ndarray):
            continue
        for what, bad in spoiled(values).items():
            if (name, what) in (("excluded", "nothing"), ("excluded", "one column less")):
                function(**{**given, name: bad})
                continue
            other = (name in sizes and what == "one row less") or (name, what) == ("scores", "one column less")
            with pytest.raises(ValueError, match=r"^(scores|ids|predicted): " if other else f"^{name}: "):
                function(**{**given, name: bad})
    for name in ("scores", "ids", "predicted"):
        if name in given:
            with pytest.raises(ValueError, match=f"^{name}: "):
                function(**{**given, name: read_only(given[name].copy())})
    for name, values in NUMBERS:
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: got {value}, wants"):
                function(**{**given, name: value})
    none = {"scores": np.empty((3, 0), np.float32), "ids": np.empty((3, 0), np.int64)}
    with pytest.raises(ValueError, match=r"^scores: wants one column or more"):
        function(**{**given, **none})
    with pytest.raises(TypeError):
        function()


def test_a_model_of_other_vectors_is_refused():
    given = predict_arguments() | {"model": _C.Model(2, 36, [("last", {})])}
    with pytest.raises(ValueError, match=r"^model: makes vectors of 36, and the index has 37"):
        native().predict(**given)


def test_read_only_inputs_and_more_candidates_than_rows_are_taken():
    given = arguments()
    native().search(**given)
    wanted = given["scores"].copy(), given["ids"].copy()
    for name in ("queries", "excluded"):
        read_only(given[name])
    native().search(**given)
    assert same((given["scores"], given["ids"]), wanted)
    native().search(**{**given, "candidates": 2**63 - 1})


def test_the_rotation_names_what_is_wrong():
    signs, rows = np.ones((_C.ROTATION_ROUNDS, 6), np.float32), normal(3, 6)
    _C.rotate(signs, rows)
    for bad in spoiled(signs).values():
        with pytest.raises(ValueError, match=r"^signs: "):
            _C.rotate(bad, rows)
    for what, bad in spoiled(rows).items():
        if what != "one row less":
            with pytest.raises(ValueError, match=r"^(signs|rows): "):
                _C.rotate(signs, bad)
    with pytest.raises(ValueError, match=r"^rows: "):
        _C.rotate(signs, read_only(rows.copy()))
    with pytest.raises(ValueError, match=r"^rows: "):  # no coordinates: there would be a transform of one before them
        _C.rotate(np.empty((_C.ROTATION_ROUNDS, 0), np.float32), np.empty((3, 0), np.float32))
    _C.rotate(signs, np.empty((0, 6), np.float32))


def test_memory_of_the_parts_stays_where_it_is():
    """An array that could grow and move is kept from it while it is searched."""
    for name, code in (("scales", "f"), ("sizes", "q"), ("ids", "i"), ("tail_scales", "f")):
        growing = array.array(code, whole()[name].tolist())
        searcher = _C.Searcher({**whole(), name: growing}, 2000)
        with pytest.raises(BufferError):
            growing.append(0)
        del searcher
        growing.append(0)
