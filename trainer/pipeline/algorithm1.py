"""Algorithm 1 of CoTBal as a graph of stages, from records to the report.

data, check, check-validation
    Records, images and tokens, before anything expensive; validation records for methods that take losses of them.
corpus, initial_model, features, train-pretraining
    The built-in pretrained LMM, when none is given.
train-mini, train-plus-<i>, score-mini, score-plus-<i>
    Lines 1-4: proxy models, and V_j(mini), V_j(i + mini) on validation data.
train-alone-<i>, score-alone-<i>, score-stl-<i>
    One mini and one full model of each task alone, for the precise difficulty (Table 3).
weights, weights-<name>
    Lines 5-19: C, D and every lambda; once more for every ablation among the comparisons.
train-cotbal, test-cotbal
    Line 20: Eq. 2 with lambda_CoTBal.
train-<name>, test-<name>, train-stl-<i>, test-stl-<i>, results
    What CoTBal is compared with. ``train-<name>@1`` is ``train-<name>`` with the next seed.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from trainer.balancing.cotbal import DegenerateScoresError, cotbal_weights
from trainer.balancing.registry import method_class
from trainer.balancing.scores import Scores
from trainer.config import BUILT_IN, RunConfig
from trainer.data.mixtures import Mixture
from trainer.errors import UserError
from trainer.evaluation.parts import begun
from trainer.files import write_json
from trainer.launching import resolve_device
from trainer.loop.checkpoints import complete_checkpoints
from trainer.models.hub import pinned
from trainer.nodes import Cluster, Membership
from trainer.pipeline import built_in, outcome
from trainer.pipeline.evaluations import evaluation_spec
from trainer.pipeline.identity import FORMAT, Identity
from trainer.pipeline.places import BASE_MODEL, PLAN, RESOLVED, Places, environment, last_step, weights_stage
from trainer.pipeline.preflight import check_all, check_run, check_validation
from trainer.pipeline.progress import Progress
from trainer.pipeline.stages import Stage, StageContext, StageRunner, locked
from trainer.pipeline.trainings import (
    Training,
    counted_sequences,
    few_steps,
    list_trainings,
    plan,
    still_methods,
    weight_variants,
)
from trainer.report import build_report
from trainer.task_config import TaskConfig
from trainer.training import TrainingSpec


class Pipeline:
    """The stages of one run directory.

    Args:
        config: the validated configuration.
        progress: where to show what happens.
        node: this machine, which leads the others of ``launch.nodes``; None is a run of this machine alone.
    """

    def __init__(self, config: RunConfig, progress: Progress | None = None, node: Membership | None = None) -> None:
        self.config = config
        self.node = node or Membership()
        self.run_dir = config.output_dir
        self.progress = progress or Progress()
        self.places = Places(config.output_dir)
        self.device = resolve_device(config.launch.device)
        if self.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # else every process that imports DeepSpeed warns of it
        self.tasks: list[TaskConfig] = (
            built_in.task_configs(self.run_dir / "data", config.built_in)
            if isinstance(config.tasks, str)
            else config.tasks
        )
        self.balanced = tuple(task.name for task in self.tasks if not task.auxiliary)
        self.resolved = config.model_copy(update={"tasks": self.tasks})
        own_model = config.model.path == BUILT_IN
        self.initial_model = self.run_dir / "initial_model"
        self.trainings = list_trainings(config, self.tasks)
        self.variants = weight_variants(config)
        self.pretraining = Training("pretraining", Mixture("all"), (), ())
        base = self.places.training(self.pretraining) / "model"
        own_path = base if config.model.tiny_llava.pretraining_records else self.initial_model
        self.model_path = str(own_path) if own_model else config.model.path
        self.features = self.run_dir / "features" if own_model else None
        self.identity = Identity(self.resolved, self.tasks, on_disk=not isinstance(config.tasks, str))
        self._cluster: Cluster | None = None

    # -- what is run ---------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """The whole graph, each stage after those it needs."""
        stages = self._preparation()
        ready = tuple(stage.name for stage in stages)
        finals = [training for training in self.trainings if "test" in training.splits]
        for training in self.trainings:
            if training not in finals:
                stages += [self._train_stage(training, ready), self._score_stage(training, "validation")]
        # The full model of a task alone is one of the finals, and some weights may wait for its validation scores.
        alone = [training for training in finals if "validation" in training.splits]
        for training in alone:
            stages += [self._train_stage(training, ready), self._score_stage(training, "validation")]
        stages += [self._weights_stage(name) for name in self.variants]
        if any(self._validates(training) for training in finals):
            inputs = self.identity.validation()
            stages.append(Stage("check-validation", inputs, (), (), self._check_validation, after=ready))
        for training in finals:  # the longest first: the short ones fill the places that are left
            if training not in alone:
                validated = ("check-validation",) if self._validates(training) else ()
                stages.append(self._train_stage(training, (*ready, *validated)))
            stages.append(self._score_stage(training, "test"))
        tested = tuple(f"test-{training.name}" for training in finals)
        table = (self.run_dir / "results.json",)
        stages.append(Stage("results", self.identity.results(), (*tested, "weights"), table, self._collect_results))
        return stages

    def runner(self) -> StageRunner:
        """Of all stages, with what has become of them so far."""
        return StageRunner(self.run_dir / "stages", self.stages(), self.config.launch.slots, self.progress)

    def run(self, overwrite: bool = False) -> Path:
        """Runs what is not done yet and returns the path of the report.

        Args:
            overwrite: delete trainings and evaluations, finished or with something to go on from, that do not fit the
                configuration, the records or the model any more.

        Raises:
            UserError: bad input, found before any training starts; work already done would be deleted unasked; another
                process works on this run; or a machine of several cannot take part.
            TrainingFailedError: a training process ended with an error.
        """
        machines = Cluster(self.config, self.device, self.node, self.run_dir, self.progress.say)
        with locked(self.run_dir), machines as self._cluster:
            if self.features is None:
                self.model_path = pinned(self.model_path, self.run_dir / BASE_MODEL)
            runner = self.runner()
            if self.identity.on_disk and runner.would_lose():  # a mistyped path must not cost what is finished
                check_all(self.resolved, self.model_path if self.features is None else None)
            runner.refuse_to_lose(overwrite)
            self.progress.say(f"run directory: {self.run_dir}")
            (self.run_dir / RESOLVED).write_text(self.config.to_yaml(), encoding="utf-8")
            model = {} if self.features else {"model": self.model_path}
            write_json(self.run_dir / "environment.json", environment(self.config, self.device) | model)
            write_json(self.run_dir / PLAN, list(runner.stages))
            if runner.is_done(runner.stages["check"]):
                self._warn_of_short_trainings()
            runner.run(overwrite)
        return build_report(self.run_dir)

    # -- stages --------------------------------------------------------------------------------------------

    def _preparation(self) -> list[Stage]:
        stages: list[Stage] = []
        if isinstance(self.config.tasks, str):
            stages.append(
                Stage(
                    "data",
                    {"format": FORMAT, "built_in": self.config.built_in.model_dump(), "seed": self.config.seed},
                    (),
                    (self.run_dir / "data",),
                    lambda context: built_in.write_data(
                        self.run_dir / "data", self.config.built_in, self.config.seed, context
                    ),
                )
            )
        tasks = (self.run_dir / "tasks.json",)
        checked = Stage("check", self.identity.check(), self._data_stage(), tasks, self._check)
        if self.features is None:
            return [*stages, checked]
        return [*stages, *self._built_in_model(checked)]

    def _data_stage(self) -> tuple[str, ...]:
        """The stage that stands for the records, where there is one."""
        return ("data",) if isinstance(self.config.tasks, str) else ()

    def _built_in_model(self, checked: Stage) -> list[Stage]:
        """The stages that make the pretrained LMM which Algorithm 1 takes as given, when there is none to load."""
        options = self.config.model.tiny_llava
        assert self.features is not None
        own, corpus, needs = self.tasks, self.run_dir / "corpus", self._data_stage()
        files = self.identity.records("train", "validation", "test")
        stages: list[Stage] = []
        if options.pretraining_records:
            own = [*self.tasks, built_in.pretraining_task(corpus)]
            count = options.pretraining_records
            stages.append(
                Stage(
                    "corpus",
                    {"format": FORMAT, "model.tiny_llava.pretraining_records": count, "seed": self.config.seed},
                    (),
                    (corpus,),
                    lambda context: built_in.write_corpus(corpus, count, self.config.seed, context),
                )
            )
            needs = (*needs, "corpus")
        stages += [
            Stage(
                "initial_model",
                {
                    "format": FORMAT,
                    "records": files,
                    "model.tiny_llava": options.model_dump(),
                    "model.max_length": self.config.model.max_length,
                    "seed": self.config.seed,
                },
                needs,
                (self.initial_model,),
                lambda context: built_in.write_initial_model(self.initial_model, self.resolved, own),
            ),
            replace(checked, needs=("initial_model",)),
            Stage(
                "features",
                self.identity.features(),
                ("initial_model",),
                (self.features,),
                lambda context: built_in.write_image_features(
                    self.run_dir / "features", self.initial_model, self.resolved, own, context
                ),
                after=("check",),
            ),
        ]
        if options.pretraining_records:
            stages.append(self._train_stage(self.pretraining, ("features",)))
        return stages

    def _train_stage(self, training: Training, after: tuple[str, ...]) -> Stage:
        needs = self._data_stage()
        if self.features is not None:
            pretrained = training is not self.pretraining and self.config.model.tiny_llava.pretraining_records
            needs = (*needs, "features", *(["train-pretraining"] if pretrained else []))
        if training.weights:
            needs = (*needs, weights_stage(training.weights))
        return Stage(
            f"train-{training.name}",
            self.identity.training(training, own_records=training is not self.pretraining),
            needs,
            (self.places.training(training),),
            lambda context: self._train(training, context),
            after,
            costly=True,
            half_done=lambda: bool(complete_checkpoints(self.places.training(training))),
        )

    def _score_stage(self, training: Training, split: str) -> Stage:
        kind = "score" if split == "validation" else "test"
        return Stage(
            f"{kind}-{training.name}",
            self.identity.scoring(training, split),
            (f"train-{training.name}",),
            (self.places.evaluation(training, split),),
            lambda context: self._evaluate(training, split, context),
            costly=True,
            half_done=lambda: begun(self.places.evaluation(training, split)),
        )

    def _weights_stage(self, name: str) -> Stage:
        options = self.variants[name]
        outputs = (self.places.weights(name),)
        scored = [
            training.name
            for training in self.trainings
            if "validation" in training.splits
            and (options.difficulty == "precise" or training.mixture.kind in ("mini", "plus"))
        ]
        return Stage(
            weights_stage(name),
            {name: options.model_dump(mode="json")},
            tuple(f"score-{training}" for training in scored),
            (self.run_dir / "scores.json", *outputs) if name == "cotbal" else outputs,
            lambda context: self._compute_weights(name),
        )

    def _validates(self, training: Training) -> bool:
        """Whether the training's method takes validation losses."""
        return method_class(training.method).needs.validation

    # -- their work ----------------------------------------------------------------------------------------

    def _check(self, context: StageContext) -> None:
        model_path = str(self.initial_model) if self.features else self.model_path
        check_run(self.resolved, model_path, self.run_dir / "tasks.json", context)
        self._warn_of_short_trainings()

    def _warn_of_short_trainings(self) -> None:
        """From what the check has counted."""
        checked = json.loads((self.run_dir / "tasks.json").read_text())["tasks"]
        rows = plan(self.config, self.trainings, counted_sequences(self.config, checked))
        validation = {row["name"]: row["validation_records"] for row in checked if not row["auxiliary"]}
        steps = [row["steps"] for row in rows]
        for warning in (few_steps(rows), still_methods(self.config, self.trainings, steps, validation)):
            if warning:
                self.progress.say(warning)

    def _check_validation(self, context: StageContext) -> None:
        check_validation(self.resolved, self.model_path, context)

    def _train(self, training: Training, context: StageContext) -> None:
        directory = self.places.training(training)
        directory.mkdir(parents=True, exist_ok=True)
        weights = json.loads(self.places.weights(training.weights).read_text()) if training.weights else None
        config, launch, model_path = self.resolved, None, self.model_path
        if training is self.pretraining:  # alone, on its own records, from random weights
            epochs = {"epochs": config.model.tiny_llava.pretraining_epochs}
            tasks = [built_in.pretraining_task(self.run_dir / "corpus")]
            config = config.model_copy(update={"tasks": tasks, "training": config.training.model_copy(update=epochs)})
            launch, model_path = config.launch.model_copy(update={"parallel": 1}), str(self.initial_model)
        spec = TrainingSpec(
            name=training.name,
            config=config,
            model_path=model_path,
            mixture=training.mixture.kind,
            mixture_task=training.mixture.task,
            method=training.method,
            options=training.options,
            task_weights=dict(zip(weights["tasks"], weights["applied"], strict=True)) if weights else {},
            seed=self.config.seed + training.repetition,
            output_dir=directory,
            features=self.features,
        )
        write_json(directory / "spec.json", spec.model_dump(mode="json"))
        if (directory / "model").is_dir():  # killed between the end of the training and its manifest
            return

        def poll() -> None:
            step, steps = last_step(directory / "log.jsonl")
            context.report(step, steps, "step")

        assert self._cluster is not None
        self._cluster.train(directory / "spec.json", context.slot, directory / "output.log", poll, launch)

    def _evaluate(self, training: Training, split: str, context: StageContext) -> None:
        assert self._cluster is not None
        spec = evaluation_spec(
            self.resolved,
            self.places.training(training) / "model",
            split,
            training.tasks,
            self.places.evaluation(training, split),
            features=self.features,
            device=self.device,
            place=self._cluster.place(context.slot),
        )

        def report(done: int, total: int, note: str) -> None:
            context.report(done, total, "sample", note)

        self._cluster.evaluate(spec, context.slot, report)

    def _compute_weights(self, name: str) -> None:
        options = self.variants[name]
        table = outcome.score_table(self.run_dir, self.resolved, options.difficulty == "precise")
        if name == "cotbal":
            write_json(self.run_dir / "scores.json", table)
        scores = Scores.from_json(table)
        try:
            result = cotbal_weights(
                scores,
                options.temperature,
                options.alpha,
                options.on_degenerate,
                difficulty=options.difficulty,
            )
        except DegenerateScoresError as error:
            remedy = "the same command with --set cotbal.on_degenerate=clip, which trains no proxy again"
            raise UserError(f"{error}: {remedy}") from error
        applied = list(result.by_strategy(options.strategy).values())
        errors = outcome.weight_errors(self.run_dir, self.resolved, scores, options)
        more = {"strategy": options.strategy, "applied": applied, "sampling_errors": errors}
        write_json(self.places.weights(name), result.to_json() | more)

    def _collect_results(self, context: StageContext) -> None:
        outcome.write_results(self.run_dir, self.resolved, [t for t in self.trainings if "test" in t.splits])
