"""The space: what it computes, what it refuses, and that a file gives back the same one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastlvm.data import Space
from fastlvm.errors import InputError, IntegrityError


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((500, 12)) * np.linspace(0.2, 3, 12) + rng.standard_normal(12)).astype(np.float32)


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.mark.parametrize("power", [0, 0.25, 0.5])
def test_it_is_the_formula(vectors, power):
    space = Space.fit(vectors, power=power, eps=1e-9)
    wide = vectors.astype(np.float64)
    covariance = np.cov(wide.T, bias=True)
    values, basis = np.linalg.eigh(covariance)
    expected = unit((wide - wide.mean(axis=0)) @ (basis * values**-power) @ basis.T)
    np.testing.assert_allclose(space.apply(vectors), expected, atol=2e-5)
    np.testing.assert_allclose(space.matrix, space.matrix.T, atol=1e-6)
    assert space.apply(vectors).dtype == space.mean.dtype == space.matrix.dtype == np.float32


def test_full_whitening_leaves_no_direction_larger(vectors):
    space = Space.fit(vectors, power=0.5, eps=1e-9)
    white = (vectors - space.mean) @ space.matrix
    covariance = np.cov(white.T.astype(np.float64))
    np.testing.assert_allclose(covariance / covariance[0, 0], np.eye(12), atol=1e-3)


def test_any_shape_and_float_goes_in(vectors):
    space = Space.fit(vectors)
    expected = space.apply(vectors)
    np.testing.assert_array_equal(space.apply(vectors.reshape(50, 10, 12)), expected.reshape(50, 10, 12))
    np.testing.assert_allclose(space.apply(vectors[0]), expected[0], atol=1e-6)
    np.testing.assert_allclose(space.apply(vectors.astype(np.float64)), expected, atol=1e-6)
    np.testing.assert_allclose(space.apply(vectors.astype(np.float16)), expected, atol=5e-3)
    assert space.apply(vectors[:0]).shape == (0, 12)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)


def test_the_mean_itself_gives_zeros_not_nan(vectors):
    space = Space.fit(vectors)
    np.testing.assert_array_equal(space.apply(space.mean), np.zeros(12, np.float32))


def test_identity_only_normalises(vectors):
    space = Space.identity(12)
    np.testing.assert_allclose(space.apply(vectors), unit(vectors), atol=1e-6)
    assert space.id == Space.identity(12).id != Space.identity(11).id
    np.testing.assert_array_equal(space.apply(np.zeros((2, 12))), np.zeros((2, 12)))


def test_fewer_rows_than_dimensions(vectors):
    space = Space.fit(vectors[:5], power=0.5)
    assert np.isfinite(space.matrix).all()
    assert np.abs(space.matrix).max() <= 1e-2**-0.5 + 1e-3  # eps bounds the gain
    np.testing.assert_allclose(np.linalg.norm(space.apply(vectors), axis=1), 1, atol=1e-5)


def test_the_scale_of_the_vectors_does_not_matter(vectors):
    np.testing.assert_allclose(
        Space.fit(vectors * 1e-3).apply(vectors * 1e-3), Space.fit(vectors).apply(vectors), atol=1e-4
    )


def test_articles_are_the_rows_it_is_fitted_on(walk_payload):
    space = Space.fit_articles(walk_payload, [2, 5, 2])
    rows = np.r_[40:60, 100:120]
    np.testing.assert_allclose(space.mean, walk_payload.vectors[rows].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(space.matrix, Space.fit(walk_payload.vectors[rows]).matrix, atol=1e-5)
    assert space.payload_id == walk_payload.id
    assert space.fitted_on.startswith("40 rows of 2 articles")
    assert space.id != Space.fit_articles(walk_payload, [2, 6]).id
    for bad, match in (([2, 99], "1 of the 2 articles"), ([], "is empty"), ([0.5], "no integers")):
        with pytest.raises(InputError, match=match):
            Space.fit_articles(walk_payload, bad)


def test_bad_arguments_are_refused(vectors):
    for options, match in (
        ({"power": 0.6}, "power is"), ({"power": -0.1}, "power is"), ({"power": np.nan}, "power is"),
        ({"eps": 0}, "eps is"), ({"eps": np.nan}, "eps is"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            Space.fit(vectors, **options)
    with pytest.raises(InputError, match="at least 2"):
        Space.fit(vectors[:1])
    with pytest.raises(InputError, match="all the same"):
        Space.fit(np.repeat(vectors[:1], 9, axis=0))
    with pytest.raises(InputError, match="NaN"):
        Space.fit(np.where(np.arange(500)[:, None] == 3, np.nan, vectors))
    space = Space.fit(vectors)
    for bad in (vectors[:, :11], vectors.astype(int), np.float32(1)):
        with pytest.raises(InputError, match="12 floats are wanted"):
            space.apply(bad)


def test_a_saved_space_comes_back(tmp_path, walk_payload):
    space = Space.fit_articles(walk_payload, [1, 2, 3], power=0.3)
    space.save(tmp_path / "space.safetensors")
    found = Space.load(tmp_path / "space.safetensors")
    assert (found.id, found.power, found.payload_id, found.fitted_on) == (
        space.id, 0.3, walk_payload.id, space.fitted_on,
    )  # fmt: skip
    np.testing.assert_array_equal(found.apply(walk_payload.vectors), space.apply(walk_payload.vectors))
    Space.identity(4).save(tmp_path / "identity")
    assert Space.load(tmp_path / "identity").payload_id is None


def test_damaged_and_strange_files_are_refused(tmp_path, vectors):
    path = tmp_path / "space.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        Space.load(path)
    Space.fit(vectors).save(path)
    content = path.read_bytes()
    for keep in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:keep])
        with pytest.raises(IntegrityError, match="damaged"):
            Space.load(path)
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(IntegrityError, match="its id"):
        Space.load(path)
    save_file({"mean": np.zeros(3, np.float32)}, str(path))
    with pytest.raises(InputError, match="not a space"):
        Space.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": np.zeros(11, np.float32)},
        {"matrix": np.zeros((12, 11), np.float32)},
        {"mean": np.full(12, np.nan, np.float32)},
        {"mean": np.zeros(12)},
        {"mean": None},
    ],
)
def test_files_with_wrong_arrays_are_refused(tmp_path, vectors, change):
    from safetensors import safe_open

    path = tmp_path / "space.safetensors"
    Space.fit(vectors).save(path)
    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata()
    arrays = {name: value for name, value in (load_file(str(path)) | change).items() if value is not None}
    save_file(arrays, str(path), metadata=metadata)
    with pytest.raises(IntegrityError, match=r"space\.safetensors"):
        Space.load(path)


def rewritten(path, dtype="F32", values=None, **record):
    """The saved space again, with tensors of another dtype or other values, and other entries of its record."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["fastlvm"] = json.dumps(json.loads(header["__metadata__"]["fastlvm"]) | record)
    body = data[8 + size :] if values is None else values
    for name in ("mean", "matrix"):
        header[name]["dtype"] = dtype
        if dtype != "F32":
            header[name]["data_offsets"] = [offset // 2 for offset in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (body if dtype == "F32" else body[: len(body) // 2]))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_numbers_of_half_the_width_are_refused_by_name(tmp_path, vectors, dtype):
    path = tmp_path / "space.safetensors"
    Space.fit(vectors).save(path)
    rewritten(path, dtype)
    with pytest.raises(IntegrityError, match=rf"space\.safetensors .*(mean|matrix) is {dtype}, and F32 .* restore"):
        Space.load(path)


@pytest.mark.parametrize(
    "record", [{"power": 10**400}, {"power": "1"}, {"power": float("nan")}, {"payload_id": []}, {"fitted_on": None}]
)
def test_a_record_that_makes_no_sense_is_refused(tmp_path, vectors, record):
    path = tmp_path / "space.safetensors"
    Space.fit(vectors).save(path)
    rewritten(path, **record)
    with pytest.raises(InputError, match=r"space\.safetensors"):
        Space.load(path)


@pytest.mark.filterwarnings("error")
def test_numbers_whose_products_overflow_are_refused(tmp_path):
    path = tmp_path / "space.safetensors"
    Space.identity(12).save(path)
    rewritten(path, values=np.full(12 + 12 * 12, 1e30, np.float32).tobytes())
    with pytest.raises(IntegrityError, match=r"space\.safetensors .*overflow"):
        Space.load(path)
    with pytest.raises(InputError, match="overflow"):
        Space(np.full(2, 3e38), np.eye(2) * 2)


def test_saving_writes_under_no_name_but_its_own_temporary(tmp_path, monkeypatch):
    seen = []
    write = Path.write_bytes

    def noting(path, data):
        written = write(path, data)
        seen.append(sorted(p.name for p in tmp_path.iterdir()))
        return written

    monkeypatch.setattr(Path, "write_bytes", noting)
    Space.fit(np.random.default_rng(0).standard_normal((20, 4), dtype=np.float32)).save(tmp_path / "space.safetensors")
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0].startswith(".space.safetensors.tmp-")


def tower(dim=12, hidden=7, seed=0, scale=0.5):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"up.weight": (hidden, dim), "up.bias": hidden, "down.weight": (dim, hidden), "down.bias": dim}
    return {name: scale * draw(shape).astype(np.float32) for name, shape in shapes.items()}


def towered(w, t):
    """normalise(w + down(gelu(up(w)))) in float64."""
    up, up_bias, down, down_bias = (
        np.float64(t[name]) for name in ("up.weight", "up.bias", "down.weight", "down.bias")
    )
    h = w.astype(np.float64) @ up.T + up_bias
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    return unit(w + h @ down.T + down_bias)


@pytest.mark.parametrize("identity", (False, True))
def test_a_tower_follows_the_whitening(vectors, identity):
    base = Space.identity(12) if identity else Space.fit(vectors)
    space = base.with_tower(tower())
    expected = towered(base.apply(vectors), tower())
    np.testing.assert_allclose(space.apply(vectors), expected, atol=1e-6)
    np.testing.assert_array_equal(space.apply(vectors.reshape(50, 10, 12))[3, 4], space.apply(vectors[34:35])[0])
    assert space.apply(vectors[:0]).shape == (0, 12)
    ids = {base.id, space.id, base.with_tower(tower(seed=1)).id, Space.fit(vectors[1:]).with_tower(tower()).id}
    assert len(ids) == 4
    assert (space.base.id, space.base.tower, space.dim) == (base.id, None, 12)
    np.testing.assert_array_equal(space.base.apply(vectors), base.apply(vectors))


def test_a_tower_is_saved_and_checked(tmp_path, vectors):
    path = tmp_path / "space.safetensors"
    space = Space.fit(vectors).with_tower(tower())
    space.save(path)
    found = Space.load(path)
    assert (found.id, found.base.id, found.fitted_on) == (space.id, space.base.id, space.fitted_on)
    np.testing.assert_array_equal(found.apply(vectors), space.apply(vectors))
    tensors = load_file(path)
    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata()
    for name in tensors:
        if name.startswith("tower."):
            save_file({other: array for other, array in tensors.items() if other != name}, str(path), metadata)
            with pytest.raises(IntegrityError, match="a tower has "):
                Space.load(path)
    save_file({**tensors, "tower.up.bias": tensors["tower.up.bias"] + 1}, str(path), metadata)
    with pytest.raises(IntegrityError, match="its id"):
        Space.load(path)


def test_a_tower_that_cannot_be_is_refused(vectors):
    space = Space.fit(vectors)
    good = tower()
    for wrong, match in (
        ({}, r"a tower has \[\]"),
        ({**good, "side": good["up.bias"]}, "are wanted"),
        ({**good, "up.weight": good["up.weight"].T}, "a tower wants"),
        (tower(hidden=0), "a tower wants"),
        (tower(dim=11), "a tower wants"),
        ({**good, "down.bias": np.full(12, np.nan)}, "NaN or infinity"),
        ({**good, "up.weight": np.full((7, 12), 1e30), "down.weight": np.full((12, 7), 1e30)}, "overflow"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            space.with_tower(wrong)
