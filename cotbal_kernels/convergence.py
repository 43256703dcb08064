"""CoBa, the convergence balancer: task weights from the slopes of validation losses, kept on the device.

Source: Gong et al., "CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models"
(https://arxiv.org/abs/2410.06741), Eq. 2-7.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .convergence_update import Settings, State, update
from .validation import require_tensor

VARIANTS = ("absolute", "printed", "mftcoder")
BACKENDS = ("auto", "triton", "portable")


class ConvergenceBalancer:
    """Task weights of CoBa. Slow tasks gain weight while all converge (RCS), diverging ones lose it (ACS).

    Call :meth:`step` once per update with the validation loss of every task; calls are the steps t = 0, 1, 2, ...
    With r_i(t) = L_i(t) / L_i(0) and alpha_i(t) the least-squares slope of the last ``window`` ratios (Eq. 2, 3)::

        RCS_i(t) = softmax_i(K alpha_i(t) / sum_i |alpha_i(t)|)                                         (Eq. 4)
        ACS_i(t) = softmax_i(-n alpha_i(t) / sum of |alpha_i| over its last n <= window steps)          (Eq. 5)
        DF(t)    = min(t softmax_j(-temperature t a(j) / sum_j |a(j)|)[t], 1),  a(j) = max_i alpha_i(j) (Eq. 7)
        w(t)     = DF RCS + (1 - DF) ACS, uniform while t <= warmup                                     (Eq. 6)

    Args:
        num_tasks: K.
        window: N >= 2, ratios per fit. The paper recommends twice the batches of the validation set.
        warmup: W >= 0, steps with uniform weights; slopes are recorded meanwhile. The paper: half of ``window``.
        temperature: tau > 0 of Eq. 7.
        variant: "absolute", the equations above. "printed", the paper's equations to the letter: Eq. 5 multiplies by
            N from the first step on and Eq. 7 divides by the signed sum, which gives most of the weight to a task
            that diverges. "mftcoder", what the authors' code computes (MFTCoder's CoBaStatus, update interval 1):
            step t is its ``completed_steps``; ratios count from t = 2 and slopes from t = W on; a(j) is the slope of
            max_i r_i; Eq. 5 sees N - W + 1 slopes; DF is not clipped; the result goes through softmax(K w) and a
            floor of 1 / (10 K). That code runs for 3 <= W <= N only; elsewhere
            the formulas are continued, with 1 to N slopes in Eq. 5.
        device: where the state lives and ``val_losses`` will be; None is torch's default device.
        history: H, how many a(j) are kept. Every term of Eq. 7 is rescaled at every step, so nothing shorter than the
            whole sequence is exact. Up to H steps DF is exact; after that j runs over the last H steps and t in Eq. 7
            is H, and a ``UserWarning`` says so once. Costs 8 H bytes, next to no time on a GPU, and on a CPU at most
            1 ms at the default, below which PyTorch also stays on one thread there.
        backend: "triton", one launch per step; "portable", PyTorch; "auto" picks by the device.

    **Absent tasks** have a time axis of their own: their rings hold the last N (step, ratio) pairs at which they were
    present, and an absent task keeps its slope and scores. L_i(0) is that of :meth:`start`, else the loss at the first
    presence. A task without two presences has slope 0 and is left out of a(j). ("mftcoder" does as its code: the last
    N steps, less those without the task, with the gaps closed.) A loss counts as absent too when it is NaN or infinite,
    when it would be an L_i(0) <= 0 or has a ratio beyond 1e100, and with "mftcoder" when it is 0. Nothing is read by
    the host for this.

    **Constant losses**: a sum of zeros in Eq. 4, 5 or 7 makes its softmax uniform.

    The state is float64, fixed in size (about 24 K N + 8 H bytes) and updated in place, step counter included, so a
    CUDA graph can capture :meth:`step`. All ranks stay identical if they are given identical (all-reduced) losses.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        window: int,
        warmup: int,
        temperature: float = 5.0,
        variant: str = "absolute",
        device: torch.device | str | None = None,
        history: int = 32000,
        backend: str = "auto",
    ) -> None:
        _check_integer("num_tasks", num_tasks, 1)
        _check_integer("window", window, 2)
        _check_integer("warmup", warmup, 0)
        _check_integer("history", history, 1)
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not (number and temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
        _check_choice("variant", variant, VARIANTS)
        _check_choice("backend", backend, BACKENDS)
        self.settings = Settings(num_tasks, window, warmup, float(temperature), variant, history)
        # A tensor resolves "cuda" to "cuda:0", which is what val_losses.device will say.
        self.device = torch.empty(0, device=device).device
        with torch.inference_mode(False):  # or no step outside of inference mode could change it
            self._state = State.start(self.settings, self.device)
            self._triton = _triton_step(backend, self.settings, self.device)
        # Follows state.step on the host; only replays of a CUDA graph leave it behind, and no result on a GPU uses it.
        self._calls = 0

    @property
    def weights(self) -> Tensor:
        """The newest weights, ``[K]`` float32, mean 1 (ones before the first step). Changed in place by each step."""
        return self._state.weights

    @property
    def slopes(self) -> Tensor:
        """The newest alpha_i, ``[K]`` float64, per step. Changed in place by each step."""
        return self._state.slopes[: self.settings.num_tasks]

    @torch.no_grad()
    def start(self, initial_losses: Tensor) -> None:
        """Set L_i(0) before the first step, from more than the batch of step 0.

        Every ratio of a task has its L_i(0), so the noise of a small first batch would stay in its weight. The authors'
        code takes one pass over the validation set.

        Args:
            initial_losses: ``[K]`` floating point, mean loss of each task before the training. A task for which it is
                NaN, infinite or <= 0 has the loss at its first presence.
        """
        self._check_losses("initial_losses", initial_losses)
        if self._calls:
            raise ValueError(f"start must come before the first step, got it after {self._calls}")
        losses_K = initial_losses.double()
        self._state.initial.copy_(torch.where((losses_K > 0) & losses_K.isfinite(), losses_K, 0.0))

    @torch.no_grad()
    def step(self, val_losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Take the validation losses of step t and return the weights of step t, without reading any value.

        Args:
            val_losses: ``[K]`` floating point, mean loss of each task. Any value where the task is absent.
            present: ``[K]`` bool, which tasks were in the validation batch; None for all.

        Returns:
            ``[K]`` float32, K w_i(t): mean 1, finite, >= 0; ready for Eq. 2 of CoTBal. A new tensor at each step.
        """
        self._check_input(val_losses, present)
        if self._calls == self.settings.first_peak + self.settings.history:
            warnings.warn(
                f"Eq. 7 of CoBa sums over all steps, but ConvergenceBalancer keeps history={self.settings.history} of "
                "them: from now on it sums over the latest ones. Construct it with a larger history to avoid this.",
                stacklevel=3,  # past no_grad's wrapper, to the caller
            )
        self._calls += 1
        if self._triton is not None:
            return self._triton(self._state, val_losses, present)
        peaks = self.settings.history
        if self.device.type == "cpu":  # a shorter sum; elsewhere a graph's replays would find its length frozen
            peaks = min(max(self._calls - self.settings.first_peak, 1), peaks)
        return update(self.settings, self._state, val_losses, present, peaks)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all tensors and the settings: a balancer that loads them continues bitwise the same."""
        tensors = {name: tensor.clone() for name, tensor in self._state.tensors().items()}
        return {"settings": asdict(self.settings), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another balancer was, from any device. Its settings must be equal; reads the step number."""
        tensors = self._state.tensors()
        expected = {"settings", *tensors}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(map(str, state))}")
        if not isinstance(state["settings"], Mapping):
            raise ValueError(f"state['settings'] must be a mapping, got {type(state['settings']).__name__}")
        for name, own in asdict(self.settings).items():
            theirs = state["settings"].get(name)
            if theirs != own:
                raise ValueError(f"state must come from a balancer with {name}={own!r}, got {name}={theirs!r}")
        for name, tensor in tensors.items():
            came = state[name]
            require_tensor(f"state[{name!r}]", came)
            if came.shape != tensor.shape or came.dtype != tensor.dtype:
                raise ValueError(
                    f"state[{name!r}] must be {tensor.dtype} of shape {tuple(tensor.shape)}, "
                    f"got {came.dtype} {tuple(came.shape)}"
                )
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self._calls = int(state["step"])

    def _check_input(self, val_losses: Tensor, present: Tensor | None) -> None:
        self._check_losses("val_losses", val_losses)
        if present is not None:
            expected = (self.settings.num_tasks,)
            require_tensor("present", present)
            if tuple(present.shape) != expected or present.dtype != torch.bool:
                raise ValueError(
                    f"present must be None or bool of shape {expected}, got {present.dtype} {tuple(present.shape)}"
                )
            self._check_device("present", present)

    def _check_losses(self, name: str, losses: Tensor) -> None:
        require_tensor(name, losses)
        expected = (self.settings.num_tasks,)
        if tuple(losses.shape) != expected or not losses.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape {expected}, got {losses.dtype} {tuple(losses.shape)}"
            )
        self._check_device(name, losses)

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on the device of the balancer ({self.device}), got {tensor.device}")


def _triton_step(
    backend: str, settings: Settings, device: torch.device
) -> Callable[[State, Tensor, Tensor | None], Tensor] | None:
    """The one-launch update, or None where PyTorch does it."""
    if backend == "portable" or (backend == "auto" and device.type != "cuda"):
        return None
    from .triton_kernels.convergence import ConvergenceKernel

    return ConvergenceKernel(settings, device)


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
