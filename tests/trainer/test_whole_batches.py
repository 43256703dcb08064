"""The samples of every optimizer step, through the loaders that accelerate makes for each process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from tiny_training import make_trainer
from torch.utils.data import DataLoader

from trainer.data.encoding import Encoded
from trainer.data.whole_batches import RandomOrder, WholeBatches

SEED, SAMPLES, STEP = 5, 21, 8


def loader(world: int, rank: int, batch: int) -> Any:
    samples: Any = [{"encoded": Encoded([number], [number])} for number in range(SAMPLES)]
    data = WholeBatches(samples, world * batch if world > 1 else 1)
    plain = DataLoader(data, batch_size=batch, sampler=RandomOrder(data, SEED), collate_fn=list)
    return prepare_data_loader(
        plain, num_processes=world, process_index=rank, put_on_device=False, use_seedable_sampler=True
    )


def steps(loaders: list[Any], epoch: int, micro_batches: int) -> list[set[int]]:
    """Samples with a loss in every step, over all processes."""
    by_rank = []
    for own in loaders:
        own.set_epoch(epoch)
        by_rank.append(list(own))
    assert len({len(batches) for batches in by_rank}) == 1, "a process waits for another"
    found = []
    for start in range(0, len(by_rank[0]), micro_batches):
        rows = [row for batches in by_rank for batch in batches[start : start + micro_batches] for row in batch]
        real = [row["encoded"].labels[0] for row in rows if row["encoded"].labels[0] >= 0]
        assert len(set(real)) == len(real)
        found.append(set(real))
    return found


@pytest.mark.parametrize(("world", "batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_a_step_has_the_same_samples_however_it_is_spread(world: int, batch: int) -> None:
    """Two epochs of 8, 8 and 5 samples, and a training that goes on behind the first step of the second one."""
    micro_batches = STEP // (world * batch)
    loaders = [loader(world, rank, batch) for rank in range(world)]
    for epoch in range(2):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        expected = [set(order[start : start + STEP]) for start in range(0, SAMPLES, STEP)]
        assert steps(loaders, epoch, micro_batches) == expected
    resumed = [skip_first_batches(loader(world, rank, batch), micro_batches) for rank in range(world)]
    assert steps(resumed, 1, micro_batches) == expected[1:]


def test_a_trainer_takes_its_seed_s_order(tmp_path: Path) -> None:
    """Of its own data set, or of one that it is given; what is behind the samples stays behind them."""
    trainer = make_trainer("ew", tmp_path, seed=SEED)
    data = WholeBatches(trainer.train_dataset, 7)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(SEED)).tolist()
    sampler = trainer._get_train_sampler(data)
    assert sampler is not None
    assert list(sampler) == [*order, 24, 25, 26, 27]
    trainer.train_dataset = data
    own = trainer._get_train_sampler()
    assert own is not None
    assert list(own) == [*order, 24, 25, 26, 27]
