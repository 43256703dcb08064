"""Which validation records a method gets in an update: all of them in turn, the same on any number of ranks."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from typing import Any

import pytest
import torch
from tiny_training import collate, collate_all, validation_batches

from trainer.data.ahead import made_ahead
from trainer.loop.validation import ValidationBatches


class TestValidationBatches:
    def test_every_record_once_per_pass_and_every_task_in_every_update(self) -> None:
        batches = validation_batches(per_task=3)  # 8 records a task: passes do not end with an update
        drawn = [batches.drawn(u) for u in range(8)]
        for task in (0, 1):
            records = [record for update in drawn for k, record in update if k == task]
            assert all(sum(k == task for k, _ in update) == 3 for update in drawn)
            for turn in range(3):
                assert sorted(records[8 * turn : 8 * turn + 8]) == list(range(8))
            assert records[:8] != records[8:16]
        assert batches.batches_per_pass == 3
        assert ValidationBatches([2, 8, 3], None, None, per_task=3, batch_size=1, seed=0).batches_per_pass == 3  # type: ignore[arg-type]

    def test_depends_on_the_seed_and_the_update_only(self) -> None:
        forward, backward = validation_batches(), validation_batches()
        expected = [forward.drawn(u) for u in range(12)]
        assert [backward.drawn(u) for u in reversed(range(12))] == expected[::-1]
        assert validation_batches(rank=1, world=2).drawn(7) == expected[7]

    def test_orders_are_made_once_and_kept_no_longer_than_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []
        shuffle = random.Random.shuffle
        monkeypatch.setattr(random.Random, "shuffle", lambda own, x: made.append(len(x)) or shuffle(own, x))
        batches = ValidationBatches([2, 8], None, None, per_task=2, batch_size=1, seed=0)  # type: ignore[arg-type]
        for update in range(20):
            batches.drawn(update)
            batches.drawn(max(0, update - 1))  # as where losses are measured again
        assert sorted(made) == [2] * 20 + [8] * 5
        assert len(batches._orders) <= 2 * 2

    def test_another_process_makes_those_to_come(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In any order that they are asked for; what is random in a training stays as it was."""
        begun: list[int] = []

        def noted_start(make: Any, updates: Any, *options: Any) -> Any:
            begun.append(updates[0])
            return made_ahead(make, updates, *options)

        monkeypatch.setattr("trainer.loop.validation.made_ahead", noted_start)
        here, calls = os.getpid(), []
        before = set(multiprocessing.active_children())

        def noted(rows: Any) -> dict[str, torch.Tensor]:
            calls.append(rows)
            return collate(rows) | {"process": torch.tensor(os.getpid())}

        expected, ahead = validation_batches(), validation_batches(ahead=True)
        ahead._collate = noted
        state = torch.get_rng_state()
        for update in (0, 0, 1, 2, 5, 6):
            for found, wanted in zip(ahead(update), expected(update), strict=True):
                assert found.pop("process") != here
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[key], wanted[key]) for key in wanted)
                found["process"] = torch.tensor(-1)  # it comes again from memory
        assert torch.equal(torch.get_rng_state(), state)
        assert not calls
        assert begun == [0, 5]  # one process for as long as updates follow each other
        ahead.close()
        deadline = time.monotonic() + 20  # DataLoader ends one that is slow to stop, and does not wait for it then
        while (left := set(multiprocessing.active_children()) - before) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left
        plain = validation_batches()
        assert plain(3) is plain(3)  # FAMO* asks again

    @pytest.mark.parametrize("initial", [False, True])
    @pytest.mark.parametrize("world", [1, 2, 3, 7])
    def test_ranks_share_a_batch_without_gaps_and_are_equally_long(
        self, world: int, initial: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An update, and the five first records of each task (of 256 that are wanted, eight are there)."""

        def batches(**ranks: int) -> list[dict[str, torch.Tensor]]:
            drawing = validation_batches(per_task=2, **ranks)
            return list(drawing.initial()) if initial else drawing(3)

        assert sum(len(batch["labels"]) for batch in validation_batches().initial()) == 16
        monkeypatch.setattr("trainer.loop.validation.INITIAL_RECORDS", 5)
        shares = [batches(rank=rank, world=world) for rank in range(world)]
        assert len({tuple(len(batch["labels"]) for batch in share) for share in shares}) == 1
        rows = [
            (tokens.tolist(), labels.tolist())
            for share in shares
            for batch in share
            for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            if (labels != -100).any()
        ]
        whole = collate_all(validation_batches(per_task=5)(0) if initial else validation_batches(per_task=2)(3))
        expected = zip(whole["input_ids"].tolist(), whole["labels"].tolist(), strict=True)
        assert sorted(rows) == sorted((tokens, labels) for tokens, labels in expected)
