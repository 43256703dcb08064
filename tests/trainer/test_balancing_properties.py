"""What holds of every balancing method: weights that can be used, state that survives, names and options."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded_losses import Recording, make

from trainer.balancing.method import mean_one
from trainer.balancing.registry import METHODS, method_class, read_options
from trainer.errors import UserError

OPTIONS: dict[str, dict[str, Any]] = {
    "dwa": {"window": 2}, "igbv1": {"base_start": 1, "base_steps": 3}, "coba": {"warmup": 1, "window": 4},
}  # fmt: skip


def test_no_weight_is_zero() -> None:
    """The fused loss skips a task of weight 0, and its loss would read as 0 from then on."""
    assert mean_one(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)).tolist() == pytest.approx([1e-8, 0.75, 2.25])
    assert mean_one(torch.zeros(3, dtype=torch.float64)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_weights_are_finite_not_negative_and_have_mean_one(name: str, data: st.DataObject) -> None:
    """For any losses, however extreme, any pattern of absence, one task or many."""
    num_tasks = data.draw(st.integers(1, 5))
    steps = data.draw(st.integers(1, 9))
    record = Recording(steps, num_tasks, seed=data.draw(st.integers(0, 10)))
    scale = data.draw(st.sampled_from([1e-6, 1.0, 1e4]))
    factors = data.draw(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1e3]), min_size=num_tasks, max_size=num_tasks))
    record.sums *= scale * np.array(factors)
    record.after *= scale * np.array(factors)
    record.norms *= scale
    if data.draw(st.booleans()):  # a loss of 0 in the first steps or the last
        part = data.draw(st.sampled_from([slice(1), slice(3), slice(4, None)]))
        record.lose_nothing(part, data.draw(st.integers(0, num_tasks - 1)))
    if data.draw(st.booleans()):  # whole steps without a token
        empty = data.draw(st.integers(0, steps - 1))
        for array in (record.tokens, record.sums, record.after, record.norms):
            array[empty] = 0
    found = record.play(make(name, OPTIONS.get(name), num_tasks))
    assert np.isfinite(found).all()
    assert (found >= np.float32(1e-8)).all()
    np.testing.assert_allclose(found.astype(np.float64).mean(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_state_continues_bitwise(name: str) -> None:
    """Through a file, into a method that has seen other things."""
    record = Recording(16)

    def halfway(t: int) -> float:
        return (t + 1) / 4

    whole = record.play(make(name, OPTIONS.get(name)), epoch=halfway)
    first = Recording(16)
    for key in ("tokens", "sums", "mean", "after", "norms"):
        setattr(first, key, getattr(first, key)[:9])
    method = make(name, OPTIONS.get(name))
    first.play(method, epoch=halfway)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = make(name, OPTIONS.get(name), seed=5)
    Recording(4, seed=7).play(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weights, method.weights)  # which a step before the next validation uses
    np.testing.assert_array_equal(record.play(other, epoch=halfway, start=9), whole[9:])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dwa", {"window": 4}, 8), ("igbv1", {"base_start": 3, "base_steps": 2}, 5), ("coba", {}, 5),
        ("coba", {"warmup": 2, "window": 3}, 3), ("coba", {"warmup": 3, "variant": "mftcoder"}, 3), ("rlw", {}, 0),
    ],
)  # fmt: skip
def test_steps_of_equal_weights_are_foreseen(name: str, options: dict[str, Any], expected: int) -> None:
    chosen, read = method_class(name), read_options(name, options)
    for interval in (1, 3):
        factor = interval if chosen.needs.validation else 1
        assert chosen.equal_steps(read, validation_batches=4, interval=interval) == factor * expected
    found = Recording(14, seed=1).play(make(name, options))
    assert (found[:expected] == 1).all()
    assert not (found[expected] == 1).all()


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        ("ew", "token"), ("tla", "task"), ("uniform", "task_sum"), ("rlw", "token"), ("dwa", "token"),
        ("igbv1", "token"), ("cotbal", "token"), ("gradnorm", "task_sum"), ("lbtw_star", "task_sum"),
        ("famo", "task_sum"), ("coba", "task_sum"),
    ],
)  # fmt: skip
def test_each_method_has_the_aggregation_of_its_paper(name: str, aggregation: str) -> None:
    assert read_options(name).aggregation == aggregation
    assert read_options(name, {"aggregation": "token"}).aggregation == "token"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rlww", {}, r"unknown method 'rlww' \(did you mean 'rlw'\?\)"),
        ("rlw", {"distribtion": "normal"}, r"distribtion: unknown key \(did you mean 'distribution'\?\)"),
        ("rlw", {"distribution": "cauchy"}, r"distribution: Input should be 'normal' or 'dirichlet' \(got 'cauchy'\)"),
        ("dwa", {"temperature": 0}, r"temperature: Input should be greater than 0 \(got 0\)"),
        ("coba", {"window": 1}, r"window: Input should be greater than or equal to 2 \(got 1\)"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options(name, options)
