"""The kernels of csrc/ for Python: where the library comes from, why it may be missing, and its launches.

``unavailable_reason()`` says whether the kernels can run on a device; ``load()`` returns them, compiling csrc/ on first
use if no compiled library was installed. The launches check what the C API cannot see (device, dtype, layout) and turn
an error code into a ``RuntimeError``. They enqueue on the current stream and never synchronise.
"""

# Shapes: M positions, N rows that may be computed, C rows of a chunk, V vocabulary, K tasks.

import ctypes
import functools
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..interface import LinearProblem, Targets, TokenLoss, compute_capability
from . import build

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/numeric.cuh
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_MATRIX = [_POINTER, _INT, _SIZE]  # data, dtype, row stride
_CHUNK = [*_MATRIX, *_MATRIX, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, *[_POINTER] * 3, *[_FLOAT] * 5]
_SIGNATURES = {
    "cotbal_chunk_gradient": [*_CHUNK, *[_POINTER] * 4, _POINTER],
    "cotbal_saved_gradient": [*_CHUNK, *[_POINTER] * 2, _POINTER],
    "cotbal_task_sums": [*[_POINTER] * 3, _SIZE, _SIZE, *[_POINTER] * 2, _POINTER],
    "cotbal_scale_gradient": [_POINTER, _INT, _POINTER, _POINTER, _INT, _SIZE, _POINTER],
    "cotbal_compact": [*[_POINTER] * 3, *[_SIZE] * 4, _INT, *[_POINTER] * 6, _SIZE, _POINTER],
    "cotbal_task_scales": [*[_POINTER] * 4, _INT, _SIZE, *[_POINTER] * 2, _POINTER],
    "cotbal_gather_rows": [_POINTER, _SIZE, *[_POINTER] * 2, *[_SIZE] * 3, _POINTER, _POINTER],
    "cotbal_scatter_rows": [*[_POINTER] * 4, *[_SIZE] * 3, _POINTER, _INT, _POINTER],
}
_build_failure: str | None = None


class ChunkRows(NamedTuple):
    """Which positions the rows of a chunk are, and what their gradients are multiplied by."""

    rows_N: Tensor | None  # int64 positions, M where there is none; None: row r is position start + r
    num_rows: Tensor | None  # int64 [1], with rows_N
    start: int  # of the chunk in rows_N
    # int64; -1: no target among these logits, for saved_gradient any other that is none of their columns too. Without
    # rows_N, -1 is a position that is not computed.
    targets_M: Tensor
    tasks_M: Tensor | None  # int64; None: scale is per position
    scale: Tensor | None  # float32 [K] with tasks_M, else [M]; None where no gradient is wanted


class RowResults(NamedTuple):
    """Results of every position ``[M]``, written where it is computed and nowhere else."""

    loss_M: Tensor  # float32
    max_M: Tensor  # float32
    log_sum_M: Tensor  # float32
    hit_M: Tensor  # int64


class KernelLibrary:
    """The kernels of one compiled library. ``device_type`` is "cuda", or "cpu" for a build that runs on the host."""

    def __init__(self, path: Path, device_type: str = "cuda") -> None:
        self.path, self.device_type = path, device_type
        self._library = ctypes.CDLL(str(path))
        for name, argtypes in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = argtypes, _INT
        self._library.cotbal_error_string.argtypes = [_INT]
        self._library.cotbal_error_string.restype = ctypes.c_char_p
        self._library.cotbal_source.restype = ctypes.c_char_p
        self.source: str = self._library.cotbal_source().decode()

    def chunk_gradient(
        self,
        logits_CV: Tensor,
        out_CV: Tensor | None,
        bias_V: Tensor | None,
        where: ChunkRows,
        spec: TokenLoss,
        results: RowResults,
    ) -> None:
        """Losses and statistics of a chunk, and the gradient of its logits where ``out_CV`` is given.

        Args:
            logits_CV: float32, bfloat16 or float16, ``stride(1) == 1``, any row stride.
            out_CV: dtype of the logits, or any of the three for float32 logits. It may be the logits themselves, or
                16-bit values at the front of every row of float32 logits (row stride twice as many elements).
                Rows that are no position become zeros.
            bias_V: float32.
        """
        self._require_vectors((*where[:2], *where[3:], bias_V, *results))
        chunk = self._chunk(logits_CV, out_CV, bias_V, where, spec)
        self._launch("cotbal_chunk_gradient", logits_CV, *chunk, *map(_pointer, results))

    def saved_gradient(
        self,
        logits_CV: Tensor,
        out_CV: Tensor,
        bias_V: Tensor | None,
        where: ChunkRows,
        spec: TokenLoss,
        stats_2M: Tensor,
    ) -> None:
        """The same gradient from the largest logit and the log of the sum, float32 ``[2, M]`` contiguous."""
        self._require_vectors((*where[:2], *where[3:], bias_V, stats_2M[0], stats_2M[1]))
        chunk = self._chunk(logits_CV, out_CV, bias_V, where, spec)
        self._launch("cotbal_saved_gradient", logits_CV, *chunk, _pointer(stats_2M[0]), _pointer(stats_2M[1]))

    def task_sums(self, loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
        """Return the sums of losses (float32) and of hits (int64) of every task ``[K]``, in a fixed order."""
        self._require_vectors((loss_M, hit_M, tasks_M))
        loss_K, hit_K = loss_M.new_empty(num_tasks), hit_M.new_empty(num_tasks)
        sizes = (loss_M.shape[0], num_tasks)
        self._launch(
            "cotbal_task_sums",
            loss_M,
            *map(_pointer, (loss_M, hit_M, tasks_M)),
            *sizes,
            *map(_pointer, (loss_K, hit_K)),
        )
        return loss_K, hit_K

    def scale_gradient(self, grad: Tensor, factor: Tensor, out: Tensor) -> None:
        """``out = grad * factor``, the product in float32; both contiguous, ``factor`` one float32.

        ``out`` may be ``grad``, which is not touched where the factor is 1.
        """
        if not grad.is_contiguous() or not out.is_contiguous():
            raise ValueError("grad and out must be contiguous")
        self._require_vectors((factor.reshape(1),))
        codes = _DTYPE_CODES[grad.dtype], _DTYPE_CODES[out.dtype]
        pointers = _pointer(grad), codes[0], _pointer(factor), _pointer(out), codes[1]
        self._launch("cotbal_scale_gradient", grad, *pointers, grad.numel())

    def compact(
        self,
        labels_M: Tensor,
        task_ids_M: Tensor,
        task_weights_K: Tensor,
        vocab_size: int,
        ignore_index: int,
        skip_zero: bool,
        capacity: int,
    ) -> Targets:
        """The rows to compute and what belongs to them; int64 labels and task ids, float32 weights, contiguous."""
        self._require_vectors((labels_M, task_ids_M, task_weights_K))
        out = Targets.empty(labels_M, task_weights_K, capacity)
        sizes = (labels_M.shape[0], task_weights_K.shape[0], vocab_size, ignore_index, skip_zero)
        pointers = map(_pointer, (labels_M, task_ids_M, task_weights_K))
        self._launch("cotbal_compact", labels_M, *pointers, *sizes, *map(_pointer, out), capacity)
        return out

    def task_scales(
        self, task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
    ) -> tuple[Tensor, Tensor]:
        """Lambda over the normalizer and that, ``[K]`` both, as the protocol of backends says; all contiguous."""
        self._require_vectors((task_weights_K, tokens_K, poison, normalizer))
        out = task_weights_K.new_empty(task_weights_K.shape), task_weights_K.new_empty(task_weights_K.shape)
        given = map(_pointer, (task_weights_K, tokens_K, poison, normalizer))
        sizes = (per_task, task_weights_K.shape[0])
        self._launch("cotbal_task_scales", task_weights_K, *given, *sizes, *map(_pointer, out))
        return out

    def gather_rows(self, problem: LinearProblem, start: int, rows: int) -> Tensor:
        """Hidden states of the rows from ``start`` on ``[C, D]``, 0 where they are no position.

        Float32, bfloat16 or float16, ``stride(1) == 1``, any row stride.
        """
        hidden_MD, size = problem.hidden_MD, problem.hidden_MD.element_size()
        if hidden_MD.shape[1] > 1 and hidden_MD.stride(1) != 1:
            raise ValueError(f"hidden must have neighbouring columns (stride 1), got stride {hidden_MD.stride(1)}")
        self._require_vectors((problem.rows_N, problem.num_rows))
        out_CD = hidden_MD.new_empty((rows, hidden_MD.shape[1]))
        listed = (_pointer(problem.rows_N), _pointer(problem.num_rows), start, rows)
        source = (_pointer(hidden_MD), hidden_MD.stride(0) * size)
        self._launch("cotbal_gather_rows", hidden_MD, *source, *listed, hidden_MD.shape[1] * size, _pointer(out_CD))
        return out_CD

    def scatter_rows(
        self, grad_CD: Tensor, factor: Tensor | None, problem: LinearProblem, start: int, out_MD: Tensor
    ) -> None:
        """``out[position] = grad * factor`` for the rows from ``start`` on, rounded once; rows that are none are left.

        Args:
            grad_CD: float32, contiguous.
            factor: one float32, or None for 1.
            out_MD: float32, bfloat16 or float16, contiguous.
        """
        if not grad_CD.is_contiguous() or grad_CD.dtype != torch.float32 or not out_MD.is_contiguous():
            raise ValueError("grad must be contiguous and float32, and out contiguous")
        self._require_vectors((problem.rows_N, problem.num_rows, factor))
        listed = (_pointer(problem.rows_N), _pointer(problem.num_rows), start)
        out = (_pointer(out_MD), _DTYPE_CODES[out_MD.dtype])
        self._launch("cotbal_scatter_rows", grad_CD, _pointer(grad_CD), _pointer(factor), *listed, *grad_CD.shape, *out)

    def _chunk(
        self, logits_CV: Tensor, out_CV: Tensor | None, bias_V: Tensor | None, where: ChunkRows, spec: TokenLoss
    ) -> tuple[object, ...]:
        for name, matrix in (("logits", logits_CV), ("out", out_CV)):
            if matrix is not None and matrix.shape[1] > 1 and matrix.stride(1) != 1:
                raise ValueError(f"{name} must have neighbouring columns (stride 1), got stride {matrix.stride(1)}")
        out = logits_CV if out_CV is None else out_CV  # any valid dtype where nothing is written
        return (
            *(_pointer(logits_CV), _DTYPE_CODES[logits_CV.dtype], logits_CV.stride(0)),
            *(_pointer(out_CV), _DTYPE_CODES[out.dtype], out.stride(0)),
            _pointer(bias_V),
            *logits_CV.shape,
            *(_pointer(where.rows_N), _pointer(where.num_rows), where.start),
            *(_pointer(where.targets_M), _pointer(where.tasks_M), _pointer(where.scale)),
            *spec,
        )

    def _require_vectors(self, vectors: tuple[Tensor | None, ...]) -> None:
        for vector in vectors:
            if vector is None:
                continue
            if vector.dtype not in (torch.float32, torch.int64) or not vector.is_contiguous():
                raise ValueError(f"expected a contiguous float32 or int64 vector, got {vector.dtype} {vector.stride()}")
            self._require_device(vector)

    def _require_device(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device_type:
            raise ValueError(f"the kernels of {self.path} run on {self.device_type}, got a tensor on {tensor.device}")

    def _launch(self, name: str, on: Tensor, *arguments: object) -> None:
        self._require_device(on)
        guard = torch.cuda.device(on.device) if on.is_cuda else nullcontext()
        with guard:
            stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else None
            error = getattr(self._library, name)(*arguments, stream)
        if error:
            raise RuntimeError(f"{name} failed: {self._library.cotbal_error_string(error).decode()} ({error})")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _prebuilt() -> KernelLibrary | None:
    """The library that ``setup.py`` compiled, unless csrc/ has changed since (in an editable installation)."""
    path = Path(__file__).parent / "_csrc.so"
    if not path.exists():
        return None
    library = KernelLibrary(path)
    return library if library.source == build.source_digest() else None


def unavailable_reason(device: torch.device | None) -> str | None:
    """Why the CUDA kernels cannot run on a device (None: on none of this machine) and what to do about it.

    None if they can, and where they still have to be compiled, which ``load`` does on first use.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no CUDA device is visible: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    capability = compute_capability(device)
    if capability < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer"
    if _build_failure is not None:
        return f"compiling the CUDA kernels failed: {_build_failure}"
    loaded = _load.cache_info().currsize > 0
    if not loaded and _prebuilt() is None and build.find_nvcc() is None:
        return (
            "no compiled kernels are installed and nvcc is not found: install the CUDA toolkit and set CUDA_HOME, "
            "or install cotbal where nvcc is with COTBAL_BUILD_CUDA=1"
        )
    return None


@functools.cache
def load(device: torch.device) -> KernelLibrary:
    """The kernels for a CUDA device, current or not; compiles them if needed (one line on stderr).

    Raises:
        RuntimeError: they cannot run there; the message is ``unavailable_reason(device)``.
    """
    global _build_failure
    reason = unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(reason)
    try:
        return _load(torch.cuda.get_device_capability(device))
    except (build.BuildError, subprocess.CalledProcessError, OSError) as error:
        _build_failure = str(error)
        raise RuntimeError(str(unavailable_reason(device))) from error


@functools.cache
def _load(capability: tuple[int, int]) -> KernelLibrary:
    prebuilt = _prebuilt()
    if prebuilt is not None:
        return prebuilt
    return KernelLibrary(build.cached_library(str(build.find_nvcc()), capability))
