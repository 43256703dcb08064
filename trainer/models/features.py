"""Features of a frozen vision tower, computed once for every image and kept on disk as float16.

The encoder of a LLaVA is frozen (Liu et al. 2023), so its output for an image never changes: the trainings and
evaluations of Algorithm 1 would otherwise compute the same features 2N + 3 times and once per epoch.

Legend: P patches, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.pictures import open_image
from trainer.errors import UserError


class FeatureStore:
    """Read access to a folder written by :func:`write_features`: image path to ``[P, C]`` float32 features."""

    one_by_one = True

    def __init__(self, directory: Path) -> None:
        images = json.loads((directory / "images.json").read_text())
        self._row = {str(directory.parent / path): row for row, path in enumerate(images)}
        self._features = np.load(directory / "features.npy", mmap_mode="r")

    def __getitem__(self, path: Path) -> Tensor:
        row = self._row.get(str(path))
        if row is None:
            raise UserError(f"no cached features for image {path}; delete the run's features folder and run again")
        return torch.from_numpy(self._features[row].astype(np.float32))

    def of(self, paths: Sequence[Path]) -> list[Tensor]:
        """``[P, C]`` of each of several images."""
        return [self[path] for path in paths]

    def example(self) -> Tensor:
        """Features of some image, for their shape."""
        return torch.from_numpy(self._features[0].astype(np.float32))


def write_features(
    directory: Path,
    images: Sequence[Path],
    model: nn.Module,
    image_processor: Any,
    *,
    batch_size: int = 8,  # small batches stay in the cache of a CPU core
    workers: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs the vision tower over `images` and writes ``features.npy`` ``[images, P, C]`` and ``images.json``.

    Args:
        directory: written whole: the index comes last and marks the folder as complete.
        model: a vision tower whose ``last_hidden_state`` is ``[B, P, C]``.
        image_processor: gives ``pixel_values`` for PIL images.
        workers: batches at once. On a CPU, as many single-threaded workers as cores beat one that uses them all,
            since decoding and normalising then run in parallel too.
        progress: called with the number of images done.
    """
    directory.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch documents it

    def compute(start: int) -> tuple[int, np.ndarray]:
        pictures = [open_image(path) for path in images[start : start + batch_size]]
        pixels = image_processor(images=pictures, return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            features_BPC = model(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
        return start, features_BPC.to("cpu", torch.float16).numpy()

    store: np.memmap | None = None
    with ThreadPoolExecutor(workers) as pool:
        for start, features in pool.map(compute, range(0, len(images), batch_size)):
            if store is None:
                shape = (len(images), *features.shape[1:])
                store = np.lib.format.open_memmap(directory / "features.npy", "w+", np.float16, shape)
            store[start : start + len(features)] = features
            progress(start + len(features))
    if store is not None:
        store.flush()
    partial = directory / "images.json.partial"
    # Images of the run's own folder are moved with it.
    run = directory.parent
    paths = [path.relative_to(run) if path.is_relative_to(run) else path for path in images]
    partial.write_text(json.dumps(list(map(str, paths))))
    partial.replace(directory / "images.json")
