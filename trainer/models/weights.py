"""Whether the files of a model folder hold the weights of the model that its config.json describes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from trainer.errors import UserError, listed

# A file of weights and an index of several, as transformers looks for them.
FORMATS = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, pickle.PickleError)


def check_weights(folder: Path, config: Any, model: Any) -> None:
    """Opens the files of a folder for the names and shapes of its weights, and has transformers look for the model's.

    Nothing is read but the headers of files.

    Args:
        config: the folder's configuration.
        model: the class that makes the model of it.

    Raises:
        UserError: a file is missing or damaged, or they are not the weights of the model.
    """
    weights: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            weights |= _empty(file)
        except _DAMAGED as error:
            raise UserError(
                f"{file} cannot be read: {' '.join(str(error).split())}; copy or download the file again"
            ) from error
    options = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        _, found = model.from_pretrained(None, config=config, state_dict=weights, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model.path '{folder}': no model could be loaded ({' '.join(str(error).split())})") from error
    refuse_missing(str(folder), found)
    if other := [f"{name} {[*there]} for {[*wanted]}" for name, there, wanted in sorted(found["mismatched_keys"])]:
        raise UserError(
            f"model.path '{folder}': its weights have other shapes than its config.json says: {listed(other, 3)}"
        )


def refuse_missing(path: str, found: dict[str, Any]) -> None:
    """Refuses weights that no file has: transformers would start them from random values, and go on.

    Args:
        found: what ``from_pretrained`` returns for ``output_loading_info``.

    Raises:
        UserError: there are any.
    """
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model.path '{path}': its files have no weights for {listed(missing, 3)}, which would start from random "
            "values; is it the folder of another model than its config.json says? Where they are meant to be new, "
            "load it with transformers and give the folder that save_pretrained writes"
        )


def shards(index: Path) -> list[str]:
    """The names of the files that an index names.

    Raises:
        UserError: it is none.
    """
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except _DAMAGED as error:
        raise UserError(f"{index} is no index of weights: {error}; download the file again") from error


def _files(folder: Path) -> list[Path]:
    """The files of weights that transformers would take, all of those that an index names."""
    for whole, index in FORMATS:
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            names = shards(folder / index)
            if gone := [name for name in names if not (folder / name).is_file()]:
                raise UserError(f"{folder} lacks {listed(gone)}, of {len(names)} files that its {index} names")
            return [folder / name for name in names]
    raise UserError(f"model.path '{folder}': it has no weights, neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


def _empty(file: Path) -> dict[str, Tensor]:
    """Tensors of the names and shapes in a file, without memory."""
    if file.suffix != ".safetensors":
        return dict(torch.load(file, map_location="meta", mmap=True, weights_only=True))
    with safe_open(file, "pt") as opened:
        names = opened.keys()
        return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
