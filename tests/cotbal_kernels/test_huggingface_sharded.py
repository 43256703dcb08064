"""A patched model under ZeRO-1, 2, 3 and FSDP2 on one and two ranks equals one process after three optimizer steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from sharded_models import KINDS, LENGTH, ROWS, STEPS, VOCABULARY, load, save_models, sgd
from torch import Tensor

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

from sharded_worker import on_rank  # noqa: E402

# Parameters of order one in float32, rounded in each of three steps (6e-8 each) on top of sums in another order.
TOLERANCE = 5e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a batch of three steps: 24 rows of three tasks, some without any supervised token."""
    directory = tmp_path_factory.mktemp("sharded")
    save_models(directory)
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    supervised = torch.randint(0, LENGTH, (ROWS,), generator=generator)
    supervised[2:4] = 0  # a whole micro-batch of one rank, when there are two
    labels = torch.where(torch.arange(LENGTH) >= LENGTH - supervised[:, None], input_ids, -100)
    torch.save(
        {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": labels,
            "loss_task_ids": torch.randint(0, 3, (ROWS,), generator=generator),
            "task_weights": torch.tensor([0.5, 1.75, 0.75]),
        },
        directory / "batch.pt",
    )
    return directory


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Parameters before and after, of the unpatched model in float64 with Eq. 2 written out over all rows of a step."""
    batch = torch.load(folder / "batch.pt")
    found = {}
    for kind in KINDS:
        model = load(folder, kind, torch.float64)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = sgd(model)
        for step in range(STEPS):
            rows = {key: value.chunk(STEPS)[step] for key, value in batch.items() if key != "task_weights"}
            logits = model(input_ids=rows["input_ids"]).logits[:, :-1]
            targets = rows["labels"][:, 1:]
            entropy = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            weight = batch["task_weights"].double()[rows["loss_task_ids"]][:, None] * (targets != -100)
            optimizer.zero_grad()
            ((weight * entropy).sum() / weight.sum()).backward()
            optimizer.step()
        found[kind] = before, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Parameters after the three steps, by engine and kind."""
    return run_on_ranks(partial(on_rank, folder), request.param, tmp_path_factory.mktemp("ranks"))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"])
def test_equals_one_process(
    engine: str,
    kind: str,
    trained: dict[tuple[str, str], dict[str, Tensor]],
    expected: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]],
) -> None:
    before, after = expected[kind]
    found = trained[engine, kind]
    assert set(found) == set(after)
    for name, wanted in after.items():
        assert (wanted - before[name]).abs().max() > 5e-3, f"{name} hardly moved: nothing is shown"
        difference = (found[name].double() - wanted).abs().max().item()
        assert difference < TOLERANCE, f"{name} is off by {difference:.1e}"
