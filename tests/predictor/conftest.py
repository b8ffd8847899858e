from __future__ import annotations

import shutil

import numpy as np
import pytest

import fastlvm
from fastlvm.data import Payload, Space, Windows

from .sample import ARTICLES, CHUNKS, CONTEXT, make_model, make_vectors


@pytest.fixture(scope="session")
def payload(tmp_path_factory):
    keys = np.stack(np.divmod(np.arange(ARTICLES * CHUNKS), CHUNKS), axis=1).astype(np.int32)
    return Payload.build(tmp_path_factory.mktemp("payload") / "p", make_vectors(), keys, encoder="test")


@pytest.fixture(scope="session")
def windows(payload):
    return Windows.build(payload, context=CONTEXT, split=(0.6, 0.2, 0.2))


@pytest.fixture(scope="session")
def space(payload, windows):
    return Space.fit_articles(payload, windows.articles("train"))


@pytest.fixture(scope="session")
def index(payload, space):
    from fastlvm.retrieval import Index  # which wants the extension: on a machine without, some tests need none

    return Index.build(payload, space=space)


@pytest.fixture(scope="session")
def contexts(payload, windows):
    """Raw vectors [n, 5, DIM] of the windows of the test split, and their payload rows."""
    rows = windows.rows("test")[:, :-1]
    return payload.take(rows), rows


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, model, index, payload, windows):
    """A good artifact; not to be written to."""
    folder = tmp_path_factory.mktemp("artifact") / "a"
    fastlvm.export(model, folder, index=index, payload=payload, windows=windows)
    return folder


@pytest.fixture(scope="session")
def predictor(artifact):
    return fastlvm.Predictor.load(artifact)


@pytest.fixture
def copy(artifact, tmp_path):
    """An artifact to damage."""
    return shutil.copytree(artifact, tmp_path / "copy")
