"""Models that are named as on the Hugging Face hub: ``NAME``, or ``NAME@REVISION`` with a branch, a tag or a commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

from trainer.errors import UserError
from trainer.files import write_json
from trainer.models.weights import FORMATS, shards

# Many models lie there in several formats, of which transformers takes one.
_WEIGHTS = [
    f"*.{ending}"
    for ending in (
        "safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "onnx_data", "ot", "npz", "tflite",
    )
]  # fmt: skip


def model_folder(path: str, *, weights: bool = False, local_only: bool = False) -> Path:
    """The folder of a model on this machine; one of the hub is downloaded into the hub's cache if it is not there.

    Args:
        path: a folder, which is returned as it is, or a name as above.
        weights: download the weights too, in the format that transformers would take; else what is beside them.
        local_only: take what is on this machine and ask no hub.

    Raises:
        UserError: there is none, or the hub does not give it.
    """
    if Path(path).is_dir():
        return Path(path)
    folder = _snapshot(path, local_only, without=_WEIGHTS)
    if not weights:
        return folder
    commit = f"{path.partition('@')[0]}@{folder.name}"  # a branch may move meanwhile
    for whole, index in FORMATS:
        files = shards(folder / index) if (folder / index).is_file() else [whole]
        _snapshot(commit, local_only, only=files)
        if (folder / files[0]).is_file():
            break
    return folder


def pinned(path: str, record: Path) -> str:
    """The model that `path` was when this was asked first, so that all trainings of a run start from the same one.

    Args:
        path: a folder, which is returned as it is, or a name as above.
        record: JSON file that keeps the answers.

    Returns:
        ``NAME@COMMIT``.

    Raises:
        UserError: as :func:`model_folder`.
    """
    if Path(path).is_dir():
        return path
    known: dict[str, str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if path not in known:
        commit = model_folder(path).name  # snapshots/COMMIT of the cache
        known[path] = f"{path.partition('@')[0]}@{commit}"
        write_json(record, known)
    return known[path]


class _NoBar(tqdm):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"disable": True})


def _snapshot(path: str, local_only: bool, only: list[str] | None = None, without: list[str] | None = None) -> Path:
    name, _, revision = path.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=only,
                ignore_patterns=without,
                local_files_only=local_only,
                tqdm_class=None if only else _NoBar,  # small files, and everybody asks for them
            )
        )
    except HFValidationError as error:
        raise UserError(f"model.path '{path}': no such folder, and no name on a hub could be '{name}'") from error
    except GatedRepoError as error:
        raise UserError(
            f"model.path '{path}': the hub gives '{name}' only to those who have accepted its terms; accept them on "
            "its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"model.path '{path}': '{name}' has no branch, tag or commit '{revision}' on the hub"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model.path '{path}': no such folder, and the hub has no model '{name}'; if it is a private one, log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        where = "on this machine" if local_only else "on this machine, and the hub cannot be reached"
        raise UserError(
            f"model.path '{path}': no such folder, nor a downloaded model of that name {where} "
            f"({' '.join(str(error).split())})"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model.path '{path}': it could not be downloaded ({' '.join(str(error).split())}); the same command goes "
            "on with what is there"
        ) from error
