"""LoRA trainings, and text models: what is trained, what is saved, and that a killed training goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_models import TEXT, llama, llava
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cotbal_kernels.huggingface import apply_fused_loss
from trainer.config import LoraConfig, ModelConfig, parse_config
from trainer.data.encoding import ConversationEncoder
from trainer.data.records import Record, Turn, write_jsonl
from trainer.errors import UserError
from trainer.evaluation.running import evaluate
from trainer.files import write_json
from trainer.launching import LaunchConfig, run_training
from trainer.loop.checkpoints import COMPLETE
from trainer.models.loading import freeze, load_model, load_processor, stop_generation_at
from trainer.models.lora import adapted_layers, add_lora, save_merged
from trainer.models.tiny_llava import train_tokenizer
from trainer.pipeline.evaluations import evaluation_spec
from trainer.pipeline.planned_data import planned_data
from trainer.pipeline.preflight import check_config
from trainer.task_config import TaskConfig
from trainer.training import TrainingSpec

# As the templates of text models are: content is a string.
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' if message.role == 'user' else '<|assistant|>' }}"
    "{{ ' ' + message.content }}{{ '</s>' if message.role == 'assistant' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)
LORA = {"rank": 4, "alpha": 6.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A Llama without images, as a folder with a tokenizer alone."""
    folder = tmp_path_factory.mktemp("text_model")
    tokenizer = train_tokenizer(texts, 340)
    tokenizer.chat_template = TEMPLATE
    size = TEXT | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(**lora: Any) -> ModelConfig:
    return ModelConfig(lora=LoraConfig(**LORA | lora))


class TestTextModel:
    def test_is_loaded_as_one(self, text_model: Path) -> None:
        model = load_model(str(text_model), ModelConfig(), torch.float32)  # the default freezes a vision tower
        assert type(model) is LlamaForCausalLM
        assert all(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(UserError, match=r"model\.freeze: no parameter of .* has 'vision' in its name"):
            load_model(str(text_model), ModelConfig(freeze=["vision"]), torch.float32)

    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ({"temperature": 0.9, "top_p": 0.6}, {}),  # as Vicuna's folder has it
            (
                {"do_sample": False, "top_k": 3, "repetition_penalty": 1.2},
                {"do_sample": False, "repetition_penalty": 1.2},
            ),
            ({"length_penalty": 2.0, "pad_token_id": -1}, {}),
            ({"length_penalty": 2.0, "pad_token_id": 3}, {"pad_token_id": 3}),
            (
                {"do_sample": True, "temperature": 0.5, "length_penalty": 2.0},
                {"do_sample": True, "temperature": 0.5},
            ),
            ({"do_sample": True, "top_p": 0.6}, {"do_sample": True, "top_p": 0.6}),
            ({"num_beams": 2, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 2.0}),
        ],
    )
    def test_generation_settings_without_effect_are_no_hindrance(
        self, text_model: Path, tmp_path: Path, given: dict[str, Any], kept: dict[str, Any]
    ) -> None:
        """Some versions of transformers load them and refuse to save them. What is saved answers as what is loaded."""
        folder = Path(shutil.copytree(text_model, tmp_path / "model"))
        path = folder / "generation_config.json"
        own = json.loads(path.read_text())
        path.write_text(json.dumps(own | given))
        load_model(str(folder), ModelConfig(freeze=[]), torch.float32).save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        others = own.keys() - given.keys()
        assert {key: value for key, value in saved.items() if key not in others} == kept

    def test_it_is_excused_for_its_vision_tower(self) -> None:
        freeze(llama(), ModelConfig(), "x", images=False)
        with pytest.raises(UserError, match="no parameter of 'x' has 'vision_tower' in its name"):
            freeze(llama(), ModelConfig(), "x", images=True)

    def test_generation_stops_where_answers_end(self, text_model: Path, tmp_path: Path) -> None:
        """A base model's own end, and the mark of the template that it is trained on."""
        folder = Path(shutil.copytree(text_model, tmp_path / "model"))
        path = folder / "generation_config.json"
        processor = load_processor(str(folder))
        end = processor.convert_tokens_to_ids("</s>")
        assert ConversationEncoder(processor, 100).chat.end_marks == [end]
        for given, wanted in ((7, [7, end]), ([7, end], [7, end]), (None, [end]), (end, end)):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": given}))
            stop_generation_at(folder, ConversationEncoder(processor, 100).chat.end_marks)
            assert json.loads(path.read_text())["eos_token_id"] == wanted

    def test_its_template_gets_strings(self, text_model: Path) -> None:
        encoder = ConversationEncoder(load_processor(str(text_model)), 100)
        record = Record("r", (), (Turn(" How much? ", "3."), Turn("Sure?", "Yes.")), ())
        encoded = encoder.training_sample(record, Path)
        text = "<|user|>  How much? <|assistant|> 3.</s><|user|> Sure?<|assistant|> Yes.</s>"
        assert encoder.tokenizer.decode(encoded.input_ids) == text
        supervised = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != -100]
        assert encoder.tokenizer.decode(supervised) == " 3.</s> Yes.</s>"
        assert encoder.tokenizer.decode(encoder.prompt(record, Path).input_ids) == text.removesuffix(" Yes.</s>")

    def test_an_image_is_refused(self, text_model: Path) -> None:
        encoder = ConversationEncoder(load_processor(str(text_model)), 100)
        record = Record("r", ("a.png",), (Turn("<image>", "3."),), ())
        with pytest.raises(UserError, match="record 'r' has an image, but the model reads text only"):
            encoder.training_sample(record, Path)

    @pytest.mark.parametrize("metric", ["exact_match", "perplexity"])
    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_an_image_in_a_scored_record_is_found_before_training(
        self, text_model: Path, run_data: dict[str, Any], split: str, metric: str, tmp_path: Path
    ) -> None:
        colour = run_data["tasks"][0]
        plain = write_text_records(tmp_path / "plain.jsonl", 3)
        files = {"train": plain, "validation": plain, "test": plain, split: colour[split]}
        run_data["tasks"] = [colour | files | {"metric": metric}]
        run_data["model"] |= {"path": str(text_model)}
        run = parse_config(run_data, "x")
        message = rf"task 'colour', {split} set {colour[split]}: record 'colour-{split}-0' has an image, but the model "
        with pytest.raises(UserError, match=f"^the run cannot start:\n  {message}"):
            check_config(run)
        assert not isinstance(run.tasks, str)
        with pytest.raises(UserError, match=f"^{message}"):  # of the dry run
            planned_data(run, run.tasks)
        spec = evaluation_spec(
            run, text_model, split, ("colour",), tmp_path / "out", features=None, device="cpu", place=0
        )
        with pytest.raises(UserError, match=f"^{message}"):
            evaluate(spec)

    def test_a_long_answer_is_found_before_training(
        self, text_model: Path, run_data: dict[str, Any], tmp_path: Path
    ) -> None:
        plain = write_text_records(tmp_path / "plain.jsonl", 3)
        long = write_text_records(tmp_path / "long.jsonl", 15, question="how much " * 90)
        files = {"train": plain, "validation": plain, "test": long}
        run_data["tasks"] = [run_data["tasks"][0] | files | {"metric": "perplexity"}]
        run_data["model"] |= {"path": str(text_model)}
        with pytest.raises(UserError) as caught:
            check_config(parse_config(run_data, "x"))
        _, first, *_, last = str(caught.value).splitlines()
        assert f"task 'colour', test set {long}: record '0': no supervised token within 128 tokens; raise " in first
        assert last == "  ... and 5 more like these"


def write_text_records(path: Path, count: int, question: str = "How much?") -> str:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "3."}]
    write_jsonl(path, [{"id": number, "conversations": turns} for number in range(count)])
    return str(path)


class TestAdapters:
    def test_layers(self) -> None:
        """The vision tower has layers of the same names; frozen, it is left alone."""
        names = adapted_layers(llava(), config(target_modules=["q_proj", "down_proj"]))
        layers = [f"model.language_model.layers.{k}" for k in range(2)]
        assert sorted(names) == sorted(
            f"{layer}.{name}" for layer in layers for name in ("self_attn.q_proj", "mlp.down_proj")
        )
        everywhere = config(target_modules=["q_proj"]).model_copy(update={"freeze": []})
        assert sum("vision_tower" in name for name in adapted_layers(llava(), everywhere)) == 2

    def test_what_is_trained(self) -> None:
        """Rank r beside each layer of in and out features: r (in + out) numbers; and the projector itself."""
        model = add_lora(llava(), config(train_whole=["multi_modal_projector"]))
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        low_rank = 2 * 4 * ((32 + 32) + (32 + 16) + (48 + 32))  # q, v of two heads, down
        projector = (16 * 32 + 32) + (32 * 32 + 32)
        assert sum(trained.values()) == low_rank + projector
        assert all("lora_" in name or "multi_modal_projector" in name for name in trained)

    def test_the_input_of_an_update_is_dropped_out(self) -> None:
        model = add_lora(llava(), config(dropout=0.25))
        dropped = [m.p for name, m in model.named_modules() if "lora_dropout." in name]  # type: ignore[union-attr]
        assert dropped == [0.25] * 6  # q, v and down of two layers

    @pytest.mark.parametrize(
        ("lora", "message"),
        [
            ({"target_modules": ["q_prj"]}, "no linear layer that is not frozen is named 'q_prj'; there are.* q_proj"),
            ({"target_modules": ["lm_head"]}, "target_modules: 'lm_head' is the model's head"),
            ({"train_whole": ["projector"]}, "train_whole: no parameter of the model has 'projector' in its name"),
        ],
    )
    def test_mistakes(self, lora: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            add_lora(llama(), config(**lora))

    def test_frozen_layers_are_not_offered(self) -> None:
        """fc1 is in the frozen vision tower alone, and the head is none to adapt."""
        offered = "down_proj, gate_proj, k_proj, linear_1, linear_2, o_proj, q_proj, up_proj, v_proj"
        with pytest.raises(UserError, match=rf"is named 'fc1'; there are: {offered}$"):
            add_lora(llava(), config(target_modules=["fc1"]))

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_merged_folder(self, precision: str, text_model: Path, tmp_path: Path) -> None:
        """W + alpha / r B A by hand, rounded once; parameters trained whole as they are, all else untouched."""
        chosen = config(train_whole=["model.norm"]).model_copy(update={"path": str(text_model)})
        adapted = add_lora(load_model(str(text_model), chosen, torch.float32), chosen)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        data = {"output_dir": "out", "tasks": "built_in", "training": {"precision": precision}}
        run = parse_config(data | {"model": chosen.model_dump()}, "x")
        save_merged(adapted, str(text_model), run, tmp_path / "merged")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
        base = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32).state_dict()
        own = dict(adapted.named_parameters())
        assert set(found) == set(base)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for name, value in base.items():
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{layer}.lora_A.default.weight" in own:
                a, b = (own[f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
                value = value.double() + 6.0 / 4 * b @ a
                assert not torch.equal(found[name].double(), base[name].double())
            elif name == "model.norm.weight":
                value = own[f"{layer}.weight"]
            assert found[name].dtype == dtype
            # One rounding to bfloat16 (half of 2^-8 of the value), or a few of float32 values below 1.
            bound = value.abs() * 2.0**-8 if dtype == torch.bfloat16 else torch.full_like(value, 2e-7)
            assert ((found[name].double() - value).abs() <= bound).all(), name

    def test_sharded_parameters_are_gathered(
        self, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Under ZeRO-3 a parameter is empty but inside ``GatheredParameters``; this one only acts like that."""
        import deepspeed

        chosen = config().model_copy(update={"path": str(text_model)})
        adapted = add_lora(load_model(str(text_model), chosen, torch.float32), chosen)
        whole = {}
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.ds_id = name
                whole[name] = torch.randn_like(parameter)
                parameter.data = torch.empty(0)

        @contextlib.contextmanager
        def gathered(parameters: list[Any]) -> Iterator[None]:
            for parameter in parameters:
                parameter.data = whole[parameter.ds_id].clone()
            yield
            for parameter in parameters:
                parameter.data.zero_()  # its memory is used again

        monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gathered)
        run = parse_config({"output_dir": "out", "tasks": "built_in", "training": {"precision": "fp32"}}, "x")
        run = run.model_copy(update={"model": chosen})
        save_merged(adapted, str(text_model), run, tmp_path / "merged")
        name = "model.layers.1.self_attn.q_proj"
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).get_submodule(name)
        base = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32).get_submodule(name)
        a, b = (whole[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
        torch.testing.assert_close(found.weight, base.weight + 1.5 * b @ a, rtol=1e-5, atol=1e-5)  # sums of four

    def test_gradients_through_the_fused_loss(self) -> None:
        """Of the low-rank factors alone: against cross-entropy on the logits of the same adapted model."""
        tokens = torch.arange(2, 50).reshape(4, 12)
        labels = torch.where(torch.arange(12) < 4, -100, tokens)

        def adapted(fused: bool) -> Any:
            model = llama()
            if fused:
                apply_fused_loss(model, num_tasks=2)
            torch.manual_seed(1)
            model = add_lora(model, config())
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, 0, 0.1)
            return model

        plain, fused = adapted(False), adapted(True)
        logits = plain(input_ids=tokens).logits[:, :-1]
        expected = cross_entropy(logits.transpose(1, 2), labels[:, 1:])
        expected.backward()
        out = fused(input_ids=tokens, labels=labels, loss_task_ids=torch.tensor([0, 1, 0, 1]))
        out.loss.backward()
        assert abs(out.loss - expected).item() < 2e-6  # float32 sums of 32 terms near 5
        found = dict(fused.named_parameters())
        for name, parameter in plain.named_parameters():
            if parameter.grad is None:
                assert found[name].grad is None, name
            else:
                torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_training_goes_on_from_its_checkpoint(
    run_data: dict[str, Any], tiny_tasks: list[TaskConfig], text_model: Path, tmp_path: Path
) -> None:
    """LoRA on a packed text model under ZeRO-3, once through and once from the first's first checkpoint, which is what
    a kill would have left: the merged models are the same to the last bit."""
    question = {"id": "v", "conversations": [{"from": "human", "value": "3 + 1?"}, {"from": "gpt", "value": "4"}]}
    (tmp_path / "validation.jsonl").write_text(json.dumps(question))
    chat = {"train": str(tiny_tasks[2].train), "validation": str(tmp_path / "validation.jsonl"), "metric": "bleu"}
    run_data["tasks"] = [chat | {"name": "first"}, chat | {"name": "second"}]
    run_data["model"] = {"path": str(text_model), "max_length": 100, "lora": LORA | {"dropout": 0.1}}
    run_data["training"] = {"batch_size": 1, "precision": "fp32", "zero_stage": 3, "packing": True, "epochs": 4,
                            "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 10}  # fmt: skip
    launch = LaunchConfig(device="cpu", threads=1)

    def start(output: Path, keep: Path | None = None) -> None:
        spec = TrainingSpec(
            name="lora", config=parse_config(run_data, "x"), model_path=str(text_model), mixture="all", method="cotbal",
            task_weights={"first": 0.4, "second": 1.6}, output_dir=output,
        )  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "spec.json", spec.model_dump(mode="json"))

        first, ended = output / "checkpoints" / "checkpoint-10", threading.Event()

        def copy() -> None:  # a checkpoint is there for less than the half of a second between polls
            while keep and not keep.exists() and not ended.wait(0.01):
                if (first / COMPLETE).exists():
                    shutil.copytree(first, keep)

        with ThreadPoolExecutor() as pool:
            copied = pool.submit(copy)
            try:
                run_training(output / "spec.json", launch, "cpu", 0, output / "output.log")
            finally:
                ended.set()
            copied.result()

    def parameters(output: Path) -> dict[str, torch.Tensor]:
        return AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32).state_dict()

    start(tmp_path / "whole", tmp_path / "killed" / "checkpoints" / "checkpoint-10")
    (tmp_path / "killed" / "log.jsonl").write_text((tmp_path / "whole" / "log.jsonl").read_text())
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-10" / COMPLETE).exists(), "too fast to be seen"
    start(tmp_path / "killed")
    whole, killed = parameters(tmp_path / "whole"), parameters(tmp_path / "killed")
    base = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32).state_dict()
    moved = {name for name, value in whole.items() if not torch.equal(value, base[name])}
    adapted = [f"{part}.weight" for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    assert moved == {f"model.layers.{k}.{part}" for k in range(2) for part in adapted}
    for name, value in whole.items():
        assert torch.equal(killed[name], value), name
    lines = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["steps"] + 1))
    assert lines[-1]["seconds"] > 0
    first = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert lines[-1]["loss"] < first["loss"] - 0.05, "nothing is learnt"
