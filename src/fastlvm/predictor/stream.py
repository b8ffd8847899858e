"""A predictor fed one vector at a time, whose layers keep their state between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.data.npz import Archive
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import atomic_file

if TYPE_CHECKING:
    from fastlvm.predictor.forward import Forward

FORMAT = "fastlvm-stream"


class Stream:
    """Predictions after every vector of a document of any length; use `Predictor.stream`.

    Not the same as `Predictor.predict`, which starts every context from a zero state: here convolutions, state-space
    layers and recurrent cells remember all vectors since the first, attention those of its window, and the recency
    mixture mixes the newest `context`. For the first `context` vectors a stream gives what the model gives for as short
    a context. A stream is for one thread at a time.
    """

    def __init__(self, forward: Forward, model_id: str, check: Callable[[Any], np.ndarray]) -> None:
        if not forward.model.streams:
            raise InputError("this model takes a whole context at a time: use predict")
        self._forward, self._model_id, self._check = forward, model_id, check
        self._state = np.zeros(forward.model.state_size, np.float32)
        self._seen = 0

    @property
    def seen(self) -> int:
        """Vectors pushed so far."""
        return self._seen

    def push(self, vector: np.ndarray) -> np.ndarray:
        """The prediction float32 [dim] after one more raw encoder vector, float [dim].

        Raises InputError for another shape, a vector that is not finite or zero, or where the model's learned positions
        are used up.
        """
        model = self._forward.model
        if 0 < model.most_positions <= self._seen:
            raise InputError(f"the model has {model.most_positions} positions, all taken: start another stream")
        checked = self._check(vector)
        out = np.empty(model.out_dim, np.float32)
        model.step(checked, out, self._state, self._seen, self._forward.threads)
        self._seen += 1
        return out

    def copy(self) -> Stream:
        """Another stream that goes on from here."""
        twin = Stream(self._forward, self._model_id, self._check)
        twin._state, twin._seen = self._state.copy(), self._seen
        return twin

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the state to an .npz file, atomically; `Predictor.stream(file)` goes on from it."""
        with atomic_file(file) as temporary, temporary.open("wb") as target:
            np.savez(target, format=FORMAT, model=self._model_id, state=self._state, seen=np.int64(self._seen))

    def restore(self, file: str | os.PathLike[str]) -> None:
        """Go on from a saved state. InputError where there is none of this model, IntegrityError for a damaged one."""
        with Archive(file) as archive:
            kind, model, state, seen = (archive.array(name) for name in ("format", "model", "state", "seen"))
        if kind.dtype.kind != "U" or str(kind) != FORMAT:
            raise InputError(f"{file} is not the state of a stream: name a file that Stream.save wrote")
        if str(model) != self._model_id:
            raise InputError(f"{file} is the state of another model ({model}): load the artifact it was saved with")
        whole = state.shape == self._state.shape and state.dtype == np.float32 and seen.dtype == np.int64
        if not whole or seen.ndim or seen < 0 or not np.isfinite(state).all():
            raise IntegrityError(f"{file} is damaged: save it again")
        self._state, self._seen = state.copy(), int(seen)
