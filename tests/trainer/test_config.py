"""The configuration: every mistake is one line that names its place, and what is valid survives a round trip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.runtime.config import DeepSpeedConfig

import trainer.config
from trainer.config import LoraConfig, RunConfig, TinyLlavaConfig, TrainingConfig, load_config, parse_config, reference
from trainer.errors import UserError
from trainer.task_config import TaskConfig
from trainer.training import deepspeed_config

SHIPPED = sorted((Path(trainer.config.__file__).parent / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped configurations of real data find it through the environment."""
    monkeypatch.setenv("COTBAL_DATA", "/somewhere/data")


def task(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "train": "a.jsonl", "validation": "v.jsonl", "metric": "exact_match", **changes}


def problems(data: dict[str, Any]) -> list[str]:
    """The lines that the error lists."""
    with pytest.raises(UserError) as caught:
        parse_config({"output_dir": "out", "tasks": "built_in", **data}, "some.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == "some.yaml is not a valid configuration:"
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"seeed": 1}, "seeed: unknown key (did you mean 'seed'?)"),
        ({"training": {"epoch": 1}}, "training.epoch: unknown key (did you mean 'epochs'?)"),
        ({"model": {"tiny_llava": {"layer": 2}}}, "model.tiny_llava.layer: unknown key (did you mean 'layers'?)"),
        ({"model": {"lora": {"rnk": 2}}}, "model.lora.rnk: unknown key (did you mean 'rank'?)"),
        ({"balancing": {"metod": "ew"}}, "balancing.metod: unknown key (did you mean 'method'?)"),
        ({"balancing": {"validation": {"every": 2}}}, "balancing.validation.every: unknown key"),
        (
            {"comparisons": [{"method": "ew", "optoins": {}}]},
            "comparisons.0.optoins: unknown key (did you mean 'options'?",
        ),
        ({"launch": {"procs": 2}}, "launch.procs: unknown key (did you mean 'processes'?)"),
        ({"tasks": [task(metrc="cider")]}, "tasks.0.metrc: unknown key (did you mean 'metric'?)"),
        ({"tasks": [task(), task(name="b", valid="x")]}, "tasks.1.valid: unknown key (did you mean 'validation'?)"),
        ({"xyzzy": 1}, "xyzzy: unknown key"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(data: dict[str, Any], line: str) -> None:
    (found,) = problems(data)
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"seed": "x"}, "seed: Input should be a valid integer, unable to parse string as an integer (got 'x')"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
        ({"seed": 2**32}, "seed: Input should be less than 4294967296 (got 4294967296)"),
        (
            {"seed": 2**32 - 2, "seeds": 3},
            "seeds: the last seed, seed + seeds - 1 = 4294967296, must be less than",
        ),
        ({"training": {"epochs": 0}}, "training.epochs: Input should be greater than 0 (got 0)"),
        (
            {"training": {"epochs": 1e308}},
            "training.epochs: Input should be less than or equal to 1000000 (got 1e+308)",
        ),
        (
            {"model": {"tiny_llava": {"pretraining_epochs": 2e6}}},
            "model.tiny_llava.pretraining_epochs: Input should be l",
        ),
        (
            {"training": {"offload": False}},
            "training.offload: Input should be 'none', 'optimizer' or 'parameters' (got "
            "False, as YAML reads yes, no, on and off; put the word in quotes)",
        ),
        (
            {"tasks": [task(name=False)]},
            "tasks.0.name: Input should be a valid string (got False, as YAML reads yes, no",
        ),
        (
            {"tasks": [task(train=True)]},
            "tasks.0.train: Input is not a valid path for <class 'pathlib.Path'> (got True, ",
        ),
        (
            {"tasks": [task(test={True: "a"})]},
            "tasks.0.test: test set name True, as YAML reads yes, no, on and off; put",
        ),
        ({"training": {"epochs": float("inf")}}, "training.epochs: Input should be a finite number (got inf)"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: Input should be a finite number"),
        (
            {"training": {"zero_stage": 2, "offload": "parameters"}},
            "training: offload: parameters needs zero_stage 3, got 2",
        ),
        ({"training": {"zero_stage": 0}}, "training: zero_stage: 0 needs precision fp32: with bf16, DeepSpeed makes"),
        ({"training": {"zero_stage": 4}}, "training.zero_stage: Input should be 0, 1, 2 or 3 (got 4)"),
        ({"training": {"precision": "fp8"}}, "training.precision: Input should be 'fp32' or 'bf16' (got 'fp8')"),
        ({"training": {"batch_size": 0}}, "training.batch_size: Input should be greater than or equal to 1 (got 0)"),
        ({"cotbal": {"mini_ratio": 1}}, "cotbal.mini_ratio: Input should be less than 1 (got 1)"),
        ({"cotbal": {"alpha": 1.5}}, "cotbal.alpha: Input should be less than or equal to 1 (got 1.5)"),
        ({"comparisons": ["slt"]}, "comparisons.0: unknown method 'slt' (did you mean 'stl'?); valid: stl, ew, tla, "),
        ({"comparisons": ["ew", "ew"]}, "comparisons: names must be unique; given twice: ew"),
        ({"comparisons": [{"method": "rlw", "options": {"distribution": "dirichlet"}}]}, "comparisons.0: 'rlw' with "),
        ({"comparisons": [{"method": "stl", "name": "x", "options": {"T": 1}}]}, "comparisons.0: 'stl' has no options"),
        ({"comparisons": [{"method": "rlw", "name": "ew"}]}, "comparisons.0: comparison name 'ew' is a method's"),
        ({"comparisons": [{"method": "rlw", "name": "EW"}]}, "comparisons.0: comparison name 'EW' is a method's"),
        ({"comparisons": [{"method": "rlw", "name": "STL"}]}, "comparisons.0: comparison name 'STL' is a method's"),
        (
            {"comparisons": [{"method": "rlw", "name": "CoTBal"}]},
            "comparisons.0: comparison name 'CoTBal' is a method's",
        ),
        (
            {"comparisons": [{"method": "rlw", "name": "majority"}]},
            "comparisons.0: comparison name 'majority' belongs to another part of the run",
        ),
        ({"comparisons": [{"method": "rlw", "name": "a@1"}]}, "comparisons.0: comparison name 'a@1' must be letters"),
        ({"comparisons": [{"method": "rlw", "name": "mini"}]}, "comparisons.0: comparison name 'mini' belongs to a"),
        ({"comparisons": [{"method": "rlw", "name": "stl-a"}]}, "comparisons.0: comparison name 'stl-a' belongs to a"),
        ({"comparisons": [{"method": "rlw", "name": "x", "options": {"T": 1}}]}, "comparisons.0: options of method 'r"),
        ({"training": {"batch_size": True}}, "training.batch_size: must be a number, not a yes or no (got True)"),
        ({"training": {"zero_stage": True}}, "training.zero_stage: must be a number, not a yes or no (got True)"),
        ({"training": {"learning_rates": {"x": True}}}, "training.learning_rates: must be a number, not a yes or no"),
        (
            {"balancing": {"options": {"coba": {"window": 4, "temperature": True}}}},
            "balancing.options: options of method 'coba': temperature: must be a number, not a yes or no (got True)",
        ),
        ({"seeds": 0}, "seeds: Input should be greater than or equal to 1 (got 0)"),
        ({"balancing": {"method": "cobo"}}, "balancing.method: unknown method 'cobo' (did you mean 'coba'?); valid: "),
        ({"balancing": {"options": {"dwa": {"window": 0}}}}, "balancing.options: options of method 'dwa': window: "),
        ({"balancing": {"options": {"cotbal": {}}}}, "balancing.options: the options of 'cotbal' are the group "),
        ({"tasks": "builtin"}, "tasks: must be a list of tasks or 'built_in' (got 'builtin')"),
        ({"tasks": 3}, "tasks: must be a list of tasks or 'built_in' (got 3)"),
        ({"tasks": []}, "tasks: at least one task must be balanced (auxiliary: false)"),
        ({"tasks": [task(auxiliary=True)]}, "tasks: at least one task must be balanced (auxiliary: false)"),
        ({"tasks": [task(), task(name="b"), task()]}, "tasks: task names must be unique; given twice: a"),
        ({"tasks": [task(name="a/b")]}, "tasks.0.name: task name 'a/b' must be letters, digits"),
        ({"tasks": [task(name="..")]}, "tasks.0.name: task name '..' must be letters, digits"),
        ({"tasks": [task(metric=None)]}, "tasks.0: task 'a' is balanced, so it needs 'metric' and 'validation'"),
        ({"tasks": [task(validation=None)]}, "tasks.0: task 'a' is balanced, so it needs 'metric' and 'validation'"),
        ({"tasks": [{"name": "a"}]}, "tasks.0.train: Field required"),
        (
            {"tasks": [task(metric="exact_mach")]},
            "tasks.0.metric: unknown metric 'exact_mach' (did you mean 'exact_match'?); "
            "valid: exact_match, accuracy_iou, cider",
        ),
    ],
)
def test_a_bad_value_is_one_line_with_its_place(data: dict[str, Any], line: str) -> None:
    (found,) = problems(data)
    assert found.startswith(line)


def test_every_problem_is_listed() -> None:
    found = problems({"sed": 1, "training": {"epochs": -1, "zero": 1}, "tasks": [task(metric="em", nam="b")]})
    places = {line.split(":")[0] for line in found}
    assert places == {"sed", "training.epochs", "training.zero", "tasks.0.metric", "tasks.0.nam"}


def test_an_auxiliary_task_needs_no_metric() -> None:
    chat = {"name": "chat", "train": "c.jsonl", "auxiliary": True}
    config = parse_config({"output_dir": "out", "tasks": [task(), chat]}, "x")
    assert not isinstance(config.tasks, str)
    assert [(found.name, found.metric) for found in config.tasks] == [("a", "exact_match"), ("chat", None)]


class TestFiles:
    def test_data_paths_start_at_the_file_and_the_output_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, there = tmp_path / "here", tmp_path / "there"
        (there / "llava").mkdir(parents=True)
        here.mkdir()
        elsewhere = tmp_path / "absolute.jsonl"
        data = {
            "output_dir": "runs/one",
            "tasks": [task(train="data/a.jsonl", test=str(elsewhere)), task(name="b", image_root="pictures")],
            "model": {"path": "llava"},
        }
        (there / "c.yaml").write_text(yaml.safe_dump(data))
        monkeypatch.chdir(here)
        config = load_config(Path("../there/c.yaml"))
        assert not isinstance(config.tasks, str)
        a, b = config.tasks
        found = [path.resolve() for path in (a.train, a.validation, a.test, a.image_root, b.image_root) if path]
        assert found == [there / "data/a.jsonl", there / "v.jsonl", elsewhere, there, there / "pictures"]
        assert all(path.is_absolute() for path in (a.train, a.image_root, b.image_root, config.output_dir))
        assert config.output_dir == here / "runs/one"
        assert Path(config.model.path).resolve() == there / "llava"

    def test_paths_on_the_command_line_are_the_shell_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beside a folder of the same name that the file would mean; a hub name stays one."""
        here, there = tmp_path / "here", tmp_path / "there"
        for folder in (here, there):
            (folder / "models" / "a").mkdir(parents=True)
        data = {"output_dir": "o", "tasks": [task(train="t.jsonl")], "model": {"path": "models/a", "max_length": 99}}
        (there / "c.yaml").write_text(yaml.safe_dump(data))
        monkeypatch.chdir(here)
        monkeypatch.setenv("NAMED", "models")
        assert load_config(there / "c.yaml").model.path == str(there / "models/a")
        for path in ("models/a", "${NAMED}/a", "../here/models/a"):
            model = load_config(there / "c.yaml", {"model.path": path}).model
            assert (Path(model.path).resolve(), model.max_length) == (here / "models/a", 99)
        assert load_config(there / "c.yaml", {"model.path": "models/b"}).model.path == "models/b"
        tasks = load_config(there / "c.yaml", {"tasks": [task(train="t.jsonl")]}).tasks
        assert not isinstance(tasks, str)
        assert (tasks[0].train, tasks[0].image_root) == (here / "t.jsonl", here)
        with pytest.raises(UserError, match=r"--set: model\.path needs the environment variable NOT_SET"):
            load_config(there / "c.yaml", {"model.path": "${NOT_SET}/a"})

    def test_a_hub_name_is_no_path(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("output_dir: o\ntasks: built_in\nmodel: {path: llava-hf/llava-1.5-7b-hf}\n")
        assert load_config(tmp_path / "c.yaml").model.path == "llava-hf/llava-1.5-7b-hf"

    def test_overrides_lie_over_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("output_dir: o\ntasks: built_in\ntraining: {epochs: 3, batch_size: 2}\n")
        overrides = {"training.epochs": 5, "model.tiny_llava.layers": 7, "seed": 9}
        config = load_config(tmp_path / "c.yaml", overrides)
        assert (config.training.epochs, config.training.batch_size) == (5, 2)
        assert (config.model.tiny_llava.layers, config.seed) == (7, 9)
        with pytest.raises(UserError, match=r"training\.epoch: unknown key \(did you mean 'epochs'\?\)"):
            load_config(tmp_path / "c.yaml", {"training.epoch": 5})
        with pytest.raises(UserError, match=r"cannot set 'seed\.x': 'seed' is not a group"):
            load_config(tmp_path / "c.yaml", {"seed": 1, "seed.x": 5})

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"tasks: [", "is not valid YAML"),
            (b"- a\n- b\n", "must be a mapping of options, got list"),
            (b"", "must be a mapping of options, got NoneType"),
            (b"tasks: \xff", "is not valid YAML"),
            (b"1: 2\noutput_dir: o\ntasks: built_in\n", "1: Keys should be strings"),
            (b"training: {epochs: 2}\nseed: 1\ntraining: {batch_size: 4}\n", r"'training' is there twice\s.*line 3"),
            (b"training:\n  epochs: 2\n  epochs: 3\n", r"'epochs' is there twice\s.*line 3"),
            (b"seed: 010\n", r"010 would be a number with base 8; write it in decimal, or in quotes .*\s.*line 1"),
            (b"tasks: [{test: {1:30: a.json}}]\n", r"1:30 would be a number with base 60"),
            (b"training: {epochs: -1:30.5}\n", r"-1:30.5 would be a number with base 60"),
        ],
    )
    def test_a_file_that_is_no_configuration(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "c.yaml").write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_config(tmp_path / "c.yaml")
        assert "c.yaml" in str(caught.value)

    def test_what_a_mapping_takes_over_may_be_overridden(self, tmp_path: Path) -> None:
        """``<<`` is no key that is there twice, whichever mapping is made first."""
        (tmp_path / "c.yaml").write_text(
            "output_dir: o\ntasks: built_in\ncomparisons:\n"
            "- &a {name: a, method: rlw, options: &o {aggregation: task}}\n"
            "- &b {<<: *a, name: b, options: {<<: *o, aggregation: task_sum}}\n- {<<: *b, name: c}\n"
        )
        found = [(own.name, own.method, own.options) for own in load_config(tmp_path / "c.yaml").comparisons]
        sums = {"aggregation": "task_sum"}
        assert found == [("a", "rlw", {"aggregation": "task"}), ("b", "rlw", sums), ("c", "rlw", sums)]

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"configuration .*none\.yaml does not exist"):
            load_config(tmp_path / "none.yaml")
        with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
            load_config(tmp_path)

    @pytest.mark.parametrize("source", ["tasks", *(path.name for path in SHIPPED)])
    def test_round_trip(
        self, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path, source: str
    ) -> None:
        run_data["training"]["epochs"] = 2.5
        path = write_config(run_data) if source == "tasks" else SHIPPED[0].parent / source
        config = load_config(path)
        (tmp_path / "again.yaml").write_text(config.to_yaml())
        again = load_config(tmp_path / "again.yaml")
        assert again == config
        assert again.to_yaml() == config.to_yaml()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_say_what_is_read_from_them(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, RunConfig)
    assert (config.tasks == "built_in") == path.name.startswith("demo")
    written = yaml.safe_load(path.read_text())
    for group in {"built_in", "training", "cotbal", "launch", "evaluation"} & set(written):
        found = getattr(config, group).model_dump(mode="json")
        assert {key: found[key] for key in written[group]} == written[group]


def test_what_is_shipped() -> None:
    assert {path.name for path in SHIPPED} == {
        "demo.yaml", "demo_small.yaml", "cotbal_llava15_7b.yaml", "cotbal_llava15_7b_lora.yaml", "coba_qwen.yaml",
    }  # fmt: skip


def test_variables_in_paths(monkeypatch: pytest.MonkeyPatch, write_config: Callable[[dict[str, Any]], Path]) -> None:
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.delenv("RUNS", raising=False)
    own = task(train="${COTBAL_DATA}/a.jsonl", validation="v.jsonl", description="${RUNS} is no path")
    data = {"output_dir": "/out/${MODELS}", "tasks": [own], "model": {"path": "${MODELS}/a${MODELS}"}}
    path = write_config(data)
    config = load_config(path)
    assert not isinstance(config.tasks, str)
    assert (config.tasks[0].train, config.model.path) == (Path("/somewhere/data/a.jsonl"), "/models/a/models")
    assert (config.output_dir, config.tasks[0].validation) == (Path("/out/models"), path.parent / "v.jsonl")
    assert config.tasks[0].description == "${RUNS} is no path"
    path = write_config(data | {"output_dir": "${RUNS}/x"})
    with pytest.raises(UserError, match=r"config\.yaml: output_dir needs the environment variable RUNS, which is not"):
        load_config(path)


def test_the_home_folder_in_paths(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """In every path, as in a shell; the quotes of the command line keep ``~`` for us."""
    home = tmp_path / "home"
    (home / "llava").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    own = task(train="~/a.jsonl", test={"A": "~/t.jsonl", "B": "a~/t.jsonl"}, image_root="~")
    path = write_config({"output_dir": "~/run", "tasks": [own], "model": {"path": "~/llava"}})
    config = load_config(path)
    assert not isinstance(config.tasks, str)
    found = config.tasks[0]
    assert (found.train, found.image_root, config.output_dir) == (home / "a.jsonl", home, home / "run")
    assert found.test == {"A": home / "t.jsonl", "B": path.parent / "a~/t.jsonl"}
    assert config.model.path == str(home / "llava")
    assert load_config(path, {"output_dir": "~/other"}).output_dir == home / "other"


def test_the_reference_page_is_the_code_s() -> None:
    """docs/configuration.md is what `python -m trainer.config` prints now, and it has every key."""
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m trainer.config > docs/configuration.md"
    for model in (RunConfig, TaskConfig, TrainingConfig, TinyLlavaConfig, LoraConfig):
        for key, field in model.model_fields.items():
            assert f"| `{key}` |" in page or f"## `{key}`" in page or f"## `model.{key}`" in page, (key, field)


@pytest.mark.parametrize(
    ("stage", "offload", "devices"),
    [(1, "none", (None, None)), (1, "optimizer", ("cpu", None)), (3, "parameters", ("cpu", "cpu"))],
)
def test_deepspeed_is_told_what_to_offload(stage: int, offload: str, devices: tuple[str | None, str | None]) -> None:
    training = TrainingConfig(zero_stage=stage, offload=offload)
    found = DeepSpeedConfig(deepspeed_config(training)).zero_config
    places = tuple(part and str(part.device) for part in (found.offload_optimizer, found.offload_param))
    assert places == devices
