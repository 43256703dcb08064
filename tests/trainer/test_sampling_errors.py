"""Standard errors of scores and of Delta I: derivatives by every sample's weight, resampled images, Wilson's bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.comparison import compare
from trainer.metrics import MetricResult, get_metric, perplexity
from trainer.pipeline.outcome import ImageNumbers
from trainer.sampling_errors import Sampled, sampling_errors
from trainer.task_config import TaskConfig

METHODS = ("STL", "EW", "CoTBal")
# Two metrics share the 120 samples of "near", which a method answers alike by both; 40 are in "far", 45 in "text".
SETS = {
    ("vqa", "near"): (120, ("near EM", "near error")),
    ("vqa", "far"): (40, ("far EM",)),
    ("text", ""): (45, ("ppl",)),
}
# Three questions about each of the images 0 to 39, one about 20 to 59 and about 55 to 99: sets and tasks share images.
IMAGES = {("vqa", "near"): np.arange(120) // 3, ("vqa", "far"): np.arange(20, 60), ("text", ""): np.arange(55, 100)}
RESULTS = {"tasks": {"text": {"ppl": "lower"}, "vqa": {"near EM": "higher", "near error": "lower", "far EM": "higher"}}}


def measured() -> dict[str, dict[tuple[str, str], Any]]:
    """Per method and test set: scores [n, metrics], or summed losses and tokens [n, 2]. Images are hard for all, and
    some for one method."""
    generator = np.random.default_rng(3)
    hard_images, own_images = generator.normal(size=100), 0.5 * generator.normal(size=(len(METHODS), 100))
    found: dict[str, dict[tuple[str, str], Any]] = {method: {} for method in METHODS}
    for key, (n, scores) in SETS.items():
        hard = hard_images[IMAGES[key]]
        tokens = generator.integers(1, 9, n)
        for place, method in enumerate(METHODS):
            own = hard + own_images[place][IMAGES[key]] + 0.1 * generator.normal(size=n)
            if key[0] == "text":
                found[method][key] = np.stack([tokens * np.exp(0.3 * own - 0.1 * place), tokens], axis=1)
            else:
                em = 100.0 * (own < 0.3 * place)
                found[method][key] = np.stack([em, 120 - em + 20 * (own > 1)], axis=1)[:, : len(scores)]
    return found


def delta_i(method: dict[Any, Any], single: dict[Any, Any], weights: dict[Any, Any]) -> Any:
    """Eq. 12 and 13 of weighted samples, in torch."""
    gains: dict[str, list[Any]] = {}
    for (task, part), w in weights.items():
        ours, base = (torch.as_tensor(table[task, part]) for table in (method, single))
        if task == "text":
            ratio = [((w @ x[:, 0]) / (w @ x[:, 1])).exp() for x in (ours, base)]
            gains.setdefault(task, []).append(1 - ratio[0] / ratio[1])
        else:
            gain = (w @ ours - w @ base) / (w @ base)
            gains.setdefault(task, []).extend([gain[0], *-gain[1:]])
    return 100 * sum(sum(each) / len(each) for each in gains.values()) / len(gains)


def table_and_influences(data: dict[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    values: dict[str, Any] = {}
    moved: dict[str, Any] = {}
    for (task, part), (_, scores) in SETS.items():
        for k, score in enumerate(scores):
            x = data[task, part]
            found = perplexity(*x.T.tolist()) if task == "text" else MetricResult.from_samples(x[:, k].tolist())
            values.setdefault(task, {})[score] = found.value
            moved.setdefault(task, {}).setdefault(part, {})[score] = Sampled(np.array(found.influences))
    return values, moved


def by_set(numbers: dict[Any, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (task, part), own in numbers.items():
        found.setdefault(task, {})[part] = own
    return found


def errors(data: dict[str, Any], images: dict[Any, Any] = IMAGES) -> tuple[dict[str, Any], dict[str, Any]]:
    """The errors, and the table of results."""
    tables = {method: table_and_influences(own) for method, own in data.items()}
    base, base_moved = tables.pop("STL")
    results = RESULTS | {"baseline": base, "methods": {method: values for method, (values, _) in tables.items()}}
    samples = {method: moved for method, (_, moved) in tables.items()}
    return sampling_errors(results, samples, base_moved, by_set(images), "CoTBal"), results


@pytest.mark.parametrize("shared", [True, False])
def test_errors_are_those_of_the_derivatives_by_every_sample_s_weight(shared: bool) -> None:
    """The influence of a sample is the derivative without its mean; an image's add up, squares of images do then."""
    data = measured()
    apart = {key: 200 * place + np.arange(len(own)) for place, (key, own) in enumerate(IMAGES.items())}
    images = IMAGES if shared else apart
    found, results = errors(data, images)

    def error(quantity: Any) -> float:
        weights = {
            key: torch.full((n,), 1 / n, dtype=torch.float64, requires_grad=True) for key, (n, _) in SETS.items()
        }
        gradients = torch.autograd.grad(quantity(weights), list(weights.values()))
        each: dict[int, float] = {}
        for key, grad in zip(SETS, gradients, strict=True):
            groups = len(set(images[key].tolist()))
            for image, own in zip(images[key].tolist(), (grad - grad.mean()).tolist(), strict=True):
                each[image] = each.get(image, 0.0) + own / len(grad) * math.sqrt(groups / (groups - 1))
        return math.sqrt(sum(own**2 for own in each.values()))

    for method in ("EW", "CoTBal"):
        assert found[method]["delta_i"] == pytest.approx(
            error(lambda w, m=method: delta_i(data[m], data["STL"], w)), rel=1e-9
        )
        even = {key: torch.full((n,), 1 / n, dtype=torch.float64) for key, (n, _) in SETS.items()}
        assert compare(results)[method].delta_i == pytest.approx(float(delta_i(data[method], data["STL"], even)))
        squares = sum(value**2 for value in found[method]["per_task"].values())
        assert (found[method]["delta_i"] == pytest.approx(math.sqrt(squares) / 2)) != shared
    behind = error(lambda w: delta_i(data["CoTBal"], data["STL"], w) - delta_i(data["EW"], data["STL"], w))
    assert found["EW"]["behind_final"] == pytest.approx(behind, rel=1e-9)
    assert "behind_final" not in found["CoTBal"]
    # The samples are the same ones: as if they were others the difference would seem to be less certain.
    assert behind < 0.8 * math.hypot(found["EW"]["delta_i"], found["CoTBal"]["delta_i"])


def test_errors_are_the_spread_over_resampled_images() -> None:
    """Images are drawn with all that is asked about them, in any set (the cluster bootstrap). 2000 draws tell a
    standard deviation to 1.6 %; the rest is that Eq. 12 is no straight line, and that sets then have more or fewer."""
    data = measured()
    found, _ = errors(data)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        times = np.bincount(generator.integers(100, size=100), minlength=100)
        counts = {key: torch.tensor(times[own] / times[own].sum()) for key, own in IMAGES.items()}
        drawn.append([float(delta_i(data[method], data["STL"], counts)) for method in ("EW", "CoTBal")])
    ew, cotbal = np.array(drawn).T
    for expected, value in (
        (ew.std(), found["EW"]["delta_i"]),
        (cotbal.std(), found["CoTBal"]["delta_i"]),
        ((cotbal - ew).std(), found["EW"]["behind_final"]),
    ):
        assert value == pytest.approx(expected, rel=0.15)


def test_error_of_a_score_is_the_spread_over_resampled_images() -> None:
    """Images with one to six questions, most of them right together or wrong together."""
    generator = np.random.default_rng(5)
    images = np.repeat(np.arange(80), generator.integers(1, 7, 80))
    hard = generator.normal(size=80)[images] + 0.3 * generator.normal(size=len(images))
    right = 100.0 * (hard < 0.2)
    result = MetricResult.from_samples(right.tolist())
    names = [f"{image}.png" for image in images]
    found = result.of_groups(names)
    drawn = []
    for _ in range(2000):
        times = np.bincount(generator.integers(80, size=80), minlength=80)[images]
        drawn.append(times @ right / times.sum())
    assert found.value == result.value
    assert found.standard_error == pytest.approx(np.std(drawn), rel=0.06)
    assert found.standard_error > 1.5 * result.standard_error
    for alone in ([None] * len(names), list(range(len(names)))):
        assert result.of_groups(alone).standard_error == pytest.approx(result.standard_error, rel=1e-12)
    assert math.isnan(result.of_groups(["a.png"] * len(names)).standard_error)


@pytest.mark.parametrize(
    ("metric", "right", "scale"), [("exact_match", 1, 100), ("gqa_accuracy", 0, 100), ("cider", 0, 10)]
)
def test_what_is_never_or_always_right_has_an_error(metric: str, right: int, scale: int) -> None:
    """Two errors away is the last share that 46 images with none, or all, of it do not contradict by two of its own
    errors: that is Wilson's interval."""
    reference = "a b c d"
    result = get_metric(metric).compute([reference if right else "x"] * 92, [[reference]] * 92)
    share, step = 0.5, 0.25
    while step > 1e-9:
        share += step if share < 2 * math.sqrt(share * (1 - share) / 46) else -step
        step /= 2
    assert result.value == right * scale
    assert 2 * result.of_groups([number // 2 for number in range(92)]).standard_error == pytest.approx(scale * share)


def test_what_is_no_mean_of_samples_has_none_where_they_are_alike() -> None:
    assert get_metric("bleu").compute(["x"] * 3, [["a"]] * 3).standard_error == 0


@pytest.mark.parametrize(
    ("base", "method", "error", "behind"),
    [
        ([100.0, 0.0] * 23, [0.0] * 46, 100 * 4 / 50, math.sqrt(2) * 8),
        ([100.0] * 46, [100.0] * 46, math.sqrt(2) * 4, math.sqrt(2) * 4),
    ],
)
def test_delta_i_of_what_is_never_or_always_right_has_an_error(
    base: list[float], method: list[float], error: float, behind: float
) -> None:
    """I = (0 - M_b) / M_b moves with M_e alone, and nothing is known of what both methods would get right or wrong."""
    images = {"vqa": {"": np.arange(46)}}
    single, own = MetricResult.from_samples(base), MetricResult.from_samples(method)
    results = {
        "tasks": {"vqa": {"EM": "higher"}},
        "baseline": {"vqa": {"EM": single.value}},
        "methods": {name: {"vqa": {"EM": own.value}} for name in ("EW", "CoTBal")},
    }
    single_samples, samples = (
        {"vqa": {"": {"EM": Sampled(np.array(one.influences), one.unseen)}}} for one in (single, own)
    )
    found = sampling_errors(results, {"EW": samples, "CoTBal": samples}, single_samples, images, "CoTBal")
    assert found["EW"]["delta_i"] == found["CoTBal"]["per_task"]["vqa"] == pytest.approx(error)
    assert found["EW"]["behind_final"] == pytest.approx(behind)


def test_a_file_is_the_same_image_in_every_set() -> None:
    images = ImageNumbers()
    task = TaskConfig(name="vqa", auxiliary=True, train=Path("x"), image_root=Path("data"))
    images.add(task, "testA", ["coco/1.png", "coco/2.png", None, "coco/1.png"])
    images.add(task, "testB", [None, "./coco/2.png"])
    images.add(task.model_copy(update={"name": "text", "image_root": Path("data/coco")}), "", ["3.png", "1.png"])
    numbers = {name: {part: own.tolist() for part, own in sets.items()} for name, sets in images.of_sets.items()}
    assert numbers == {"vqa": {"testA": [0, 1, 2, 0], "testB": [3, 1]}, "text": {"": [4, 0]}}


@pytest.mark.parametrize("place", ["method", "baseline"])
def test_without_a_delta_i_there_is_no_error(place: str) -> None:
    """An infinite perplexity is null, and a baseline of 0 nothing to divide by: one method is left out, or all are."""
    data = measured()
    tables = {method: table_and_influences(own) for method, own in data.items()}
    base, base_moved = tables.pop("STL")
    results = RESULTS | {"baseline": base, "methods": {method: values for method, (values, _) in tables.items()}}
    samples = {method: moved for method, (_, moved) in tables.items()}
    if place == "method":
        results["methods"]["CoTBal"]["text"]["ppl"] = None
    else:
        base["vqa"]["far EM"] = 0.0
    found = sampling_errors(results, samples, base_moved, by_set(IMAGES), "CoTBal")
    assert list(found) == (["EW"] if place == "method" else [])
    assert all("behind_final" not in own for own in found.values())


@pytest.mark.parametrize("count", [1, 2])
def test_of_a_single_sample_nothing_is_known(count: int) -> None:
    data = {
        method: {key: own[key][:count] if key[1] == "far" else own[key] for key in SETS}
        for method, own in measured().items()
    }
    for own in data.values():
        own["vqa", "far"] = np.array([[50.0], [30.0]][:count])
    images = {key: own[: len(data["EW"][key])] for key, own in IMAGES.items()}
    found, _ = errors(data, images)
    known = [found["EW"][key] for key in ("delta_i", "behind_final")] + [found["EW"]["per_task"]["vqa"]]
    assert [value is None for value in known] == [count == 1] * 3
    assert found["EW"]["per_task"]["text"] > 0


@pytest.mark.parametrize("metric", ["bleu", "exact_match"])
def test_influences_add_up_to_nothing(metric: str) -> None:
    result = get_metric(metric).compute(["a b c d e", "a b c d", "b"], [["a b c d e"], ["a b c d x"], ["b"]])
    assert math.fsum(result.influences) == pytest.approx(0, abs=1e-9)
    assert max(map(abs, result.influences)) > 1
