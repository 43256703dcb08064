"""Values of the kernels of csrc/, run on the CPU from their own source and as nvcc's PTX, against float64."""

import math

import pytest
import torch
from csrc_case import (
    BF16,
    F16,
    F32,
    FORMATS,
    PLAIN,
    SENTINEL,
    Case,
    check_gradient,
    compiled,  # noqa: F401 (a fixture, "kernels")
    everything,
    one_thread,  # noqa: F401 (a fixture)
    oracle,
    outside_untouched,
    placed,
)
from cuda_on_cpu import (
    ASCENDING,
    SHUFFLED,
    cpu_kernels,
    find_compiler,
    schedule,
)
from cuda_on_cpu.as_ptx import PtxKernels
from loss_problems import FP32
from torch import Tensor

from cotbal_kernels.cuda_kernels.library import ChunkRows, KernelLibrary, RowResults
from cotbal_kernels.interface import TokenLoss

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: CXX, g++, c++")


# Threads and columns per tile are 128 and 2048 up to 4096 columns, 512 and 8192 up to 65536, 1024 and 16384 beyond:
# one word; less than one load; one ragged tile; two; three of the next size; five of the largest.
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(str(d)[6:] for d in f))
@pytest.mark.parametrize("vocab", [1, 3, 67, 2053, 20011, 70001])
@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
def test_chunk_gradient(
    kernels: KernelLibrary, formats: tuple[torch.dtype, torch.dtype], vocab: int, general: bool
) -> None:
    """Losses, statistics and gradient; rows that are none become zeros and write nothing else."""
    spec = everything(vocab) if general else PLAIN
    for misaligned, pad in ((0, 0), (1, 2), (3, 5)) if vocab < 20000 else ((1, 2),):
        case = Case(vocab, formats[0], misaligned=misaligned, pad=pad, bias=general)
        expected, before = case.expected(spec), case.whole.clone()
        whole, out_CV = placed(case.C, vocab, formats[1], misaligned=2 * misaligned, pad=pad)
        kernels.chunk_gradient(case.logits_CV, out_CV, case.bias_V, case.where(), spec, case.results)
        case.check_results(expected, formats[0])
        check_gradient(out_CV, expected[-1])
        assert outside_untouched(whole, out_CV)
        assert torch.equal(case.whole.nan_to_num(5), before.nan_to_num(5))
        # The same from the saved statistics.
        stats_2M = torch.stack([case.results.max_M, case.results.log_sum_M])
        again = torch.full_like(out_CV, SENTINEL)
        kernels.saved_gradient(case.logits_CV, again, case.bias_V, case.where(), spec, stats_2M)
        check_gradient(again, expected[-1])
        # A slice of the columns, where targets of others lie before the first or behind the last.
        columns = slice(vocab // 3, vocab - vocab // 3)
        where, sliced = case.where(), torch.full_like(again[:, columns], SENTINEL)
        where = where._replace(targets_M=where.targets_M - columns.start)
        bias_W = None if case.bias_V is None else case.bias_V[columns]
        kernels.saved_gradient(case.logits_CV[:, columns], sliced, bias_W, where, spec, stats_2M)
        assert torch.equal(sliced, again[:, columns])


def test_losses_alone_leave_the_logits(kernels: KernelLibrary) -> None:
    case = Case(2053, BF16, misaligned=1)
    spec = everything(2053)
    expected, before = case.expected(spec), case.whole.clone()
    where = case.where()._replace(tasks_M=None, scale=None)
    kernels.chunk_gradient(case.logits_CV, None, None, where, spec, case.results)
    case.check_results(expected, BF16)
    assert torch.equal(case.whole.nan_to_num(5), before.nan_to_num(5))


def test_rows_are_positions_where_no_list_is_given(kernels: KernelLibrary) -> None:
    """And a scale per position; a target of -1 is a row of zeros."""
    case = Case(67, F32)
    case.logits_CV.copy_(torch.randn(5, 67))
    targets_M, scale_M = torch.tensor([7, 3, -1, 66, -1, 0]), torch.tensor([9.0, -1.5, 9.0, 0.25, 9.0, 2.0])
    results = RowResults(*(torch.zeros(6) for _ in range(3)), torch.zeros(6, dtype=torch.int64))
    out_CV = torch.full((5, 67), SENTINEL)
    where = ChunkRows(None, None, 1, targets_M, None, scale_M)
    kernels.chunk_gradient(case.logits_CV, out_CV, None, where, PLAIN, results)
    loss, *_, gradient = oracle(case.logits_CV[[0, 2, 4]], None, targets_M[[1, 3, 5]], scale_M[[1, 3, 5]], PLAIN)
    assert float((results.loss_M[[1, 3, 5]] - loss).abs().max()) <= FP32 * float(loss.max())
    assert float((out_CV[[0, 2, 4]] - gradient).abs().max()) <= FP32 * float(gradient.abs().max())
    assert bool((out_CV[[1, 3]] == 0).all())
    assert results.loss_M[[0, 2, 4]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("spec", [PLAIN, everything(200, softcap=0.0), everything(200)], ids=["plain", "linear", "all"])
def test_a_row_may_have_no_target_here(kernels: KernelLibrary, spec: TokenLoss) -> None:
    """These columns are a shard of 200: a listed row with target -1, and statistics that others contributed to."""
    case = Case(67, F32, misaligned=1)
    case.targets_M[9] = -1
    case.whole[:33] = math.nan  # where a target of -1 would be read
    out_CV = torch.empty(case.C, 67)
    raw = case.logits_CV[:3].double().requires_grad_()
    z = spec.scale * raw
    if spec.softcap:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    is_target = torch.arange(67) == case.targets_M[case.positions][:, None]
    scale_C = case.scale_K[case.tasks_M[case.positions]].double()

    def without_lse(z: Tensor) -> Tensor:
        return -(1 - spec.smoothing) * (z * is_target).sum(1) - spec.even * z.sum(1)

    largest = z.detach().amax(1, keepdim=True)
    loss = z.logsumexp(1) - largest[:, 0] + without_lse(z - largest) + spec.z_loss * z.logsumexp(1) ** 2
    (wanted,) = torch.autograd.grad((loss * scale_C).sum(), raw, retain_graph=True)
    loss = loss.detach()
    kernels.chunk_gradient(case.logits_CV, out_CV, None, case.where(), spec, case.results)
    assert float((case.results.loss_M[case.positions] - loss).abs().max()) <= FP32 * float(loss.max())
    hits = is_target.gather(1, z.argmax(1, keepdim=True))[:, 0]
    assert case.results.hit_M[case.positions].tolist() == hits.long().tolist()
    check_gradient(out_CV, wanted)

    stats_2M = torch.stack([case.results.max_M + 1.5, case.results.log_sum_M + 0.25])
    lse = stats_2M[:, case.positions].double().sum(0)
    p_sum = (z - lse[:, None]).exp().sum(1) * (1 + 2 * spec.z_loss * lse)  # its derivative is (1 + 2 z_loss lse) p
    (wanted,) = torch.autograd.grad(((p_sum + without_lse(z)) * scale_C).sum(), raw)
    kernels.saved_gradient(case.logits_CV, out_CV, None, case.where(), spec, stats_2M)
    check_gradient(out_CV, wanted)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("spec", [PLAIN, TokenLoss(smoothing=0.2, even=0.2 / 6007)], ids=["plain", "smoothing"])
def test_large_offsets_lose_nothing(kernels: KernelLibrary, offset: float, spec: TokenLoss) -> None:
    """Logits in multiples of 2^-9, to which 1e4 adds exactly: (m + log l) - z would be off by 1e-3."""
    case = Case(6007, F32)
    case.logits_CV.copy_((torch.randn(5, 6007, generator=torch.Generator().manual_seed(1)) * 512).round() / 512)
    expected, shifted = case.expected(spec), case.logits_CV + offset
    assert torch.equal(shifted - offset, case.logits_CV)
    out_CV = torch.empty_like(shifted)
    kernels.chunk_gradient(shifted, out_CV, None, case.where(), spec, case.results)
    assert float((case.results.loss_M[case.positions] - expected[0]).abs().max()) <= FP32 * float(expected[0].max())
    check_gradient(out_CV, expected[-1])


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(str(d)[6:] for d in f))
def test_target_minus_one_is_formed_before_rounding(
    kernels: KernelLibrary, formats: tuple[torch.dtype, torch.dtype]
) -> None:
    """p rounded to bf16 before p - 1 gives a gradient off by 100 % at p = .999."""
    logits_CV = torch.zeros(1, 4500, dtype=formats[0])
    logits_CV[0, 4321] = math.log(0.999 * 4499 / 0.001)
    targets_M, scale_M = torch.tensor([4321]), torch.ones(1)
    exact = oracle(logits_CV, None, targets_M, scale_M, PLAIN)[-1]
    results = RowResults(*(torch.zeros(1) for _ in range(3)), torch.zeros(1, dtype=torch.int64))
    out_CV = torch.empty(1, 4500, dtype=formats[1])
    where = ChunkRows(None, None, 0, targets_M, None, scale_M)
    kernels.chunk_gradient(logits_CV, out_CV, None, where, PLAIN, results)
    # Its own rounding, and four float32 roundings (exp, sum, quotient, product) relative to 1 - p = 1e-3.
    tolerance = torch.finfo(formats[1]).eps / 2 + 4 * 6e-8 / 1e-3
    assert abs(float(out_CV[0, 4321]) / float(exact[0, 4321]) - 1) <= tolerance


@pytest.mark.parametrize("how", ["logits", "scaled logits", "bias", "capped bias"])
@pytest.mark.parametrize("formats", [(F32, F32), (BF16, BF16)], ids=["float32", "bfloat16"])
def test_masked_words(kernels: KernelLibrary, formats: tuple[torch.dtype, torch.dtype], how: str) -> None:
    """Words of -inf in the scalars before and behind the loads, in loads, as the target, and in a whole tile.

    A bias of -inf under a cap is -cap: a word like others.
    """
    vocab, masked = 2053, [0, 1, 9, *range(500, 800), 2052]
    generator = torch.Generator().manual_seed(0)
    _, logits_CV = placed(3, vocab, formats[0], misaligned=1, pad=2)
    logits_CV.copy_(torch.randn(3, vocab, generator=generator))
    bias_V = torch.randn(vocab, generator=generator) if "bias" in how else None
    if bias_V is None:
        logits_CV[:, masked] = -math.inf
    else:
        bias_V[masked] = -math.inf
    spec = PLAIN._replace(scale=0.5 if how == "scaled logits" else 1.0, softcap=5.0 if how == "capped bias" else 0.0)
    targets_M, scale_M = torch.tensor([1500, 2, 2051]), torch.tensor([1.0, -0.5, 2.0])
    results = RowResults(*(torch.zeros(3) for _ in range(3)), torch.zeros(3, dtype=torch.int64))
    where = ChunkRows(None, None, 0, targets_M, None, scale_M)
    out_CV = torch.empty(3, vocab, dtype=formats[1])
    kernels.chunk_gradient(logits_CV, out_CV, bias_V, where, spec, results)
    z = spec.scale * (logits_CV.double() + (0 if bias_V is None else bias_V.double()))
    z = (5 * torch.tanh(z / 5)) if spec.softcap else z
    loss = z.logsumexp(1) - z.gather(1, targets_M[:, None])[:, 0]
    assert float((results.loss_M - loss).abs().max()) <= FP32 * float(loss.max())
    slope = 1 - (z / 5) ** 2 if spec.softcap else torch.ones_like(z)
    exact = z.softmax(1)
    exact[torch.arange(3), targets_M] -= 1
    exact *= slope * scale_M.double()[:, None] * spec.scale
    stats_2M, again = torch.stack([results.max_M, results.log_sum_M]), torch.empty_like(out_CV)
    kernels.saved_gradient(logits_CV, again, bias_V, where, spec, stats_2M)
    for found in (out_CV, again):
        check_gradient(torch.cat([found, torch.zeros_like(found)]), exact)
        if not spec.softcap:
            assert bool((found[:, masked] == 0).all())


def test_masked_and_broken_logits(kernels: KernelLibrary) -> None:
    """-inf (a masked word) has probability 0, even where a thread sees nothing else; NaN and +inf come out as NaN."""
    logits_CV = torch.randn(4, 6000)
    logits_CV[0, 100:5000] = -math.inf
    logits_CV[1, 5990] = math.nan
    logits_CV[2, 17] = math.inf
    targets_M, scale_M = torch.tensor([5500, 1, 2, 3]), torch.ones(4)
    results = RowResults(*(torch.zeros(4) for _ in range(3)), torch.zeros(4, dtype=torch.int64))
    out_CV = torch.empty_like(logits_CV)
    where = ChunkRows(None, None, 0, targets_M, None, scale_M)
    kernels.chunk_gradient(logits_CV, out_CV, None, where, PLAIN, results)
    loss, *_, gradient = oracle(logits_CV[[0, 3]], None, targets_M[[0, 3]], scale_M[[0, 3]], PLAIN)
    assert float((results.loss_M[[0, 3]] - loss).abs().max()) <= FP32 * float(loss.max())
    assert float((out_CV[[0, 3]] - gradient).abs().max()) <= FP32
    assert bool((out_CV[0, 100:5000] == 0).all())
    assert bool(results.loss_M[1:3].isnan().all())
    assert bool(out_CV[1:3].isnan().any(1).all())


@pytest.mark.parametrize("in_dtype", [F32, BF16, F16])
def test_the_first_largest_logit_counts(kernels: KernelLibrary, in_dtype: torch.dtype) -> None:
    """Ties in the head, the loads and the tail of a row, of one thread and of two."""
    for vocab, places in ((21, (0, 5, 20)), (4500, (3, 700, 705, 4499)), (4500, (2049, 2050)), (20, (17, 18))):
        for target in places:
            whole, logits_CV = placed(1, vocab, in_dtype, misaligned=1, pad=0)
            logits_CV.zero_()
            logits_CV[0, list(places)] = 2.0
            results = RowResults(*(torch.zeros(1) for _ in range(3)), torch.zeros(1, dtype=torch.int64))
            where = ChunkRows(None, None, 0, torch.tensor([target]), None, None)
            kernels.chunk_gradient(logits_CV, None, None, where, PLAIN, results)
            assert bool(results.hit_M[0]) == (target == places[0])
            assert whole is not None


def test_offsets_beyond_32_bits(kernels: KernelLibrary) -> None:
    """Two rows 2^31 + 40 elements apart, in place; the pages between them are never touched."""
    stride = 2**31 + 40
    whole = torch.empty(stride + 500, dtype=BF16)
    logits_CV = whole.as_strided((2, 500), (stride, 1))
    values = torch.randn(2, 500).bfloat16()
    logits_CV.copy_(values)
    targets_M, scale_M = torch.tensor([3, 499]), torch.tensor([1.0, 2.0])
    expected = oracle(values, None, targets_M, scale_M, PLAIN)
    results = RowResults(*(torch.zeros(2) for _ in range(3)), torch.zeros(2, dtype=torch.int64))
    where = ChunkRows(None, None, 0, targets_M, None, scale_M)
    kernels.chunk_gradient(logits_CV, logits_CV, None, where, PLAIN, results)
    assert float((results.loss_M - expected[0]).abs().max()) <= FP32 * float(expected[0].max())
    assert float((logits_CV.double() - expected[-1]).abs().max()) <= torch.finfo(BF16).eps


def in_order_of_kernel_b(values_M: Tensor, tasks_M: Tensor, task: int) -> float:
    """Threads 0 ... 511 add every 512th position in float64; butterflies over 32 lanes, then over 16 warps."""

    def butterfly(lanes: Tensor) -> Tensor:
        for distance in (16, 8, 4, 2, 1):
            lanes = lanes + lanes[torch.arange(32) ^ distance]
        return lanes

    threads = torch.zeros(512, dtype=torch.float64)
    for start in range(0, len(values_M), 512):
        part = values_M[start : start + 512].double()
        of_task = tasks_M[start : start + 512] == task
        threads[: len(part)] = torch.where(of_task, threads[: len(part)] + part, threads[: len(part)])
    warps = torch.zeros(32, dtype=torch.float64)
    warps[:16] = torch.stack([butterfly(warp)[0] for warp in threads.reshape(16, 32)])
    return float(butterfly(warps)[0].float())


def test_softcapped_logits_keep_their_digits(kernels: KernelLibrary) -> None:
    """Rows of one word, whose largest logit is the capped one: small, at the seam of the two formulas, saturated."""
    cap = 30.0
    z = torch.cat([torch.logspace(-6, 2.5, 250), torch.linspace(17.9, 18.1, 50), torch.tensor([0.0, 1e30])])
    z = torch.cat([z, -z])
    results = RowResults(*(torch.zeros(len(z)) for _ in range(3)), torch.zeros(len(z), dtype=torch.int64))
    where = ChunkRows(None, None, 0, torch.zeros(len(z), dtype=torch.int64), None, None)
    kernels.chunk_gradient(z[:, None], None, None, where, TokenLoss(softcap=cap), results)
    exact = cap * torch.tanh(z.double() / cap)
    # Two units of tanh in the last place, and one rounding each of z / cap and of cap times the result.
    assert bool(((results.max_M - exact).abs() <= 3.5 * 2.0**-23 * exact.abs()).all())


@pytest.mark.parametrize(("positions", "tasks"), [(0, 2), (1, 1), (3001, 5), (700, 64)])
def test_task_sums_are_in_their_order_bit_by_bit(kernels: KernelLibrary, positions: int, tasks: int) -> None:
    generator = torch.Generator().manual_seed(positions)
    loss_M = torch.randn(positions, generator=generator) * 10.0 ** torch.randint(
        -6, 7, (positions,), generator=generator
    )
    hit_M = torch.randint(2, (positions,), generator=generator)
    tasks_M = torch.randint(tasks, (positions,), generator=generator)
    for order in (ASCENDING, SHUFFLED):
        with schedule(order):
            loss_K, hit_K = kernels.task_sums(loss_M, hit_M, tasks_M, tasks)
        assert loss_K.tolist() == [in_order_of_kernel_b(loss_M, tasks_M, k) for k in range(tasks)]
        assert hit_K.tolist() == [int(hit_M[tasks_M == k].sum()) for k in range(tasks)]


@pytest.mark.parametrize("in_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
def test_scale_gradient(kernels: KernelLibrary, in_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Bit by bit what torch gives; a block is 4096 floats or 8192 16-bit values."""
    factor = torch.tensor(1.003)
    for count in (0, 1, 7, 4096, 8192, 20003):
        for misaligned in (0, 1):
            grad = torch.randn(count + misaligned).to(in_dtype)[misaligned:]
            whole = torch.full((count + 9,), SENTINEL, dtype=out_dtype)
            kernels.scale_gradient(grad, factor, whole[: count + misaligned][misaligned:])
            assert torch.equal(whole[misaligned : count + misaligned], (grad.float() * factor).to(out_dtype))
            assert bool((whole[count + misaligned :] == SENTINEL).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_scale_gradient_in_place(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    """A block takes several turns where there are more values than 4096 blocks take; a factor of 1 writes nothing."""
    per_block = 16384 // dtype.itemsize
    most = 3 if isinstance(kernels, PtxKernels) and dtype != F32 else 4096  # once is enough, where it takes seconds
    grad = torch.randn(most * per_block + per_block + 5).to(dtype)
    scaled, factor = grad.clone(), torch.tensor(1.003)
    kernels.scale_gradient(scaled, factor, scaled)
    assert torch.equal(scaled, (grad.float() * factor).to(dtype))
    before = torch.tensor([math.nan, 1.0, -0.0]).to(dtype)
    kernels.scale_gradient(before, torch.ones(()), before)
    torch.testing.assert_close(before, torch.tensor([math.nan, 1.0, -0.0]).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_conversions(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    """All 65536 values widened; ties, subnormals, overflow and their neighbours rounded, as torch does."""
    one = torch.ones(())
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = torch.empty(2**16)
    kernels.scale_gradient(every, one, wide)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    finite = every.float()[every.float().isfinite()].sort().values
    between = (finite[1:] + finite[:-1]) / 2  # exact: the ties
    values = torch.cat([finite, between, between.nextafter(one * math.inf), between.nextafter(-one * math.inf)])
    values = torch.cat(
        [values, torch.tensor([65519.9, 65520.0, 1e30, -1e30, math.inf, -math.inf, 1e-30, -0.0, math.nan])]
    )
    narrow = torch.empty(len(values), dtype=dtype)
    kernels.scale_gradient(values, one, narrow)
    torch.testing.assert_close(narrow, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_errors_name_the_launch_and_the_cause() -> None:
    case = Case(67, BF16)
    with pytest.raises(RuntimeError, match=r"cotbal_chunk_gradient failed: invalid argument \(1\)"):
        cpu_kernels().chunk_gradient(case.logits_CV, torch.empty(5, 67), None, case.where(), PLAIN, case.results)
    with pytest.raises(ValueError, match="neighbouring columns"):
        cpu_kernels().chunk_gradient(torch.zeros(67, 5).t(), None, None, case.where(), PLAIN, case.results)
    with pytest.raises(ValueError, match=r"contiguous float32 or int64 vector, got torch.bfloat16"):
        cpu_kernels().chunk_gradient(
            case.logits_CV, None, torch.zeros(67).bfloat16(), case.where(), PLAIN, case.results
        )
    on_gpu = KernelLibrary(cpu_kernels().path, device_type="cuda")
    with pytest.raises(ValueError, match="run on cuda, got a tensor on cpu"):
        on_gpu.task_sums(torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 1)
