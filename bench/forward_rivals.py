"""The whole forward as others run it, from the same weights: `[1, context, dim] -> [1, dim]` on numpy arrays."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forward_twin import Twin

ForwardCall = Callable[[np.ndarray], np.ndarray]
PACKAGES = ("fastlvm", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")
INPUT, OUTPUT = "context", "prediction"


class Source:
    """What the rivals are made from: the twin of a module, an example of its input, and ONNX files written once."""

    def __init__(self, module: torch.nn.Module, example: np.ndarray, folder: Path) -> None:
        """Raises AssertionError if the twin is not the module."""
        self.twin = Twin(module).eval()
        self.example = torch.from_numpy(example)
        self.notes: dict[str, str] = {}  # rival -> in what it differs from what its `timed` says
        self._folder = folder
        with torch.inference_mode():
            assert float((self.twin(self.example) - module(self.example)).abs().max()) <= 1e-5

    @cached_property
    def onnx(self) -> Path:
        path = self._folder / "model.onnx"
        with _quiet(), torch.inference_mode():
            torch.onnx.export(
                self.twin,
                (self.example,),
                path,
                dynamo=True,
                external_data=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        return path

    @cached_property
    def onnx_int8(self) -> Path:
        """Weights of the matrix products as int8 with a scale per output; activations are quantized at each call."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = self._folder / "model-int8.onnx"
        with _quiet():
            quantize_dynamic(
                self.onnx,
                path,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],  # a quantized depthwise convolution takes longer
            )
        return path


@dataclass(frozen=True)
class Rival:
    """One way to run the forward. `load(source, threads)`; `timed` says what runs between the readings of the clock."""

    name: str
    timed: str
    load: Callable[[Source, int], ForwardCall]


def _eager(source: Source, threads: int) -> ForwardCall:
    def call(context: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return source.twin(torch.from_numpy(context)).numpy()

    return call


def _compiled(source: Source, threads: int) -> ForwardCall:
    """Compiled for this number of threads, which has to be set when it is called: dynamo guards on it."""
    import torch._inductor.config as inductor
    from torch._inductor import select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False
    torch.set_num_threads(threads)
    # With freezing the weights are constants, which are packed, and autotuning has more than MKL to choose from.
    with inductor.patch(freezing=True, force_disable_caches=True), torch.no_grad(), _quiet():
        try:
            compiled = torch.compile(source.twin, mode="max-autotune", fullgraph=True, dynamic=False)
            compiled(source.example)
        except Exception as error:
            source.notes[COMPILED] = f"max-autotune failed, compiled with the default mode: {_first_line(error)}"
            compiled = torch.compile(source.twin, fullgraph=True, dynamic=False)
            compiled(source.example)

    def call(context: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return compiled(torch.from_numpy(context)).numpy()

    return call


def _onnxruntime(path: Path, threads: int) -> ForwardCall:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda context: session.run([OUTPUT], {INPUT: context})[0]


def _openvino(source: Source, threads: int, precision: str) -> ForwardCall:
    import openvino as ov

    core = ov.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(core.read_model(source.onnx), "CPU", settings).create_infer_request()
    placed = np.zeros(source.example.shape, np.float32)
    request.set_input_tensor(ov.Tensor(placed, shared_memory=True))
    result = request.get_output_tensor().data

    def call(context: np.ndarray) -> np.ndarray:
        placed[...] = context
        request.infer()
        return result.copy()

    return call


COMPILED = "torch.compile fp32"
_ONNX = "torch.onnx.export of the plain PyTorch model, run by"
_ORT = f"{_ONNX} onnxruntime with all graph optimisations"
_OPENVINO = f"{_ONNX} OpenVINO's CPU plugin with the latency hint, an input allocated once and precision hint"
RIVALS = (
    Rival("PyTorch fp32", "the model in plain PyTorch (bench/forward_twin.py) under torch.inference_mode", _eager),
    Rival(
        COMPILED,
        'the same under torch.compile(mode="max-autotune", fullgraph=True, dynamic=False) with frozen weights, '
        "compiled before for each number of threads",
        _compiled,
    ),
    Rival("ONNX Runtime fp32", _ORT, lambda source, threads: _onnxruntime(source.onnx, threads)),
    Rival(
        "ONNX Runtime int8",
        f"{_ORT}, weights of the matrix products quantized by quantize_dynamic(per_channel=True) to int8",
        lambda source, threads: _onnxruntime(source.onnx_int8, threads),
    ),
    Rival("OpenVINO fp32", f"{_OPENVINO} f32", lambda source, threads: _openvino(source, threads, "f32")),
    Rival("OpenVINO bf16", f"{_OPENVINO} bf16", lambda source, threads: _openvino(source, threads, "bf16")),
)


def load(rival: Rival, source: Source, threads: int) -> tuple[ForwardCall | None, str]:
    """The call, or None and why there is none."""
    try:
        return rival.load(source, threads), ""
    except ImportError as error:
        return None, f"cannot be imported: {_first_line(error)}"
    except Exception as error:  # whatever a compiler or converter throws
        return None, f"cannot be loaded: {described(error)}"


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Without the warnings and progress notes of exporters and compilers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
