"""Spread of CoTBal's weights over validation sets: against its derivatives, and against new draws of the samples."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.resampling import Influences, resampled
from trainer.balancing.scores import Scores
from trainer.config import CotbalConfig
from trainer.metrics import perplexity
from trainer.pipeline.outcome import weight_errors
from trainer.task_config import TaskConfig

TASKS = ("a", "b", "c")
N = 3
KEYS = {"contribution": "contribution", "difficulty": "difficulty", "applied": "lambda_c"}


def samples(n: int) -> list[Any]:
    """Per task, scores [N + 3 models, n]: mini, N proxies, mini and full alone; models are right on like samples."""
    generator = np.random.default_rng(1)
    found = []
    for j in range(N):
        quality = np.array([0.25, *(0.65 if i == j else 0.3 + 0.1 * i for i in range(N)), 0.3, 0.7])
        luck = 0.5 * generator.random((len(quality), n)) + 0.5 * generator.random(n)
        found.append(100.0 * (np.quantile(luck, quality, axis=1).diagonal()[:, None] > luck))
    return found


def table(means: list[Any]) -> Scores:
    """Scores from one column of means per task."""
    V = np.array(means).T
    return Scores(TASKS, V[0], V[1 : N + 1], np.array([True] * N), V[N + 1], V[N + 2])


def influences(data: list[Any]) -> list[Influences]:
    moved = [x - x.mean(axis=1, keepdims=True) for x in data]
    return [Influences(x, np.zeros(len(x))) for x in moved]


@pytest.mark.parametrize("difficulty", ["reused", "precise"])
def test_spread_is_that_of_the_derivatives(difficulty: str) -> None:
    """With 4000 samples Eq. 3-11 are straight lines within the noise: J Sigma J^T, J by central differences."""
    data = samples(4000)
    means = [x.mean(axis=1) for x in data]
    options = {"temperature": 0.4, "alpha": 0.3, "difficulty": difficulty}
    variance = dict.fromkeys(KEYS, 0.0)
    for j, x in enumerate(data):
        covariance = np.cov(x) / x.shape[1]
        slopes: dict[str, list[Any]] = {key: [] for key in KEYS}
        for model in range(len(x)):
            moved = []
            for step in (1e-4, -1e-4):
                other = [m.copy() for m in means]
                other[j][model] += step
                moved.append(cotbal_weights(table(other), **options))
            for key in KEYS:
                slopes[key].append((getattr(moved[0], KEYS[key]) - getattr(moved[1], KEYS[key])) / 2e-4)
        for key in KEYS:
            J = np.array(slopes[key])
            variance[key] = variance[key] + np.einsum("m...,mn,n...->...", J, covariance, J)
    found = resampled(table(means), influences(data), "contribution", **options)
    for key in KEYS:
        # 400 draws: 3.5 % of an error. 15 numbers: four of these; and the diagonal of C is 1.
        np.testing.assert_allclose(found[key], np.sqrt(variance[key]), rtol=0.15, atol=1e-12)


def test_what_is_never_or_always_right_is_not_certain() -> None:
    """What shares may be behind the counts: each as likely as another before, Beta(k + 1, n - k + 1) then. Two errors
    reach about 19 in 20 of what Eq. 3-11 make of them; where a share is 0 or 1 they are Wilson's, which are wider."""
    n, k = 46, np.array([[0, 12], [23, 20], [2, 46]])  # mini, a+mini, b+mini on a and b
    generator = np.random.default_rng(4)
    right = generator.permuted(100.0 * (np.arange(n) < k[..., None]), axis=2)
    unseen = np.where((k == 0) | (k == n), 100 * 2 / (n + 4), 0.0)
    own = [Influences(right[:, j] - right[:, j].mean(axis=1, keepdims=True), unseen[:, j]) for j in (0, 1)]

    def weights(shares: Any) -> Any:
        return cotbal_weights(
            Scores(("a", "b"), shares[0], shares[1:], np.array([True, True])), on_degenerate="clip", temperature=0.5
        )

    scores = weights(100 * k / n)
    found = resampled(Scores(("a", "b"), 100 * k[0] / n, 100 * k[1:] / n, np.array([True, True])), own)
    truths = [weights(100 * generator.beta(k + 1, n - k + 1)) for _ in range(500)]
    for key, name in (KEYS | {"applied": "weights"}).items():
        error, value = np.array(found[key]), getattr(scores, name)
        away = np.abs(np.array([getattr(truth, name) for truth in truths]) - value)
        moves = error > 0  # all but the diagonal of C
        assert moves.sum() == 2, key
        covered = np.mean(away[:, moves] <= 2 * error[moves], axis=0)
        assert covered.min() > 0.88, key  # 500 draws tell a share to 1.3 %


@pytest.mark.parametrize(("mini", "full", "ends"), [(0.0, 80.0, [1.0, 1 - 8 / 80]), (50.0, 100.0, [0.5, 1 - 50 / 92])])
def test_a_score_of_like_samples_is_drawn_from_the_ends_of_wilsons_interval(
    mini: float, full: float, ends: list[float]
) -> None:
    """46 samples: 0 to 8 %, or 92 to 100 %. A half of 400 draws is one to within a tenth: the spread to 1 %."""
    unseen = np.array([4.0 * (score in (0, 100)) for score in (mini, full)])
    own = [Influences(np.zeros((2, 46)), unseen)]
    found = resampled(Scores(("a",), np.array([mini]), np.array([[full]]), np.array([True])), own)
    assert found["difficulty"] == pytest.approx([np.std(ends)], rel=0.01)


def test_where_lower_is_better_draws_are_of_losses() -> None:
    """Resampled records against the ratio of their sums; degenerate draws are bounded instead of an error."""
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 9, 60)
    means = np.array([[2.0, 1.0, 1.9], [2.0, 1.7, 1.2]])  # loss per token: mini, a+mini, b+mini
    losses = [[tokens * (m + 0.4 * generator.normal(size=60)) for m in row] for row in means]
    scored = [[perplexity(list(x), tokens.tolist()) for x in row] for row in losses]
    lower = np.array([False, False])
    scores = Scores(
        ("a", "b"),
        np.array([row[0].value for row in scored]),
        np.array([[row[i].value for row in scored] for i in (1, 2)]),
        lower,
    )
    own = [Influences(np.array([x.influences for x in row]), np.zeros(3)) for row in scored]
    drawn = []
    for _ in range(400):
        values = []
        for row in losses:
            chosen = generator.integers(60, size=60)
            values.append([float(np.exp(x[chosen].sum() / tokens[chosen].sum())) for x in row])
        V = np.array(values).T
        drawn.append(cotbal_weights(Scores(("a", "b"), V[0], V[1:], lower), on_degenerate="clip").weights)
    found = resampled(scores, own)["applied"]
    np.testing.assert_allclose(found, np.std(drawn, axis=0), rtol=0.2)
    assert resampled(scores, own) == resampled(scores, own, seed=0)
    assert resampled(scores, own, seed=1)["applied"] != found


@pytest.mark.parametrize("images", [["a.png"] * 4, ["a.png", "a.png", "b.png", None]])
def test_the_weights_of_a_run_are_of_resampled_images(images: list[str | None], tmp_path: Path) -> None:
    """Of one image nothing is known; the draws of three groups of samples are those of their sums."""
    task = TaskConfig(name="a", metric="exact_match", train=Path("t"), validation=Path("v"), image_root=Path("data"))
    right = {"mini": [True, False, False, False], "plus-a": [True, True, True, False]}
    for name, answers in right.items():
        folder = tmp_path / "evaluations" / name / "validation"
        folder.mkdir(parents=True)
        rows = [
            {"prediction": "x" if own else "y", "references": ["x"], "image": image}
            for own, image in zip(answers, images, strict=True)
        ]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = Scores(("a",), np.array([25.0]), np.array([[75.0]]), np.array([True]))
    config: Any = SimpleNamespace(tasks=[task], seed=0)
    found = weight_errors(tmp_path, config, scores, CotbalConfig())
    if images[-1]:
        assert found == {}
        return
    groups = [np.array([50.0, -25.0, -25.0]) * 3 / 4, np.array([50.0, 25.0, -75.0]) * 3 / 4]
    assert found == resampled(scores, [Influences(np.array(groups), np.zeros(2))], temperature=0.5, alpha=0.5)


def test_of_a_single_sample_nothing_is_known() -> None:
    data = samples(5)
    own = influences([data[0], data[1], data[2][:, :1]])
    assert resampled(table([x.mean(axis=1) for x in data]), own) == {}
