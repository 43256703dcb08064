"""Products and ops of the CUDA backend on a CPU. cuBLAS is not here, its calls are."""

import pytest
import torch
from csrc_backend_case import arguments, assert_same, linear_loss, needs_compiler, registered  # noqa: F401
from cuda_on_cpu import WideningProducts, cpu_kernels, kernels_for
from loss_problems import FP32, error, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from cotbal_kernels import backends, cuda_backend, logits_ops, ops
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.cuda_kernels import gradients as cuda_gradients
from cotbal_kernels.cuda_kernels import products as cuda_products
from cotbal_kernels.interface import Backend, LinearProblem, TokenLoss
from cotbal_kernels.reference import reference_linear_task_cross_entropy

pytestmark = needs_compiler


class CublasOverloads(TorchDispatchMode):
    """Answers the overloads that exist on CUDA alone, as their schemas say; optionally as an older torch does."""

    def __init__(self, mixed_addmm: bool) -> None:
        super().__init__()
        self.mixed_addmm, self.calls = mixed_addmm, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        self.calls.append(func)
        if func == aten.mm.dtype_out:
            assert args[2] == kwargs["out"].dtype == torch.float32
            return kwargs["out"].copy_(args[0].float() @ args[1].float())
        if func == aten.mm.dtype:
            return args[0].float() @ args[1].float()
        if func == aten.addmm.dtype_out:
            if not self.mixed_addmm:
                raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
            return kwargs["out"].copy_(args[0] + args[1].float() @ args[2].float())
        return func(*args, **kwargs)


@pytest.mark.parametrize("mixed_addmm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_products(mixed_addmm: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_products, "BLOCK_BYTES", 4 * 5 * 4)  # blocks of four rows, a ragged last one
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((11, 7), (7, 5)))
    exact = left.double() @ right.double()
    products, total, narrow = (
        cuda_products.LibraryProducts(),
        torch.empty(11, 9)[:, :5],
        torch.empty(11, 5, dtype=dtype),
    )
    with CublasOverloads(mixed_addmm) as overloads:
        products.wide(left, right, total)
        products.add(total, left, right)
        products.add(total, left, right)
        products.rounded(left, right, narrow)
    assert error(total, 3 * exact) <= FP32
    assert error(narrow, exact) <= (FP32 if dtype == torch.float32 else torch.finfo(dtype).eps)
    refused = overloads.calls.count(torch.ops.aten.addmm.dtype_out)
    assert refused == (0 if dtype == torch.float32 else 2 if mixed_addmm else 1)  # asked once


def test_library_products_through_the_ops() -> None:
    """float32 products run here too: results in place although the inputs require grad."""
    backends.register_backend("cuda_on_cpu", CudaBackend(kernels_for, cuda_products.LibraryProducts()))
    p = make_problem()
    inputs = (p.hidden, p.weight, p.task_weights)
    expected = reference_linear_task_cross_entropy(*p.tensors)
    for recompute in (False, True):
        assert_same(linear_loss(*p.tensors, chunk_size=7, recompute=recompute), expected, inputs)
    into = torch.zeros(p.weight.shape)
    linear_loss(*p.tensors, chunk_size=7, grad_weight_out=into).loss.backward()
    assert error(into, torch.autograd.grad(expected.loss, p.weight)[0]) <= FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck(dtype: torch.dtype) -> None:
    """What comes back has the shapes, strides and aliases that the ops promise to a compiler."""
    p = make_problem((2, 6), D=8, V=11, K=3, dtype=dtype)
    (hidden, weight, bias, where, *rows), targets, lam = arguments(p)
    hidden.requires_grad_()
    spec, end, every = (0.0, 0.1, 0.01, 0.7, 0.1 / 11), (5, "cuda_on_cpu"), (True,) * 3
    grad, stats, logits = torch.rand(12), torch.rand(2, 12), torch.randn(12, 11).to(dtype).requires_grad_()
    backward = (grad, hidden.detach(), weight, bias, where, *rows, stats)
    for op, args in (
        (ops.linear_task_ce, (hidden, weight, bias, where, targets.tasks_M, *rows, lam, every, spec, *end)),
        (ops.scale_gradient, (weight, torch.tensor(3.0), torch.float32, "cuda_on_cpu")),
        (ops.scale_gradient_, (weight.detach().clone(), torch.tensor(3.0), "cuda_on_cpu")),
        (ops.linear_task_ce_rows_backward, (*backward, None, every, spec, *end, torch.float32)),
        (ops.linear_task_ce_rows_backward, (*backward, torch.zeros(11, 8), every, spec, *end, dtype)),
        (logits_ops.task_ce_rows, (logits, where, spec, *end, False)),
        (logits_ops.task_ce_rows_backward, (grad, logits.detach(), where, stats, spec, *end)),
        (logits_ops.task_ce_rows_backward_, (grad, logits.detach().clone(), where, stats, spec, *end)),
    ):
        torch.library.opcheck(op, args)


def test_the_whole_backend_calls_products_as_cublas_takes_them() -> None:
    p = make_problem(dtype=torch.bfloat16)
    problem, targets, lam = arguments(p)
    found = []
    for products in (WideningProducts(), cuda_products.LibraryProducts()):
        backend = CudaBackend(kernels_for, products)
        with CublasOverloads(True):
            found.append(backend.linear_forward(problem, targets.tasks_M, lam, (True,) * 3, TokenLoss(), 7))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_settings_of_cublas_are_restored() -> None:
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    during = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            during.append(getattr(settings, name))
            return func(*args, **(kwargs or {}))

    left, out = torch.ones(2, 2), torch.empty(2, 2)
    for before in (True, False):
        setattr(settings, name, before)
        with Look():
            cuda_products.LibraryProducts().rounded(left, left, out)
        assert getattr(settings, name) == before
    setattr(settings, name, True)
    assert during == [False, False]


def test_the_module_is_a_backend() -> None:
    """Everything the protocol asks for, and nothing compiled by importing it."""
    names = {name for name in vars(Backend) if not name.startswith("_")}
    assert {name for name in names if callable(getattr(cuda_backend, name, None))} == names


@pytest.mark.parametrize("into", [False, True])
def test_sums_over_slices_are_rounded_once(into: bool) -> None:
    """dX is float32 until all slices are in; dW, and dW added to a 16-bit buffer, have all rows in one slice."""
    generator = torch.Generator().manual_seed(0)
    dlogits, hidden, weight = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((5, 200), (5, 9), (200, 9))
    )
    buffer, before = (weight.clone(), weight.double()) if into else (None, torch.zeros(200, 9).double())
    dtypes = (torch.bfloat16,) * 3
    every = torch.arange(5)
    problem = LinearProblem(hidden, weight, None, every, every, torch.tensor([5]))
    sums = cuda_gradients.LinearGradients(cpu_kernels(), WideningProducts(), problem, (True,) * 3, dtypes, None, buffer)
    for first in range(0, 200, 3):
        sums.add_slice(dlogits[:, first : first + 3], first)
        sums.add_weight(dlogits[:, first : first + 3], hidden, first)
    grad_hidden, grad_weight, grad_bias = sums.rounded()
    wide = dlogits.double()
    for found, wanted in (
        (grad_hidden, wide @ weight.double()),
        (buffer if into else grad_weight, before + wide.t() @ hidden.double()),
        (grad_bias, wide.sum(0)),
    ):
        assert found is not None
        assert found.dtype == torch.bfloat16
        # One rounding of its own value; float32 sums of some terms of order one.
        assert bool(
            ((found.double() - wanted).abs() <= torch.finfo(torch.bfloat16).eps / 2 * wanted.abs() + 2e-5).all()
        )


def test_lifts_are_powers_of_two_however_small_the_gradient() -> None:
    for largest in (1e25, 1.0, 1e-38, 1e-45, 0.0):
        lift = cuda_gradients.lift_for(torch.tensor([0.0, -largest]), 0.5)
        assert lift is not None
        assert float(lift.up) > 0
        assert float(lift.up) * float(lift.down) == 1
        assert float(lift.up) * largest * 0.5 < 16
