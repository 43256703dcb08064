"""Eq. 3-11 against a plain-loop version written from the paper, and the degenerate cases by name."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.balancing.cotbal import CONTRIBUTION_RANGE, STRATEGIES, all2one, cotbal_weights, one2all
from trainer.balancing.scores import Scores


def softmax(values):
    e = [math.exp(v - max(values)) for v in values]
    return [v / math.fsum(e) for v in e]


def paper_weights(table, T, a):
    """Eq. 3-11 on the JSON table itself, with lists and loops only."""
    names, mini, full = table["tasks"], table["mini"], table["full"]
    N = len(names)
    C = [[(full[i][j] - mini[j]) / (full[j][j] - mini[j]) if i != j else 1.0 for j in names] for i in names]  # Eq. 3
    out = [math.fsum(C[i][j] for j in range(N) if j != i) / (N - 1) for i in range(N)]  # Eq. 4
    into = [math.fsum(C[j][i] for j in range(N) if j != i) / (N - 1) for i in range(N)]  # Eq. 6
    one2all = [N * v for v in softmax([c / T for c in out])]  # Eq. 5
    all2one = [N * v for v in softmax([-c / T for c in into])]  # Eq. 7
    lambda_c = [(x + y) / 2 for x, y in zip(one2all, all2one, strict=True)]  # Eq. 8
    D = [1 - mini[i] / full[i][i] for i in names]  # Eq. 9
    lambda_d = [N * v for v in softmax([d / T for d in D])]  # Eq. 10
    return {
        "contribution": C,
        "difficulty": D,
        "lambda_one2all": one2all,
        "lambda_all2one": all2one,
        "lambda_c": lambda_c,
        "lambda_d": lambda_d,
        "weights": [a * c + (1 - a) * d for c, d in zip(lambda_c, lambda_d, strict=True)],  # Eq. 11
    }


score = st.floats(0.0, 100.0, allow_nan=False)


@st.composite
def tables(draw, smallest=2):
    N = draw(st.integers(smallest, 7))
    names = [f"task {k}" for k in range(N)]
    mini = {n: draw(score) for n in names}
    full = {i: {j: draw(score) for j in names} for i in names}
    for n in names:  # own data helps, clearly
        full[n][n] = mini[n] + draw(st.floats(0.05, 1.0)) * (mini[n] + 10)
    return {"tasks": names, "mini": mini, "full": full}


class TestEquations:
    @settings(max_examples=200)
    @given(tables(), st.sampled_from([0.5, 1.0, 2.0, 0.37]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    def test_random_tables(self, table, temperature, alpha):
        found = cotbal_weights(Scores.from_json(table), temperature, alpha).to_json()
        for key, expected in paper_weights(table, temperature, alpha).items():
            np.testing.assert_allclose(found[key], expected, rtol=1e-12, atol=1e-12, err_msg=key)
        assert (found["tasks"], found["temperature"], found["alpha"]) == (table["tasks"], temperature, alpha)
        assert found["clipped"] == []
        assert math.isclose(sum(found["weights"]), len(table["tasks"]), rel_tol=1e-12)

    def test_worked_out(self):
        table = {
            "tasks": ["a", "b"],
            "mini": {"a": 0.2, "b": 0.1},
            "full": {"a": {"a": 0.4, "b": 0.15}, "b": {"a": 0.2, "b": 0.2}},
        }
        found = cotbal_weights(Scores.from_json(table)).to_json()
        # C_ab = .05/.1, C_ba = 0; D = .5 for both, so lambda_D = 1.
        # one2all = (.5, 0) and -all2one = (0, -.5) differ by .5 = T, so both softmaxes are (e, 1) / (e + 1).
        heavy = 2 * math.e / (math.e + 1)
        np.testing.assert_allclose(found["contribution"], [[1, 0.5], [0, 1]], atol=1e-12)
        C = np.array(found["contribution"])
        np.testing.assert_allclose([one2all(C), all2one(C)], [[0.5, 0], [0, 0.5]], atol=1e-12)
        np.testing.assert_allclose(found["difficulty"], [0.5, 0.5], atol=1e-12)
        np.testing.assert_allclose(found["lambda_d"], [1, 1], atol=1e-12)
        np.testing.assert_allclose(found["lambda_one2all"], [heavy, 2 - heavy], atol=1e-12)
        np.testing.assert_allclose(found["lambda_all2one"], [heavy, 2 - heavy], atol=1e-12)
        np.testing.assert_allclose(found["weights"], [(heavy + 1) / 2, (3 - heavy) / 2], atol=1e-12)

    def test_one_task_has_weight_one(self):
        table = {"tasks": ["a"], "mini": {"a": 0.2}, "full": {"a": {"a": 0.4}}}
        found = cotbal_weights(Scores.from_json(table)).to_json()
        assert found["contribution"] == [[1.0]]
        assert found["difficulty"] == [0.5]
        for key in ("lambda_one2all", "lambda_all2one", "lambda_c", "lambda_d", "weights"):
            assert found[key] == [1.0]

    def test_json_keys(self, table):
        found = cotbal_weights(Scores.from_json(table)).to_json()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert set(found) == {
            "tasks", "temperature", "alpha", "contribution", "difficulty", "lambda_one2all", "lambda_all2one",
            "lambda_c", "lambda_d", "weights", "clipped", "warnings",
        }  # fmt: skip

    def test_strategies(self, table):
        weights = cotbal_weights(Scores.from_json(table))
        expected = paper_weights(table, 0.5, 0.5)
        keys = ("weights", "lambda_one2all", "lambda_all2one", "lambda_c", "lambda_d")
        for strategy, key in zip(STRATEGIES, keys, strict=True):
            found = weights.by_strategy(strategy)
            assert list(found) == table["tasks"]
            assert list(found.values()) == pytest.approx(expected[key], rel=1e-12)
        with pytest.raises(ValueError, match=r"unknown strategy 'one2al'.*'one2all'"):
            weights.by_strategy("one2al")


@pytest.fixture
def table():
    return {
        "tasks": ["a", "b", "c"],
        "mini": {"a": 0.3, "b": 0.2, "c": 0.5},
        "full": {
            "a": {"a": 0.6, "b": 0.25, "c": 0.55},
            "b": {"a": 0.35, "b": 0.5, "c": 0.45},
            "c": {"a": 0.3, "b": 0.3, "c": 0.7},
        },
    }


class TestLowerIsBetter:
    def test_contribution_is_sign_invariant(self, table):
        """A metric and its distance from 1 describe the same gains."""
        mirrored = copy.deepcopy(table)
        mirrored["mini"]["b"] = 1 - table["mini"]["b"]
        for row, original in zip(mirrored["full"].values(), table["full"].values(), strict=True):
            row["b"] = 1 - original["b"]
        mirrored["higher_is_better"] = {"b": False}
        for policy in ("error", "clip"):
            np.testing.assert_allclose(
                cotbal_weights(Scores.from_json(mirrored), on_degenerate=policy).contribution,
                paper_weights(table, 0.5, 0.5)["contribution"],
                rtol=1e-12,
            )

    def test_difficulty_is_that_of_the_reciprocal(self, table):
        inverse = copy.deepcopy(table)
        for row in (inverse["mini"], *inverse["full"].values()):
            row["b"] = 1 / row["b"]
        inverse["higher_is_better"] = {"b": False}
        np.testing.assert_allclose(
            cotbal_weights(Scores.from_json(inverse)).difficulty,
            paper_weights(table, 0.5, 0.5)["difficulty"],
            rtol=1e-12,
        )

    def test_an_error_that_grows_is_degenerate(self, table):
        table["higher_is_better"] = {"b": False}
        with pytest.raises(ValueError, match=r"task 'b': .*does not fall below"):
            cotbal_weights(Scores.from_json(table))


class TestDegenerate:
    @given(tables(), st.data())
    def test_names_exactly_the_tasks_that_do_not_gain(self, table, data):
        bad = data.draw(st.sets(st.sampled_from(table["tasks"]), min_size=1))
        for name in bad:
            table["full"][name][name] = table["mini"][name] * data.draw(st.floats(0, 1.005))
        with pytest.raises(ValueError, match="or have the values bounded") as caught:
            cotbal_weights(Scores.from_json(table))
        assert {name for name in table["tasks"] if f"task {name!r}:" in str(caught.value)} == bad

    def test_tiny_gain_does_not_explode_silently(self, table):
        table["mini"]["b"] = 0.4999
        with pytest.raises(ValueError, match=r"task 'b': V\(b\+mini\) = 0.5 does not exceed"):
            cotbal_weights(Scores.from_json(table))
        # Asked for: it is computed, and said.
        found = cotbal_weights(Scores.from_json(table), minimum_gain=0.0)
        assert found.contribution[0, 1] == pytest.approx(-2499, rel=1e-9)
        assert any("'a' to 'b' is -2.5e+03" in warning for warning in found.warnings)

    @pytest.mark.parametrize(
        ("mini", "higher", "degenerate"),
        [(0.4951, True, True), (0.4949, True, False), (0.505, False, True), (0.5051, False, False)],
    )
    def test_a_gain_of_one_percent_is_where_it_begins(self, table, mini, higher, degenerate):
        """Of the larger of 0.5 and mini: 0.0049 and 0.005 are not enough, 0.0051 is."""
        table["mini"]["b"] = mini
        table["higher_is_better"] = {"b": higher}
        found = cotbal_weights(Scores.from_json(table), on_degenerate="clip")
        assert any("task 'b'" in warning for warning in found.warnings) == degenerate

    def test_clip_by_hand(self, table):
        table["mini"]["b"] = 0.51  # own data makes b worse: 0.51 -> 0.50
        found = cotbal_weights(Scores.from_json(table), on_degenerate="clip", minimum_gain=0.1)
        # In column b the divisor is 0.1 * 0.51: (0.25 - 0.51) / 0.051 < -2 and (0.3 - 0.51) / 0.051 < -2.
        np.testing.assert_allclose(found.contribution[:, 1], [CONTRIBUTION_RANGE[0], 1, CONTRIBUTION_RANGE[0]])
        healthy = paper_weights(table, 0.5, 0.5)
        np.testing.assert_allclose(
            found.contribution[:, [0, 2]], np.array(healthy["contribution"])[:, [0, 2]], rtol=1e-12
        )
        assert found.difficulty[1] == 0.0
        clipped = {(entry.quantity, entry.tasks): (entry.original, entry.value) for entry in found.clipped}
        assert clipped == {
            ("contribution", ("a", "b")): (pytest.approx(26), -2.0),
            ("contribution", ("c", "b")): (pytest.approx(21), -2.0),
            ("difficulty", ("b",)): (pytest.approx(1 - 0.51 / 0.5), 0.0),
        }
        assert len(found.warnings) == 1
        assert "task 'b'" in found.warnings[0]
        json.dumps(found.to_json(), allow_nan=False)

    @pytest.mark.parametrize("higher", [True, False])
    def test_clip_divides_by_the_smallest_gain(self, higher):
        """Of a task whose own data brings 0.002: 1 % of its score, in whichever direction is better."""
        sign = 1 if higher else -1
        mini, own = {"a": 0.3, "b": 0.5}, {"a": 0.3 + 0.3 * sign, "b": 0.5 + 0.002 * sign}
        full = {"a": {"a": own["a"], "b": 0.5 + 0.004 * sign}, "b": {"a": 0.3 - 0.15 * sign, "b": own["b"]}}
        table = {"tasks": ["a", "b"], "mini": mini, "full": full, "higher_is_better": {"a": higher, "b": higher}}
        found = cotbal_weights(Scores.from_json(table), on_degenerate="clip", alpha=1.0)
        column = 0.004 / (0.01 * max(0.5, own["b"]))
        np.testing.assert_allclose(found.contribution, [[1, column], [-0.5, 1]], rtol=1e-9)

    def test_clip_bounds_a_healthy_but_large_ratio(self, table):
        table["full"]["a"]["b"] = 1.4  # C_ab = 1.2 / 0.3 = 4
        assert cotbal_weights(Scores.from_json(table)).warnings[0].startswith("the contribution of 'a' to 'b' is 4")
        found = cotbal_weights(Scores.from_json(table), on_degenerate="clip")
        assert found.contribution[0, 1] == 2.0
        assert [(entry.tasks, entry.value) for entry in found.clipped] == [(("a", "b"), 2.0)]
        narrow = cotbal_weights(Scores.from_json(table), on_degenerate="clip", contribution_range=(0, 1))
        assert narrow.contribution[0, 1] == 1
        wider = cotbal_weights(Scores.from_json(table), on_degenerate="clip", contribution_range=(-5, 5))
        assert wider.contribution[0, 1] == pytest.approx(4)
        assert wider.clipped == []

    @given(tables(smallest=1))
    def test_clip_changes_nothing_inside_the_range(self, table):
        scores = Scores.from_json(table)
        exact = cotbal_weights(scores, contribution_range=(-1e9, 1e9))
        assert cotbal_weights(scores, on_degenerate="clip", contribution_range=(-1e9, 1e9)).to_json() == exact.to_json()

    @pytest.mark.parametrize("mini", [0.0, 0.2])
    def test_zero_denominator_of_the_difficulty(self, table, mini):
        table["mini"]["c"], table["full"]["c"]["c"] = mini, 0.0
        with pytest.raises(ValueError, match=r"task 'c': V\(c\+mini\) = 0 is not positive.*Eq\. 9"):
            cotbal_weights(Scores.from_json(table))
        found = cotbal_weights(Scores.from_json(table), on_degenerate="clip")
        assert found.difficulty[2] == 0.0
        assert ("difficulty", ("c",), None) in [(c.quantity, c.tasks, c.original) for c in found.clipped]
        assert np.isfinite(found.weights).all()

    def test_zero_denominator_where_lower_is_better(self, table):
        table["higher_is_better"] = {"c": False}
        table["mini"]["c"] = 0.0
        with pytest.raises(ValueError, match=r"task 'c': V\(mini\) = 0 is not positive"):
            cotbal_weights(Scores.from_json(table))

    def test_zero_denominator_of_the_precise_difficulty_alone(self, table):
        table["alone"] = {"mini": dict.fromkeys("abc", 0.1), "full": {"a": 0.5, "b": 0.0, "c": 0.5}}
        with pytest.raises(ValueError, match=r"^task 'b': V\(b alone\) = 0 is not positive"):
            cotbal_weights(Scores.from_json(table), difficulty="precise")

    def test_a_task_that_scores_nothing_anywhere(self, table):
        table["mini"]["b"] = 0.0
        for row in table["full"].values():
            row["b"] = 0.0
        found = cotbal_weights(Scores.from_json(table), on_degenerate="clip")
        np.testing.assert_array_equal(found.contribution[:, 1], [0, 1, 0])
        assert [c.original for c in found.clipped] == [None, None, None]

    @pytest.mark.parametrize(("V_mini", "V_all", "higher", "D"), [(0.5, 0.1, True, -4), (0.2, 0.5, False, -1.5)])
    def test_a_difficulty_below_zero_is_said(self, table, V_mini, V_all, higher, D):
        """Of models of one task alone, more data may make a task worse: nothing else would tell."""
        table["alone"] = {"mini": {"a": V_mini, "b": 0.2, "c": 0.5}, "full": {"a": V_all, "b": 0.5, "c": 0.7}}
        if not higher:
            table["higher_is_better"] = {"a": False}
            table["mini"]["a"] = 0.9
        scores = Scores.from_json(table)
        found = cotbal_weights(scores, difficulty="precise")
        assert found.difficulty[0] == pytest.approx(D)
        (warning,) = found.warnings
        assert f"the difficulty of 'a' is {D}, outside [0, 1], from V = {V_mini} with little data" in warning
        clip = cotbal_weights(scores, difficulty="precise", on_degenerate="clip")
        assert (clip.difficulty[0], clip.warnings) == (0, [])
        assert cotbal_weights(scores).warnings == []

    def test_overflow_is_an_error(self, table):
        table["mini"]["a"], table["full"]["b"]["a"], table["full"]["a"]["a"] = 1e-300, 1e300, 1e-299
        with np.errstate(all="ignore"), pytest.raises(ValueError, match="overflow"):
            cotbal_weights(Scores.from_json(table))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": math.inf}, "temperature"),
        ({"alpha": 1.1}, r"alpha must be within \[0, 1\], got 1.1"),
        ({"alpha": math.nan}, "alpha"),
        ({"on_degenerate": "ignore"}, "on_degenerate must be 'error' or 'clip', got 'ignore'"),
        ({"minimum_gain": -1}, "minimum_gain"),
        ({"minimum_gain": math.inf}, "minimum_gain"),
        ({"contribution_range": (0.5, 2)}, "contribution_range"),
        ({"difficulty": "exact"}, "difficulty must be 'reused' or 'precise', got 'exact'"),
    ],
)
def test_bad_options(table, options, message):
    with pytest.raises(ValueError, match=message):
        cotbal_weights(Scores.from_json(table), **options)


class TestScores:
    def test_round_trip_and_orientation(self, table):
        scores = Scores.from_json(table)
        assert scores.full[0, 1] == table["full"]["a"]["b"] == 0.25
        assert scores.to_json() == {**table, "higher_is_better": dict.fromkeys("abc", True)}
        assert Scores.from_json(scores.to_json()).to_json() == scores.to_json()
        table["alone"] = {"mini": table["mini"], "full": table["full"]["a"]}
        assert Scores.from_json(table).to_json()["alone"] == table["alone"]

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("tasks",), [], r"scores\['tasks'\] must be a non-empty list"),
            (("tasks",), "abc", r"scores\['tasks'\] must be a non-empty list"),
            (("tasks",), ["a", "b", "c", "a"], r"lists 'a' more than once"),
            (("tasks",), ["a", "b", "c", "d"], r"no entry for task 'd'"),
            (("tasks",), ["a", "b"], r"unknown task 'c'"),
            (("mini", "b"), math.nan, r"scores\['mini'\]\['b'\] must be a finite number, got nan"),
            (("mini", "b"), "0.2", r"scores\['mini'\]\['b'\] must be a finite number"),
            (("mini", "b"), 10**400, r"scores\['mini'\]\['b'\] must be a finite number, got 1000"),
            (("mini", "b"), None, r"scores\['mini'\]\['b'\] must be a finite number"),
            (
                ("full", "a", "c"),
                math.inf,
                r"scores\['full'\]\['a'\]\['c'\] must be a finite number, got inf",
            ),
            (("full", "a", "c"), True, r"scores\['full'\]\['a'\]\['c'\] must be a finite number, got True"),
            (("full", "b"), {"a": 1, "b": 2}, r"scores\['full'\]\['b'\] has no entry for task 'c'"),
            (("full", "b"), [1, 2, 3], r"scores\['full'\]\['b'\] must be an object"),
            (("full",), {}, r"scores\['full'\] has no entry for task 'a'"),
            (("higher_is_better",), {"a": 1}, r"\['higher_is_better'\]\['a'\] must be true or false"),
            (("higher_is_better",), {"aa": True}, r"unknown task 'aa'"),
            (("minni",), {}, r"unknown key 'minni'.*'mini'"),
            (("tasks",), ["a", "b", 3], r"scores\['tasks'\] must be a non-empty list of names"),
            (("alone",), {"mini": {"a": 1, "b": 1, "c": 1}}, r"scores\['alone'\] has no entry for key 'full'"),
        ],
    )
    def test_bad_tables_are_named(self, table, path, value, message):
        place = table
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(ValueError, match=message):
            Scores.from_json(table)

    def test_missing_key(self, table):
        del table["mini"]
        with pytest.raises(ValueError, match="no entry for key 'mini'"):
            Scores.from_json(table)
