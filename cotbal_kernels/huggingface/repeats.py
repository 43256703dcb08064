"""Samples that an epoch has had already, with which accelerate fills the last batch of several processes up.

Eq. 2 counts every supervised token of a step once: repeated samples stay in the batch, so that all processes take the
same steps, and lose their labels.
"""

import copy
from typing import Any

from torch import Tensor


def without_repeated_labels(batch: Any, loader: Any, ignore_index: int) -> Any:
    """``batch`` that ``loader`` has just yielded on this process, with repeated samples unsupervised.

    Where it is known which those are: data sets with a length, and the batches that process 0 dispatches. Not known:
    an iterable data set that every process reads for itself, "batch_rebalance".

    Args:
        batch: mapping with ``labels`` or ``shift_labels``, one row per sample; not changed.
        loader: accelerate's data loader, or anything else, which repeats nothing that is known of.

    Raises:
        ValueError: rows are not samples, and a batch will be repeated in part.
    """
    from accelerate.data_loader import DataLoaderDispatcher

    labels: dict[str, Tensor] = {
        name: batch[name] for name in ("labels", "shift_labels") if batch.get(name) is not None
    }
    if not labels:
        return batch
    rows = len(next(iter(labels.values())))
    if isinstance(loader, DataLoaderDispatcher):
        if not loader.end_of_dataloader:
            return batch
        own, samples, process = loader.remainder, rows, loader.state.process_index
    else:
        shard = _batch_sampler_shard(loader)
        if shard is None:
            return batch
        own, samples, process = _last_samples(shard), shard.batch_size, shard.process_index
        if shard.split_batches:
            samples //= shard.num_processes
        if own % samples and rows != samples:  # in every batch, so that it shows before anything is trained
            raise ValueError(
                f"labels must have one row for each of the {samples} samples of a batch, got {rows}: the last batch of "
                "an epoch repeats samples, which must not count twice. Set dataloader_drop_last=True, or cut the data "
                f"set to a multiple of {samples * shard.num_processes} samples"
            )
        if not loader.end_of_dataloader:
            return batch
    first = max(0, own - process * samples)
    if first >= samples:
        return batch
    changed = copy.copy(batch)
    for name, some in labels.items():
        changed[name] = some.clone()
        changed[name][first:] = ignore_index
    return changed


def _batch_sampler_shard(loader: Any) -> Any:
    """accelerate's ``BatchSamplerShard`` if it repeats samples here; a resumed epoch has wrapped it."""
    from accelerate.data_loader import BatchSamplerShard

    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, BatchSamplerShard):
        sampler = getattr(sampler, "batch_sampler", None)
    if sampler is None or sampler.drop_last or not sampler.even_batches or sampler.batch_size is None:
        return None
    return sampler if _last_samples(sampler) else None


def _last_samples(shard: Any) -> int:
    """How many samples of the last batches of all processes are their own; 0 if all are, or nobody knows."""
    together = shard.batch_size * (1 if shard.split_batches else shard.num_processes)
    samples: Any = getattr(shard.batch_sampler, "sampler", None)
    return len(samples) % together if hasattr(samples, "__len__") else 0
