"""Every balancing method against its definition, written again in float64 numpy, on recorded sequences of losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recorded_losses import (
    FLOAT32,
    Array,
    N,
    Recording,
    first_seen,
    forward_filled,
    losses,
    make,
    normalised,
    softmax,
)

from trainer.balancing.method import TaskLosses


def adam(gradients: list[Array], start: Array, lr: float, decay: float) -> list[Array]:
    """``torch.optim.Adam``, as the reference: the vector after every gradient."""
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.Adam([parameter], lr=lr, weight_decay=decay)
    out = []
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        out.append(parameter.detach().numpy().copy())
    return out


def test_fixed_weights() -> None:
    record = Recording(4)
    for name in ("ew", "tla", "uniform"):
        np.testing.assert_array_equal(record.play(make(name)), np.ones((5, N)))
    np.testing.assert_array_equal(record.play(make("cotbal")), np.tile([0.5, 1.0, 1.5], (5, 1)))


def test_dwa_by_iteration() -> None:
    window, T = 4, 1.5
    record = Recording(20)
    found = record.play(make("dwa", {"window": window, "temperature": T}))
    for t in range(21):
        if t < 2 * window:
            expected = np.ones(N)
        else:
            new, old = slice(t - window, t), slice(t - 2 * window, t - window)
            last = record.sums[new].sum(0) / record.tokens[new].sum(0)
            before = record.sums[old].sum(0) / record.tokens[old].sum(0)
            expected = N * softmax(last / before / T)
        np.testing.assert_allclose(found[t], expected, **FLOAT32)
    assert np.abs(found[-1] - 1).max() > 0.01


@pytest.mark.parametrize("without", ["tokens", "losses", "tokens later", "losses later"])
def test_dwa_without_a_loss_in_the_first_window_counts_as_no_change(without: str) -> None:
    """Nor without a token in the second one, where a loss of 0 is one; a token and a small loss are enough."""
    record = Recording(8)
    part = slice(4, 8) if "later" in without else slice(4)
    record.lose_nothing(part, 1)
    if "tokens" in without:
        record.tokens[part, 1] = 0
    record.sums[:, 2] /= 1e3
    record.tokens[:, 2] = np.arange(8) == 6
    record.tokens[0, 2] = 1
    found = record.play(make("dwa", {"window": 4}))[-1]
    ratio = np.ones(N)
    for k in (0, 1, 2) if without == "losses later" else (0, 2):
        new, old = (record.sums[part, k].sum() / record.tokens[part, k].sum() for part in (slice(4, 8), slice(4)))
        ratio[k] = new / old
    np.testing.assert_allclose(found, N * softmax(ratio / 2), **FLOAT32)


def test_dwa_by_epoch() -> None:
    per_epoch = 5
    record = Recording(4 * per_epoch)
    found = record.play(make("dwa", {"form": "epoch"}), epoch=lambda t: (t + 1) / per_epoch)
    means = [
        record.sums[e * per_epoch : (e + 1) * per_epoch].sum(0)
        / record.tokens[e * per_epoch : (e + 1) * per_epoch].sum(0)
        for e in range(4)
    ]
    for t in range(4 * per_epoch + 1):
        epoch = t // per_epoch
        expected = np.ones(N) if epoch < 2 else N * softmax(means[epoch - 1] / means[epoch - 2] / 2.0)
        np.testing.assert_allclose(found[t], expected, **FLOAT32)


def test_igbv1() -> None:
    record = Recording(30)
    found = record.play(make("igbv1", {"base_start": 6, "base_steps": 10}))
    base = record.sums[6:16].sum(0) / record.tokens[6:16].sum(0)
    filled = forward_filled(record)
    for t in range(31):
        expected = np.ones(N) if t < 16 else N * softmax(filled[t - 1] / base)
        np.testing.assert_allclose(found[t], expected, **FLOAT32)


def test_igbv1_with_a_base_of_nothing_or_far_behind() -> None:
    """A base of 0 is no base; and no weight becomes 0, however far the others are above their base."""
    record = Recording(30)
    record.lose_nothing(slice(16), 1)
    record.sums[16:, 0] *= 1e3
    found = record.play(make("igbv1", {"base_start": 6, "base_steps": 10}))[-1]
    base = record.sums[6:16].sum(0) / record.tokens[6:16].sum(0)
    ratio = np.array([1e3 * forward_filled(record)[-1, 0] / base[0], 1, forward_filled(record)[-1, 2] / base[2]])
    np.testing.assert_allclose(found, np.maximum(N * softmax(ratio), 1e-8), **FLOAT32)
    assert (found > 0).all()


def test_igbv1_takes_steps_100_to_199_by_default() -> None:
    record = Recording(203)
    found = record.play(make("igbv1"))
    np.testing.assert_array_equal(found[:200], np.ones((200, N)))
    base = record.sums[100:200].sum(0) / record.tokens[100:200].sum(0)
    np.testing.assert_allclose(found[203], N * softmax(forward_filled(record)[202] / base), **FLOAT32)


@pytest.mark.parametrize("exponent", [0.5, 2.0])
@pytest.mark.parametrize("name", ["lbtw", "lbtw_star"])
def test_lbtw(name: str, exponent: float) -> None:
    """From training losses a step moves the next weights; from validation losses, the batch before it.

    L(0) is the first loss above 0: the first task begins with losses of 0.
    """
    record = Recording(12)
    record.lose_nothing(slice(2), 0)
    found = record.play(make(name, {"exponent": exponent}))
    filled = forward_filled(record)
    filled[:2, 0] = np.nan
    ratio = np.nan_to_num(filled / first_seen(filled), nan=1.0) ** exponent
    expected = np.array([normalised(row) for row in ratio])
    if name == "lbtw":
        np.testing.assert_allclose(found, np.vstack([np.ones(N), expected]), **FLOAT32)
    else:
        np.testing.assert_allclose(found[:-1], expected, **FLOAT32)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["gradnorm", "gradnorm_star"])
def test_gradnorm(name: str, seed: int) -> None:
    """The first task begins with losses of 0, of which L(0) is not taken; in the last step all losses are 0.

    Their gradients are not. Of a target only the side is seen that G is on: many recordings have some on either side of
    a wrong one. A high rate takes weights to their end, a low one does not.
    """
    record = Recording(12, seed=seed)
    norms = record.norms.copy()
    record.lose_nothing(slice(5), 0)
    for task in range(N):
        record.lose_nothing(slice(11, 12), task)
    record.norms[:] = norms
    a, lr = 1.5, (0.1, 0.5)[seed % 2]
    found = record.play(make(name, {"learning_rate": lr}))
    w, first = np.ones(N), np.full(N, np.nan)
    state = torch.nn.Parameter(torch.ones(N, dtype=torch.float64))
    optimizer = torch.optim.Adam([state], lr=lr)
    expected = [w]
    for t in range(12):
        here = record.tokens[t] > 0
        first = np.where(np.isnan(first) & here & (record.mean[t] > 0), record.mean[t], first)
        G = w * record.norms[t]
        left = (record.mean[t] / first)[here]
        known = ~np.isnan(left)
        r = np.ones(len(left))
        if left[known].any():
            r[known] = left[known] / left[known].mean()
        target = G[here].mean() * r**a
        gradient = np.zeros(N)
        gradient[here] = np.sign(G[here] - target) * record.norms[t][here]
        state.grad = torch.from_numpy(gradient)
        optimizer.step()
        with torch.no_grad():
            state.clamp_(min=1e-6)
            state.mul_(N / state.sum())
        w = state.detach().numpy().copy()
        expected.append(w)
    if name == "gradnorm":
        np.testing.assert_allclose(found, expected, **FLOAT32)
    else:
        np.testing.assert_allclose(found[:-1], expected[1:], **FLOAT32)


@pytest.mark.parametrize("minimum", [0.0, 1.5])
def test_famo(minimum: float) -> None:
    """w = z / (c D) of the step's own batch, and xi from how much of log D the step removed; losses fall below 1.5."""
    record = Recording(15)
    lr, gamma = 0.1, 0.02
    found = record.play(make("famo", {"learning_rate": lr, "decay": gamma, "minimum_loss": minimum}))
    filled = forward_filled(record)
    assert np.nanmin(filled) < 1.5 < np.nanmax(filled)
    xi, gradients = np.zeros(N), []
    for t in range(15):
        D = np.maximum(filled[t] - minimum, 0) + 1e-8
        D = np.where(np.isnan(D), np.nanmean(D), D)
        z = softmax(xi)
        c = (z / D).sum()
        np.testing.assert_allclose(found[t], N * z / (c * D), **FLOAT32)
        here = record.tokens[t] > 0
        after = np.maximum(record.after[t] / np.maximum(record.tokens[t], 1) - minimum, 0) + 1e-8
        delta = np.where(here, np.log(D) - np.log(np.where(here, after, 1)), 0)
        jacobian = np.diag(z) - np.outer(z, z)
        gradients.append(jacobian.T @ delta)
        xi = adam(gradients, np.zeros(N), lr, gamma)[-1]


def test_famo_weights_are_the_gradient_of_its_loss() -> None:
    """sum_i z_i log D_i / c differentiated by L_i with c held fixed."""
    record = Recording(5)
    method = make("famo", {"learning_rate": 0.5})
    record.play(method, start=3)
    xi: torch.Tensor = method.xi  # type: ignore[attr-defined]
    L = torch.tensor([2.0, 0.7, 1.3], dtype=torch.float64, requires_grad=True)
    D = L + 1e-8
    z = xi.softmax(0)
    c = (z / D).sum().detach()
    (gradient,) = torch.autograd.grad((z * D.log() / c).sum(), L)
    method.before_step(TaskLosses(L.detach() * 5, torch.full((N,), 5.0, dtype=torch.float64)))
    np.testing.assert_allclose(method.weights.numpy() / N, gradient.numpy(), **FLOAT32)


@pytest.mark.parametrize("minimum", [0.0, 1.5])
def test_famo_star(minimum: float) -> None:
    record = Recording(15)
    found = record.play(make("famo_star", {"learning_rate": 0.1, "minimum_loss": minimum}))
    np.testing.assert_allclose(found[0], np.ones(N), **FLOAT32)
    xi, gradients = np.zeros(N), []
    for t in range(1, 15):
        here = record.tokens[t - 1] > 0
        before = np.where(here, np.maximum(record.mean[t - 1] - minimum, 0) + 1e-8, 1)
        after = record.after[t - 1] / np.maximum(record.tokens[t - 1], 1)
        after = np.where(here, np.maximum(after - minimum, 0) + 1e-8, 1)
        z = softmax(xi)
        delta = np.log(before) - np.log(after)
        gradients.append((np.diag(z) - np.outer(z, z)).T @ delta)
        xi = adam(gradients, np.zeros(N), 0.1, 0.01)[-1]
        np.testing.assert_allclose(found[t], N * softmax(xi), **FLOAT32)


def test_coba_is_the_convergence_balancer() -> None:
    from cotbal_kernels.convergence import ConvergenceBalancer

    record = Recording(14)
    given = {"window": 5, "warmup": 2, "temperature": 2.0, "variant": "printed"}
    for options, expected_options in (({}, {"window": 8, "warmup": 4}), (given, given)):  # M is 4 in `make`
        found = record.play(make("coba", options))
        balancer = ConvergenceBalancer(N, **expected_options)
        for t in range(14):
            here = torch.from_numpy(record.tokens[t] > 0)
            expected = balancer.step(torch.from_numpy(record.mean[t]), present=here)
            np.testing.assert_allclose(found[t], expected.numpy(), rtol=1e-6)  # mean 1 again in float32
        assert np.abs(found[-1] - 1).max() > 0.01


def test_ratios_of_validation_losses_are_over_those_of_the_start() -> None:
    """Not over those of the first small batch; a task that the start had none of takes its first one."""
    from cotbal_kernels.convergence import ConvergenceBalancer

    record = Recording(14)
    start = losses(np.array([30.0, 12.0, 0.0]), np.array([20.0, 30.0, 0.0]))
    first = np.array([1.5, 0.4, first_seen(forward_filled(record))[2]])

    lbtw = make("lbtw_star")
    lbtw.started(start)
    ratio = np.nan_to_num(forward_filled(record) / first, nan=1.0) ** 0.5
    np.testing.assert_allclose(record.play(lbtw)[:-1], [normalised(row) for row in ratio], **FLOAT32)

    gradnorm = make("gradnorm_star", {"learning_rate": 0.1})
    gradnorm.started(start)
    gradnorm.validated(losses(np.array([1.0, 2.0, 3.0]), np.ones(3), np.array([1.0, 2.0, 0.1])), None)
    r = np.array([1 / 1.5, 2 / 0.4, 1.0])
    r[:2] /= r.mean()  # the third task is at its L(0)
    r[2] /= np.array([1 / 1.5, 2 / 0.4, 1.0]).mean()
    w = 1 - 0.1 * np.sign(np.array([1.0, 2.0, 0.1]) - 3.1 / 3 * r**1.5)  # the first step of Adam
    np.testing.assert_allclose(gradnorm.weights.numpy(), normalised(w), **FLOAT32)

    coba, balancer = make("coba"), ConvergenceBalancer(N, window=8, warmup=4)
    coba.started(start)
    balancer.start(torch.tensor([1.5, 0.4, torch.nan]))
    for t, weights in enumerate(record.play(coba)[:-1]):
        expected = balancer.step(torch.from_numpy(record.mean[t]), present=torch.from_numpy(record.tokens[t] > 0))
        np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-6)


class TestRlw:
    def draws(self, distribution: str, steps: int = 4000, seed: int = 0) -> Array:
        method = make("rlw", {"distribution": distribution}, seed=seed)
        out = []
        for _ in range(steps):
            method.before_step(None)
            out.append(method.weights.double().numpy() / N)
        return np.array(out)

    def test_normal_is_the_softmax_of_a_standard_normal(self) -> None:
        """log w_i - log w_j is N(0, 2), uncorrelated in time."""
        w = self.draws("normal")
        difference = np.log(w[:, 0]) - np.log(w[:, 1])
        # Standard errors over 4000 draws: mean sqrt(2 / 4000) = 0.022, variance 2 sqrt(2 / 4000) = 0.045; four of each.
        assert abs(difference.mean()) < 0.09
        assert abs(difference.var() - 2) < 0.18
        # P(|x| < sqrt 2) of N(0, 2) is 0.6827, standard error 0.0074.
        assert abs((np.abs(difference) < 2**0.5).mean() - 0.6827) < 0.03
        assert abs(np.corrcoef(difference[1:], difference[:-1])[0, 1]) < 4 / 4000**0.5

    def test_dirichlet_is_uniform_on_the_simplex(self) -> None:
        """Dirichlet(1, 1, 1): w_i is Beta(1, 2), P(w_i <= x) = 1 - (1 - x)^2."""
        w = self.draws("dirichlet")
        for quantile in (0.1, 0.3, 0.6):
            expected = 1 - (1 - quantile) ** 2
            assert abs((w[:, 1] <= quantile).mean() - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
        # Var = 1/18, Cov = -1/36; standard errors are below 0.0012 and 0.0009.
        np.testing.assert_allclose(np.cov(w.T), np.full((3, 3), -1 / 36) + np.eye(3) / 12, atol=0.005)

    @pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
    def test_the_seed_decides(self, distribution: str) -> None:
        np.testing.assert_array_equal(self.draws(distribution, 5), self.draws(distribution, 5))
        assert not np.allclose(self.draws(distribution, 5), self.draws(distribution, 5, seed=1))
