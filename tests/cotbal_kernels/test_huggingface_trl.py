"""TRL's ``SFTTrainer`` with task weights, beside TRL's own loss and beside Eq. 2 in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", reason="TRL is not among the tests' packages: it would slow the start of every process")

from datasets import Dataset
from hf_models import build, one_thread  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from cotbal_kernels.huggingface import apply_fused_loss
from cotbal_kernels.huggingface.trl import TaskIdCollator, TaskWeightedSFTTrainer
from cotbal_kernels.reference import reference_task_cross_entropy

LAM = [1.7, 0.2, 0.9]
ROWS = 16


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{word}": word + 4 for word in range(70)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def data() -> Dataset:
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        return " ".join(f"w{int(word)}" for word in torch.randint(0, 70, (count,), generator=generator))

    return Dataset.from_list(
        [{"prompt": words(5), "completion": " " + words(2 + row % 7), "loss_task_ids": row % 3} for row in range(ROWS)]
    )


def config(path: Path, **changes: Any) -> SFTConfig:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2,
        "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", "seed": 3, "optim": "sgd",
        "max_grad_norm": 0.0,
    }  # fmt: skip
    return SFTConfig(output_dir=str(path), **options | changes)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_weights_of_one_are_trls_own_loss(tmp_path: Path) -> None:
    plain = SFTTrainer(model=build("llama"), args=config(tmp_path), train_dataset=data(), processing_class=tokenizer())
    ours = TaskWeightedSFTTrainer(
        task_weights=[1.0] * 3, model=build("llama"), args=config(tmp_path), train_dataset=data(),
        processing_class=tokenizer(),
    )  # fmt: skip
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)


def test_eq_2_over_the_steps(tmp_path: Path) -> None:
    """Each step's loss and the parameters after it, against a loop by hand over the batches that came."""
    seen: list[dict[str, torch.Tensor]] = []
    trainer = TaskWeightedSFTTrainer(
        task_weights=LAM, task_names=["a", "b", "c"], model=build("llama"), args=config(tmp_path),
        train_dataset=data(), eval_dataset=data(), processing_class=tokenizer(),
    )  # fmt: skip
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collator(rows)) or seen[-1]
    found = losses(trainer)

    model = build("llama").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step, loss in enumerate(found):
        window = seen[2 * step : 2 * step + 2]
        assert all(set(batch["loss_task_ids"].tolist()) <= {0, 1, 2} for batch in window)
        parts = [
            reference_task_cross_entropy(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"],
                batch["loss_task_ids"], torch.tensor(LAM), shift=True, aggregation="none",
            ).loss
            for batch in window
        ]  # fmt: skip
        weights = sum(
            float(((batch["labels"][:, 1:] != -100) * torch.tensor(LAM)[batch["loss_task_ids"]][:, None]).sum())
            for batch in window
        )
        expected = sum(part.sum() for part in parts) / weights
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    difference = max(
        float((a - b).abs().max()) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True)
    )
    assert difference < 1e-6
    metrics = trainer.evaluate()
    tokens = {name: metrics[f"eval_task_tokens/{name}"] for name in "abc"}
    assert sum(tokens.values()) == sum(2 + row % 7 + 1 for row in range(ROWS))  # the completions and their ends


def test_rows_without_a_task(tmp_path: Path) -> None:
    seen: list[Any] = []
    collator = TaskIdCollator(lambda rows: seen.append(rows) or {"input_ids": len(rows)})
    assert collator([{"a": 1, "loss_task_ids": 2}, {"a": 3, "loss_task_ids": 0}])["loss_task_ids"].tolist() == [2, 0]
    for row in ({"a": 1}, {"a": 1, "loss_task_ids": None}):
        assert collator([row, row]) == {"input_ids": 2}
    assert all(row.keys() == {"a"} for rows in seen for row in rows)
    with pytest.raises(ValueError, match="1 of 2 rows of a batch have no loss_task_ids: give every part"):
        collator([{"loss_task_ids": None}, {"loss_task_ids": 1}])
    trainer = TaskWeightedSFTTrainer(
        task_weights=LAM, model=build("llama"), args=config(tmp_path), processing_class=tokenizer(),
        train_dataset=data().remove_columns("loss_task_ids"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="3 task weights and the batch no loss_task_ids"):
        trainer.train()


def test_with_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = TaskWeightedSFTTrainer(
        task_weights=LAM, model=build("llama"), args=config(tmp_path), train_dataset=data(),
        processing_class=tokenizer(), peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    plain = TaskWeightedSFTTrainer(
        task_weights=LAM, model=build("llama"), args=config(tmp_path), train_dataset=data(),
        processing_class=tokenizer(),
    )  # fmt: skip
    assert losses(trainer)[0] == pytest.approx(losses(plain)[0], rel=1e-6)  # adapters begin at zero


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, "packing and padding_free of SFTConfig join samples"),
        ({"padding_free": True}, "packing and padding_free of SFTConfig join samples"),
        ({"loss_type": "dft"}, "loss_type='dft' of SFTConfig is another loss"),
        ({"use_liger_kernel": True}, "use_liger_kernel of SFTConfig brings a loss without task weights"),
    ],
)
def test_options_that_lose_the_tasks(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskWeightedSFTTrainer(task_weights=LAM, model=build("llama"), args=config(tmp_path, **changes))


def test_trl_alone_does_not_drop_the_weights_silently(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=apply_fused_loss(build("llama"), LAM), args=config(tmp_path), train_dataset=data(),
        processing_class=tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="TaskWeightedSFTTrainer"):
        trainer.train()
