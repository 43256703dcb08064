"""docs/swap_in.md: its scripts run as printed, its table names what is tested, its arithmetic is right."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from hf_models import MODELS, build, one_thread  # noqa: E402, F401
from test_huggingface_architectures import SCALINGS  # noqa: E402
from test_huggingface_trainer import arguments, collate, records  # noqa: E402

from cotbal_kernels.huggingface import apply_fused_loss  # noqa: E402
from cotbal_kernels.triton_kernels import head as triton_head  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "swap_in.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def rows(header: str) -> list[list[str]]:
    table = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """What a user's script has already."""
    build("llama").save_pretrained(tmp_path / "model")
    data = records(40)

    def text_collate(batch: Any) -> dict[str, torch.Tensor]:
        return {name: value for name, value in collate(batch).items() if name != "loss_task_ids"}

    return {
        "path": str(tmp_path / "model"),
        "args": arguments(tmp_path, 2, 4),
        "dataset": data,
        "collate": text_collate,
        "windows": [[collate(data[first : first + 2]) for first in range(at, at + 8, 2)] for at in range(0, 40, 8)],
        "world_size": 1,
    }


def run(block: str, given: dict[str, Any]) -> dict[str, Any]:
    names = dict(given)
    exec(block, names)
    return names


def test_the_trainer_scripts(given: dict[str, Any]) -> None:
    before, fused, weighted = (run(block, given) for block in BLOCKS[:3])
    a, b = ([log["loss"] for log in names["trainer"].state.log_history[:5]] for names in (before, fused))
    assert a == pytest.approx(b, rel=1e-5)
    assert {"task_loss/vqa", "task_weight/chat"} <= set().union(*weighted["trainer"].state.log_history)
    assert "eval_task_loss/vqa" in weighted["metrics"]


def test_the_loop(given: dict[str, Any]) -> None:
    """The same training as the Trainer's, in order and with plain SGD."""
    model = build("llama").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    names = run(BLOCKS[3], given | {"model": model, "optimizer": optimizer})
    assert names["mean_loss"].shape == (3,)
    moved = [float((p - q).abs().max()) for p, q in zip(model.parameters(), build("llama").parameters(), strict=True)]
    assert max(moved) > 0.01


def test_fsdp(given: dict[str, Any]) -> None:
    """One rank in bfloat16: the normaliser stays float32, and without the page's policy it is refused."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        batch = collate(given["dataset"][:3])
        normalizer = torch.tensor(259.0)  # bfloat16 has 258 and 260
        sharded = run(BLOCKS[5], {"model": build("llama").train(), "mesh": mesh, "torch": torch})["model"]
        plain = apply_fused_loss(build("llama").train().bfloat16(), task_weights=[1.3, 0.6, 1.1])
        expected = plain(**batch, num_items_in_batch=normalizer).loss
        # The same bfloat16 products: only what FSDP leaves in float32 on the way differs, not 1 in 259.
        assert float(sharded(**batch, num_items_in_batch=normalizer).loss) == pytest.approx(float(expected), rel=1e-3)
        unsafe = BLOCKS[5].replace(", cast_forward_inputs=False", "")
        sharded = run(unsafe, {"model": build("llama").train(), "mesh": mesh, "torch": torch})["model"]
        with pytest.raises(ValueError, match=r"num_items_in_batch came in torch.bfloat16.*cast_forward_inputs=False"):
            sharded(**batch, num_items_in_batch=normalizer)
    finally:
        dist.destroy_process_group()


def test_the_other_blocks(given: dict[str, Any]) -> None:
    deepspeed, _, lora = BLOCKS[4:]
    assert run(deepspeed, {})["arguments"]["deepspeed"]["gradient_clipping"] == 1.0
    model = run(lora, {"model": build("llama")})["model"]
    batch = collate(given["dataset"][:3])
    out = model(**batch)
    assert out.logits is None
    assert out.task_loss.shape == (3,)


def test_the_table_is_the_list_of_tests() -> None:
    printed = dict(rows("| model | between head and loss |"))
    assert list(printed) == [type(build(kind)).__name__ for kind in MODELS]
    for kind, (scale, softcap) in SCALINGS.items():
        words = printed[type(build(kind)).__name__]
        assert ("factor" in words) == (scale != 1 or kind == "aya_vision"), kind
        assert ("soft-cap" in words) == (softcap is not None), kind


def test_the_arithmetic() -> None:
    positions, vocabulary, width = 8192, 128256, 4096
    logits = positions * vocabulary
    workspace = triton_head.WORKSPACE_BYTES / 1e9
    hidden, weight = positions * width * 2 / 1e9, vocabulary * width * 2 / 1e9
    assert logits * 2 / 1e9 == pytest.approx(2.10, abs=5e-3)
    assert logits * 4 / 1e9 == pytest.approx(4.20, abs=5e-3)
    assert logits * 10 / 1e9 == pytest.approx(10.51, abs=5e-3)
    assert (workspace, hidden, weight) == pytest.approx((0.54, 0.07, 1.05), abs=5e-3)
    assert workspace + hidden + weight == pytest.approx(1.65, abs=5e-3)
    assert workspace + hidden == pytest.approx(0.60, abs=5e-3)
    for number in ("2.10", "4.20", "10.51", "0.54", "0.07", "1.05", "1.65", "0.60"):
        assert f"{number} GB" in PAGE


def test_every_block_parses() -> None:
    assert len(BLOCKS) == 7
    for block in BLOCKS:
        ast.parse(block)
