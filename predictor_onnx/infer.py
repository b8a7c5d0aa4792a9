"""Run a predictor's network with ONNX Runtime: averages of block scores in, expected attention out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
INPUT, OUTPUT = "averages", "scores"


class PredictorError(ValueError):
    """A predictor file is missing or cannot be used; the message is one sentence."""


class OnnxPredictor:
    """A network that maps averages of block scores to the attention each block is expected to get.

    Parameters
    ----------
    path : Path
        An ONNX file with one float32 input ``averages`` (n_rows, n_averages, n_blocks) and one float32 output ``scores``
        (n_rows, n_blocks).
    n_averages : int
        Averages per block that the runtime keeps.
    n_threads : int
        Of ONNX Runtime; 1 leaves the other cores to the model.

    Raises
    ------
    PredictorError
        ONNX Runtime is not installed, or the file is missing, not ONNX, of another shape, or yields NaN.
    """

    def __init__(self, path: Path, n_averages: int, n_threads: int = 1):
        try:
            import onnxruntime
        except ImportError:
            raise PredictorError(
                "ONNX predictors need ONNX Runtime: pip install onnxruntime, or onnxruntime-gpu for CUDA (kvcast[cpu] or kvcast[cuda])"
            ) from None
        if not path.is_file():
            raise PredictorError(f"there is no predictor {str(path)!r}; those that come with kvcast: {', '.join(shipped())}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores that wait belong to the model
        options.log_severity_level = 4
        errors = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (
            errors.Fail,
            errors.InvalidProtobuf,
            errors.InvalidGraph,
            errors.NotImplemented,
            errors.InvalidArgument,
            RuntimeError,
        ) as error:
            reason = str(error).splitlines()[0][:160]
            raise PredictorError(f"predictor {path.name!r} cannot be loaded ({reason}); export it again or use predictor='ema'") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else None
        if [i.name for i in inputs] != [INPUT] or [o.name for o in outputs] != [OUTPUT] or shape is None or len(shape) != 3:
            names = ", ".join(f"{i.name} {i.shape}" for i in inputs)
            raise PredictorError(f"predictor {path.name!r} takes {names}; kvcast gives one input '{INPUT}' (rows, {n_averages}, blocks)")
        if isinstance(shape[1], int) and shape[1] != n_averages:
            raise PredictorError(f"predictor {path.name!r} wants {shape[1]} averages per block; this runtime keeps {n_averages}")
        probe = self._run(np.full((2, n_averages, 33), 0.01, np.float32))
        if probe.shape != (2, 33) or not np.isfinite(probe).all():
            raise PredictorError(f"predictor {path.name!r} yields values that are not numbers; its weights are damaged, export it again")

    def predict(self, averages: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """averages : float32, shape (n_rows, n_averages, n_blocks); returns float32, shape (n_rows, n_blocks)."""
        return self._run(np.ascontiguousarray(averages))

    def _run(self, averages: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return self._session.run([OUTPUT], {INPUT: averages})[0]


def shipped() -> list[str]:
    """Names of the predictors that come with kvcast."""
    return sorted(p.stem for p in HERE.glob("*.onnx"))


def resolve(name: str) -> Path:
    """The file of a shipped predictor's name, or of a path."""
    return HERE / f"{name}.onnx" if "/" not in name and not name.endswith(".onnx") else Path(name)
