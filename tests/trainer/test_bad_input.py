"""Bad input: one clear sentence that names the task and the record, before any training process starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import change_record, longer
from PIL import Image
from transformers import BlipConfig

from trainer.config import parse_config
from trainer.errors import UserError
from trainer.models.loading import load_processor
from trainer.pipeline import preflight
from trainer.pipeline.algorithm1 import Pipeline
from trainer.pipeline.preflight import check_config, check_model

Write = Callable[[dict[str, Any]], Path]


def unknown_metric(data: dict[str, Any], folder: Path) -> None:
    data["tasks"][1]["metric"] = "accuracy_uoi"


def missing_image(data: dict[str, Any], folder: Path) -> None:
    (folder / "images" / "box_validation_2.png").unlink()


def truncated_image(data: dict[str, Any], folder: Path) -> None:
    path = folder / "images" / "colour_train_5.png"
    path.write_bytes(path.read_bytes()[:-30])


def text_as_image(data: dict[str, Any], folder: Path) -> None:
    (folder / "images" / "colour_test_1.png").write_text("no image")


def image_outside(data: dict[str, Any], folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder.parent / "secret.png")
    change_record(folder, "box_train", 3, lambda row: row.update(image="../secret.png"))


def absolute_image_outside(data: dict[str, Any], folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder.parent / "secret.png")
    change_record(folder, "box_train", 3, lambda row: row.update(image=str(folder.parent / "secret.png")))


def empty_answer(data: dict[str, Any], folder: Path) -> None:
    change_record(folder, "colour_train", 6, lambda row: row["conversations"][1].update(value=" "))


def rate_of_a_frozen_part(data: dict[str, Any], folder: Path) -> None:
    data["training"]["learning_rates"] = {"multi_modal_projector": 1e-5, "vision_tower": 1e-6}


def rate_of_a_part_that_lora_leaves_alone(data: dict[str, Any], folder: Path) -> None:
    data["model"]["lora"] = {"train_whole": ["multi_modal_projector"]}
    data["training"]["learning_rates"] = {"multi_modal_projector": 1e-5, "lora_B": 1e-3, "embed_tokens": 1e-6}


def two_rates_of_a_parameter(data: dict[str, Any], folder: Path) -> None:
    data["training"]["learning_rates"] = {"projector": 1e-5, "linear_1": 1e-6}


def unknown_tracker(data: dict[str, Any], folder: Path) -> None:
    data["training"]["report_to"] = ["tensorboard", "wandbb"]


def tracker_that_is_not_installed(data: dict[str, Any], folder: Path) -> None:
    data["training"]["report_to"] = ["clearml"]


def answer_cut_off(data: dict[str, Any], folder: Path) -> None:
    change_record(folder, "chat_train", 6, lambda row: row["conversations"][0].update(value=200 * " what"))


def more_tokens_than_positions(data: dict[str, Any], folder: Path) -> None:
    data["model"]["max_length"] = 512


def misspelt_freeze(data: dict[str, Any], folder: Path) -> None:
    data["model"]["freeze"] = ["visoin"]


def weights_of_another_model(data: dict[str, Any], folder: Path) -> None:
    model = Path(shutil.copytree(data["model"]["path"], folder / "model"))
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": config["text_config"]["num_hidden_layers"] + 1, "layer_types": None}
    (model / "config.json").write_text(json.dumps(config))
    data["model"]["path"] = str(model)


def token_without_embedding(data: dict[str, Any], folder: Path) -> None:
    _retokenized(data, folder, "add_tokens")
    _ask(folder / "colour_train.jsonl", "<new>")


def token_without_embedding_in_a_test(data: dict[str, Any], folder: Path) -> None:
    _retokenized(data, folder, "add_tokens")
    _ask(folder / "box_test.jsonl", "<new>")


def padding_without_embedding(data: dict[str, Any], folder: Path) -> None:
    _retokenized(data, folder, "add_special_tokens")


def _ask(path: Path, more: str) -> None:
    first, *rest = path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row["conversations"][0]["value"] += more
    path.write_text("".join([json.dumps(row) + "\n", *rest]))


def _retokenized(data: dict[str, Any], folder: Path, method: str) -> None:
    model = Path(shutil.copytree(data["model"]["path"], folder / "model"))
    processor = load_processor(str(model))
    getattr(processor.tokenizer, method)(["<new>"] if method == "add_tokens" else {"pad_token": "<pad more>"})
    processor.save_pretrained(model)
    data["model"]["path"] = str(model)


def freeze_of_everything(data: dict[str, Any], folder: Path) -> None:
    data["model"]["freeze"] = ["model.", "lm_head"]


def perplexity(data: dict[str, Any], folder: Path) -> None:
    data["tasks"][0]["metric"] = "perplexity"


def long_validation_under_perplexity(data: dict[str, Any], folder: Path) -> None:
    perplexity(data, folder)
    change_record(folder, "colour_validation", 2, longer)


def long_test_under_perplexity(data: dict[str, Any], folder: Path) -> None:
    perplexity(data, folder)
    change_record(folder, "colour_test", 1, longer)


def long_validation_for_a_method_that_trains_on_it(data: dict[str, Any], folder: Path) -> None:
    data["comparisons"] = ["famo_star"]
    change_record(folder, "colour_validation", 2, longer)


def images_that_do_not_fit(data: dict[str, Any], folder: Path) -> None:
    images = 40  # of four tokens each

    def change(row: dict[str, Any]) -> None:
        row["image"] = [row["image"]] * images
        row["conversations"][0]["value"] = "<image>" * images

    change_record(folder, "box_train", 7, change)


def empty_validation(data: dict[str, Any], folder: Path) -> None:
    (folder / "box_validation.jsonl").write_text("\n")


def two_questions_to_score(data: dict[str, Any], folder: Path) -> None:
    more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}]
    change_record(folder, "box_test", 0, lambda row: row["conversations"].extend(more))


def words_in_place_of_boxes(data: dict[str, Any], folder: Path) -> None:
    data["tasks"][0] |= {"metric": "accuracy_iou", "test_metrics": ["exact_match"]}


def one_annotator(data: dict[str, Any], folder: Path) -> None:
    data["tasks"][0]["test_metrics"] = ["exact_match", "vqa_accuracy"]


def missing_file(data: dict[str, Any], folder: Path) -> None:
    (folder / "box_train.jsonl").unlink()


def no_model(data: dict[str, Any], folder: Path) -> None:
    data["model"]["path"] = str(folder / "images")


def model_without_its_tokenizer(data: dict[str, Any], folder: Path) -> None:
    model = Path(shutil.copytree(data["model"]["path"], folder / "model"))
    (model / "tokenizer.json").unlink()
    data["model"]["path"] = str(model)


def no_gpu(data: dict[str, Any], folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so asking for one is no mistake")
    data["launch"]["device"] = "cuda"


BAD = [
    (unknown_metric, ["tasks.1.metric: unknown metric 'accuracy_uoi' (did you mean 'accuracy_iou'?)"]),
    (missing_image, ["task 'box', validation record 'box-validation-2': ", "box_validation_2.png does not exist"]),
    (truncated_image, ["task 'colour', train record 'colour-train-5': image ", "cannot be decoded: "]),
    (text_as_image, ["task 'colour', test record 'colour-test-1': image ", "cannot be decoded: "]),
    (image_outside, ["task 'box', train record 'box-train-3': image ", "secret.png is outside the task's image_root"]),
    (absolute_image_outside, ["task 'box', train record 'box-train-3': ", "is outside the task's image_root"]),
    (empty_answer, ["colour_train.jsonl, line 7 (id 'colour-train-6'): no supervised token: every gpt turn is empty"]),
    (answer_cut_off, ["task 'chat', train set ", "chat_train.jsonl: record 'chat-train-6': no supervised token with"]),
    (images_that_do_not_fit, ["task 'box', train set ", " record 'box-train-7': its images", "model.max_length = 128"]),
    (long_validation_under_perplexity, ["task 'colour', validation set ", "colour_validation.jsonl: record "
     "'colour-validation-2': its images and the text around them need", "more than model.max_length = 128; raise max"]),
    (long_test_under_perplexity, ["task 'colour', test set ", "colour_test.jsonl: record 'colour-test-1': its images"]),
    (long_validation_for_a_method_that_trains_on_it, ["task 'colour', validation set ", "'colour-validation-2': its "]),
    (more_tokens_than_positions, ["model.max_length = 512 is more than the 256 positions that '", "lower it"]),
    (weights_of_another_model, ["model': its files have no weights for model.language_model.layers."]),
    (
        token_without_embedding,
        ["'colour-train-0': the tokenizer gives '<new>' (", "), and the model has embeddings of "],
    ),
    (token_without_embedding_in_a_test, ["box_test.jsonl: record 'box-test-0': the tokenizer gives '<new>' ("]),
    (padding_without_embedding, ["the padding of batches: the tokenizer gives '<pad more>' ("]),
    (misspelt_freeze, ["model.freeze: no parameter of ", " has 'visoin' in its name"]),
    (freeze_of_everything, ["nothing would be trained: model.freeze and model.lora leave no parameter"]),
    (rate_of_a_frozen_part, ["training.learning_rates: no parameter that is trained has 'vision_tower' in its name"]),
    (rate_of_a_part_that_lora_leaves_alone, ["training.learning_rates: no parameter ", " 'embed_tokens' in its name"]),
    (two_rates_of_a_parameter, ["learning_rates: 'linear_1' and 'projector' are both in the name of model.multi_"]),
    (unknown_tracker, ["unknown tracker in training.report_to 'wandbb' (did you mean 'wandb'?); valid: "]),
    (tracker_that_is_not_installed, ["training.report_to: the package of 'clearml' is not installed"]),
    (empty_validation, ["task 'box': the validation set ", "box_validation.jsonl has no records"]),
    (two_questions_to_score, ["task 'box', test record 'box-test-0': scoring takes one question per record, got 2"]),
    (words_in_place_of_boxes, ["task 'colour', validation set ", "record 'colour-validation-0': its correct answer "
     "'red' itself scores 0 under accuracy_iou, and so do all others; docs/data.md says what accuracy_iou takes"]),
    (one_annotator, ["task 'colour', test set ", "record 'colour-test-0': references[0] has one answer; VQA accurac"]),
    (missing_file, ["record file ", "box_train.jsonl does not exist"]),
    (no_model, ["model.path '", "no processor could be loaded"]),
    (model_without_its_tokenizer, ["model.path '", "no processor could be loaded", "; the folder needs its tok"]),
    (no_gpu, ["launch.device is 'cuda' but torch sees no GPU here"]),
]  # fmt: skip


# One of a kind of check is enough for a command that makes the same ones.
TRAIN = {
    unknown_metric,
    missing_image,
    answer_cut_off,
    rate_of_a_frozen_part,
    long_validation_for_a_method_that_trains_on_it,
}


@pytest.mark.parametrize(
    ("command", "damage", "message"),
    [
        (command, damage, message)
        for command in ("run", "check", "train")
        for damage, message in BAD
        if command != "train" or damage in TRAIN
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_bad_input_on_the_command_line(
    command: str, damage: Callable[..., None], message: list[str], copied_run: dict[str, Any], data_copy: Path,
    write_config: Write, cotbal: Callable[..., Any],
) -> None:  # fmt: skip
    damage(copied_run, data_copy)
    output = ["--output", data_copy.parent / "one"] if command == "train" else []
    outcome = cotbal(command, write_config(copied_run), *output)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    told = outcome.err[outcome.err.index("cotbal: ") :].splitlines()
    assert len(told) == (2 if damage is unknown_metric else 1)  # a configuration's problems are a list
    for part in message:
        assert part in told[-1]
    assert not (Path(copied_run["output_dir"]) / "trainings").exists()
    assert not (data_copy.parent / "one" / "spec.json").exists()


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[damage.__name__ for damage, _ in BAD])
def test_bad_input_in_the_library(
    damage: Callable[..., None], message: list[str], copied_run: dict[str, Any], data_copy: Path
) -> None:
    damage(copied_run, data_copy)
    with pytest.raises(UserError) as caught:
        Pipeline(parse_config(copied_run, "x")).run()
    for part in message:
        assert part in str(caught.value)


def test_a_model_with_a_loss_of_its_own_is_found_before_it_is_loaded(
    copied_run: dict[str, Any], tmp_path: Path
) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BlipConfig(text_config=small, vision_config=small).save_pretrained(tmp_path)
    copied_run["model"] = {"path": str(tmp_path), "freeze": []}
    message = "cannot be trained with task weights: model BlipForConditionalGeneration computes its loss in a way of"
    with pytest.raises(UserError, match=message):
        check_model(parse_config(copied_run, "x"), str(tmp_path))


def test_every_problem_is_named_at_once(copied_run: dict[str, Any], data_copy: Path) -> None:
    for damage in (
        missing_file,
        misspelt_freeze,
        unknown_tracker,
        answer_cut_off,
        truncated_image,
        long_test_under_perplexity,
    ):
        damage(copied_run, data_copy)
    for number in range(4):
        change_record(data_copy, "colour_validation", number, longer)
    for number, key in enumerate(("id", "conversations")):
        change_record(data_copy, "chat_test", number, lambda row, key=key: row.pop(key))  # type: ignore[misc]
    with (data_copy / "chat_test.jsonl").open("a") as file:
        file.write('{"id": ')
    two_questions_to_score(copied_run, data_copy)
    for name in ("box_validation_0", "box_test_3"):
        (data_copy / "images" / f"{name}.png").write_text("no image")
    with pytest.raises(UserError) as caught:
        check_config(parse_config(copied_run, "x"))
    title, *told = str(caught.value).splitlines()
    assert title == "the run cannot start:"
    wanted = [
        "model.freeze: no parameter", "unknown tracker in training.report_to", "train record 'colour-train-5': image ",
        *(f"colour_validation.jsonl: record 'colour-validation-{number}': its images" for number in range(4)),
        "record 'colour-test-1': its images",
        "box_train.jsonl does not exist", "test record 'box-test-0': scoring takes one question per record",
        "validation record 'box-validation-0': image ", "test record 'box-test-3': image ",
        "chat_test.jsonl, line 1: the record has no 'id'",
        "chat_test.jsonl, line 2 (id 'chat-test-1'): 'conversations'",
        "chat_test.jsonl, line 5: not valid JSON", "record 'chat-train-6': no supervised",
    ]  # fmt: skip
    for part, line in zip(wanted, told, strict=True):
        assert line.startswith("  ")
        assert part in line


def test_a_prompt_that_leaves_no_positions_for_its_answer(
    copied_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of GPT-2; a model with RoPE, as here, is not told where to stop."""
    monkeypatch.setattr(preflight, "table_of_positions", lambda config: 20)
    with pytest.raises(UserError, match=r"box_test.jsonl: record 'box-test-0': its prompt of \d+ tokens and up to \d+"):
        check_config(parse_config(copied_run, "x"))
