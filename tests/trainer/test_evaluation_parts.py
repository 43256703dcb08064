"""The pieces of an evaluation: its plan, part files, the digest of a model, and what a batch says when it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import trainer.evaluation.manifest as manifest
from trainer.data.encoding import ConversationEncoder, Encoded
from trainer.data.records import Record, Turn, write_jsonl
from trainer.evaluation.generation import BatchScorer
from trainer.evaluation.parts import Claims, Finished, PartFile, busy_seconds, collect, sole_use
from trainer.evaluation.planning import Batch, plan_batches, prompt_sizes
from trainer.evaluation.scoring import read_predictions
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.models.config import ImageConfig
from trainer.models.loading import load_processor
from trainer.report.run_directory import RunDirectory
from trainer.task_config import TaskConfig


class TestPlan:
    @given(
        st.lists(st.lists(st.integers(1, 30), max_size=25), min_size=1, max_size=3),
        st.integers(1, 7),
        st.lists(st.integers(0, 40), min_size=3, max_size=3),
    )
    def test_every_record_once_with_neighbours_of_its_length(self, lengths, size, new_tokens):
        plan = plan_batches(lengths, new_tokens[: len(lengths)], size)
        costs = []
        for index, own in enumerate(lengths):
            batches = [batch.records for batch in plan if batch.set_index == index]
            assert sorted(record for batch in batches for record in batch) == list(range(len(own)))
            # As a sorted list cut into pieces: no two pieces overlap, and only the last one is short.
            assert sorted(map(len, batches), reverse=True) == [
                min(size, len(own) - start) for start in range(0, len(own), size)
            ]
            spans = sorted((max(own[r] for r in batch), min(own[r] for r in batch)) for batch in batches)
            assert all(above[1] >= below[0] for below, above in pairwise(spans))
        for batch in plan:
            own = lengths[batch.set_index]
            costs.append(len(batch.records) * (max(own[r] for r in batch.records) + new_tokens[batch.set_index]))
        assert costs == sorted(costs, reverse=True)

    def test_ties_stay_in_record_order(self):
        assert plan_batches([[5, 9, 5, 5]], [0], 2) == [Batch(0, (1, 0)), Batch(0, (2, 3))]

    def test_lengths_without_decoding_are_those_of_the_prompts(self, pixel_model: Path, tiny_tasks: list[TaskConfig]):
        encoder = ConversationEncoder(load_processor(str(pixel_model)), 256)
        for task in tiny_tasks:
            for metric in ("exact_match", "perplexity"):
                chosen = EvaluationSet(task.name, (task.train,), task.image_root, (metric,), 8)
                sizes = prompt_sizes(encoder)
                one = encoder.training_sample if metric == "perplexity" else encoder.prompt
                records = chosen.load()
                wanted = [len(one(record, chosen.image_path).input_ids) for record in records]
                assert [sizes(record, chosen) for record in records] == wanted

    def test_lengths_with_a_processor_that_tiles(self, pixel_model: Path, tmp_path: Path):
        """LLaVA-NeXT's own processor, whose images take as many tokens as their shape asks for."""
        from transformers import LlavaNextProcessor
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        plain = load_processor(str(pixel_model))
        side = {"height": 64, "width": 64}
        processor = LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(
                size={"shortest_edge": 64}, crop_size=side, image_grid_pinpoints=[[64, 128], [128, 64], [128, 128]]
            ),
            tokenizer=plain.tokenizer, patch_size=32, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=plain.chat_template,
        )  # fmt: skip
        rows = []
        for number, size in enumerate([(64, 64), (128, 64), (200, 50), (50, 200), (300, 300)]):
            Image.new("RGB", size).save(tmp_path / f"{number}.png")
            turns = [{"from": "human", "value": f"<image>\nWhat is number {number}?"}, {"from": "gpt", "value": "it"}]
            rows.append({"id": number, "image": f"{number}.png", "conversations": turns})
        (tmp_path / "r.json").write_text(json.dumps(rows))
        chosen = EvaluationSet("x", (tmp_path / "r.json",), tmp_path, ("exact_match",), 8)
        encoder = ConversationEncoder(processor, 4096)
        sizes = prompt_sizes(encoder)
        wanted = [len(encoder.prompt(record, chosen.image_path).input_ids) for record in chosen.load()]
        assert [sizes(record, chosen) for record in chosen.load()] == wanted
        assert len(set(wanted)) > 2


class TestParts:
    PLAN = (Batch(0, (1, 0)), Batch(0, (2,)), Batch(1, (0, 1)))

    def finished(self, batch: int) -> Finished:
        return Finished(batch, [{"prediction": "ä\u2028\n"}] * len(self.PLAN[batch].records), 5, 6, 7, 1.0, 2.0)

    def test_come_back_as_they_were(self, tmp_path: Path) -> None:
        for rank, batches in ((0, (2, 0)), (3, (1,))):
            with PartFile(tmp_path, rank) as part:
                for batch in batches:
                    part.append(self.finished(batch))
        assert collect(tmp_path, self.PLAN) == {batch: self.finished(batch) for batch in range(3)}

    @pytest.mark.parametrize(
        "damage",
        [
            b'{"batch": 1, "results": [{"predic',
            b"\x00" * 40 + b"\n",
            b"[1]\n",
            b"{}\n",
            b'{"batch": 9, "results": [], "prompt_tokens": 1, "padded_tokens": 1, "generated_tokens": 1, '
            b'"started": 0, "ended": 1}\n',
            b'{"batch": 2, "results": [{}], "prompt_tokens": 1, "padded_tokens": 1, "generated_tokens": 1, '
            b'"started": 0, "ended": 1}\n',
        ],
    )
    def test_damage_is_dropped_and_can_be_appended_to(self, tmp_path: Path, damage: bytes) -> None:
        with PartFile(tmp_path, 0) as part:
            part.append(self.finished(0))
        (tmp_path / "rank-0.jsonl").open("ab").write(damage)
        assert collect(tmp_path, self.PLAN) == {0: self.finished(0)}
        with PartFile(tmp_path, 0) as part:
            part.append(self.finished(1))
        assert collect(tmp_path, self.PLAN) == {0: self.finished(0), 1: self.finished(1)}

    def test_every_cut_of_the_last_line(self, tmp_path: Path) -> None:
        with PartFile(tmp_path, 0) as part:
            part.append(self.finished(0))
            part.append(self.finished(1))
        content = (tmp_path / "rank-0.jsonl").read_bytes()
        first = content.index(b"\n") + 1
        for end in range(first, len(content)):
            (tmp_path / "rank-0.jsonl").write_bytes(content[:end])
            assert collect(tmp_path, self.PLAN) == {0: self.finished(0)}
            assert (tmp_path / "rank-0.jsonl").read_bytes() == content[:first]

    def test_claims(self, tmp_path: Path) -> None:
        ranks = [Claims(tmp_path), Claims(tmp_path)]
        ranks[0].open(2)
        taken = [ranks[0].take(0), ranks[0].take(), ranks[1].take(1), ranks[1].take(), ranks[0].take()]
        assert taken == [0, 2, 1, 3, 4]
        ranks[1].close()
        assert min(ranks[0].take(), ranks[1].take(), ranks[0].take(0)) > 10**9

    @given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=20))
    def test_busy_seconds(self, spans):
        """Against counting the unit steps that any interval covers."""
        covered = {step for start, length in spans for step in range(start, start + length)}
        assert busy_seconds((start, start + length) for start, length in spans) == len(covered)

    def test_two_at_once_are_refused(self, tmp_path: Path) -> None:
        message = "another process is evaluating into"
        with sole_use(tmp_path), pytest.raises(ValueError, match=message), sole_use(tmp_path):
            pass


class TestScorer:
    def test_out_of_memory_names_the_option_and_the_longest_prompt(self) -> None:
        class Full(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def generate(self, **_: Any) -> None:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        class Tokenizer:
            pad_token_id = 0

        chosen = EvaluationSet("vqa", (), Path(), ("exact_match",), 9)
        encoded = [Encoded([1] * length, [-100] * length) for length in (3, 700, 20)]
        message = r"set 'vqa': .*3 records at once, the longest of 700 tokens and up to 9 new ones each; "
        with pytest.raises(ValueError, match=message + r"lower evaluation.batch_size \(--batch-size\), now 32"):
            BatchScorer(Full(), Tokenizer(), 32)(chosen, encoded)

    def test_a_model_inside_a_zero_3_engine_is_refused(self) -> None:
        model = torch.nn.Linear(2, 2)
        model.weight.ds_id = 0  # type: ignore[assignment]  # what DeepSpeed marks a partitioned parameter with
        with pytest.raises(ValueError, match="inside a ZeRO-3 engine"):
            BatchScorer(model, None, 1)


class TestModelDigest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(250)) * 40)
        return folder

    def test_is_that_of_a_copy(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
        assert manifest.model_digest(tmp_path / "copy") == manifest.model_digest(folder)

    @pytest.mark.parametrize("position", [0, 4321, 9999])
    def test_changes_with_a_byte(self, folder: Path, position: int) -> None:
        before = manifest.model_digest(folder)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[position] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        assert manifest.model_digest(folder) != before

    def test_of_a_large_file_looks_at_pieces_from_end_to_end(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(manifest, "_PIECES", 5)
        monkeypatch.setattr(manifest, "_PIECE", 4)  # of 10,000 bytes: pieces at 0, 2499, 4998, 7497, 9996
        path = folder / "model.safetensors"
        before, content = manifest.model_digest(folder), path.read_bytes()
        seen = []
        for position in (0, 3, 4, 2499, 2503, 7500, 9995, 9996, 9999):
            changed = bytearray(content)
            changed[position] ^= 1
            path.write_bytes(changed)
            seen.append(manifest.model_digest(folder) != before)
        assert seen == [True, True, False, True, False, True, False, True, True]

    def test_changes_with_a_name(self, folder: Path) -> None:
        before = manifest.model_digest(folder)
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        assert manifest.model_digest(folder) != before

    def test_needs_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is not a model folder: there is no config\.json in it"):
            manifest.model_digest(tmp_path)


@pytest.mark.parametrize(
    ("metric", "changes", "of_set", "differs"),
    [
        ("bleu", {}, {}, []),
        ("bleu", {"batch_size": 8}, {}, ["batch_size"]),
        ("bleu", {"precision": "bf16"}, {}, ["precision"]),
        ("bleu", {"attention": "eager"}, {}, ["attention"]),
        ("bleu", {"features": Path("f")}, {}, ["features"]),
        ("bleu", {"images": ImageConfig(aspect_ratio="pad")}, {}, ["images.aspect_ratio"]),
        ("bleu", {"devices": ("cuda:0", "cuda:1")}, {}, ["device"]),
        ("bleu", {"devices": ("cpu", "cpu"), "threads": 2, "by_task": True, "max_length": 9}, {"label": "x"}, []),
        ("bleu", {}, {"metrics": ("exact_match",)}, []),
        ("bleu", {}, {"limit": 1}, ["sets.vqa.limit"]),
        ("bleu", {}, {"image_root": Path("other")}, ["sets.vqa.image_root"]),
        ("bleu", {}, {"max_new_tokens": 9}, ["sets.vqa.max_new_tokens"]),
        ("perplexity", {}, {"max_new_tokens": 9}, []),
        ("perplexity", {"max_length": 9}, {}, ["sets.vqa.max_length"]),
    ],
)
def test_what_predictions_depend_on(
    tmp_path: Path, metric: str, changes: dict[str, Any], of_set: dict[str, Any], differs: list[str]
) -> None:
    """These options and no others refuse to go on with what a folder has, by name."""
    (tmp_path / "config.json").write_text("{}")
    chosen = EvaluationSet("vqa", (), Path("images"), (metric,), 8)
    spec = EvaluationSpec(tmp_path, (chosen,), tmp_path / "out", 4, "fp32", ("cpu",), 1)
    other = replace(spec, **{"sets": (replace(chosen, **of_set),), **changes})
    records = [[Record("1", ("a.png",), (Turn("<image>q", "x"),), ())]]
    before, after = manifest.describe(spec, records), manifest.describe(other, records)
    assert [key for key in {**before, **after} if before.get(key) != after.get(key)] == differs
    if spec.features != other.features:
        assert manifest.describe(replace(other, features=Path("moved/f")), records) == after


def test_part_lines_hold_everything(tmp_path: Path) -> None:
    """A line is the dataclass, no more: what a restart reads back is what was there."""
    finished = Finished(0, [{"loss_sum": 0.1 + 0.2, "tokens": 3}], 1, 2, 3, 4.5, 6.5)
    with PartFile(tmp_path, 0) as part:
        part.append(finished)
    assert json.loads((tmp_path / "rank-0.jsonl").read_text()) == asdict(finished)
    assert collect(tmp_path, [Batch(0, (0,))]) == {0: finished}


def test_an_answer_with_line_separators_is_one_line_to_every_reader(tmp_path: Path) -> None:
    row = {"id": "1", "references": ["a"], "prediction": "a\u2028b\u0085c\x1cd\ne\r"}
    path = tmp_path / "evaluations/cotbal/test/vqa.jsonl"
    write_jsonl(path, [row, row | {"id": "2"}])
    assert read_predictions(path) == [row, row | {"id": "2"}]
    run = RunDirectory(tmp_path)
    assert run.predictions("cotbal", "test", "vqa") == [row, row | {"id": "2"}]
    assert run.damaged == []
