"""``cotbal convert`` and the check of record files, from the command line's side."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import typer
from PIL import Image
from raw_data import RAW, llava, write_raw
from typer.testing import CliRunner

from trainer.data.checking import check_files
from trainer.data.commands import add_commands, check_records
from trainer.data.encoding import ConversationEncoder
from trainer.errors import UserError
from trainer.models.loading import load_processor
from trainer.tasks import check_images, load_task


@pytest.fixture
def app():
    app = typer.Typer()
    add_commands(app)
    app.command("check")(check_records)
    return app


def run(app, *arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class TestConvert:
    def test_converts_and_summarises(self, app, tmp_path):
        source = write_raw(tmp_path / "raw", RAW["gqa"]())
        result = run(
            app, "convert", "gqa", source, tmp_path / "out", "--preset", "cotbal-paper", "--set", "validation=4",
            "--workers", 1, "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "train.jsonl" in result.output
        assert "not balanced" in result.output
        assert "72,000" in result.output
        assert len((tmp_path / "out" / "validation.jsonl").read_text().splitlines()) == 4

    def test_a_damaged_file_gives_exit_code_1(self, app, tmp_path):
        source = write_raw(tmp_path / "raw", {"m.json": json.dumps(llava())[:-40].encode()})
        result = run(app, "convert", "llava-mix665k", source, tmp_path / "out", "--quiet", "--limit", 20)
        assert result.exit_code == 1
        assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 8

    @pytest.mark.parametrize(("bad", "end", "cut"), [(1, "\n", False), (1, "", False), (2, "\n", False), (2, "", True)])
    def test_a_bad_line_of_json_lines_is_rejected_and_the_rest_goes_on(self, app, tmp_path, bad, end, cut):
        """The file is complete unless its last line is the broken one and has no end."""
        lines = []
        for k in range(3):
            answer = {"from": "gpt", "value": f"Answer {k} of some length."}
            turns = [{"from": "human", "value": "How is the weather today?"}, answer]
            lines.append(json.dumps({"id": f"r{k}", "conversations": turns}))
        lines[bad] = lines[bad][:-9]
        source = write_raw(tmp_path / "raw", {"a.jsonl": ("\n".join(lines) + end).encode()})
        result = run(app, "convert", "sharegpt", source, tmp_path / "out", "--quiet")
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert (result.exit_code, manifest["complete"]) == (int(cut), not cut)
        assert ("could not be read to its end" in result.output) == cut
        assert manifest["rejected"] == {"damaged": 1}
        (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
        assert rejected["position"] == f"line {bad + 1}"
        assert f"see rejected.jsonl, which begins with a.jsonl, line {bad + 1}: is not valid JSON: " in result.output
        written = [json.loads(line)["id"] for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
        assert sorted(written) == sorted({"r0", "r1", "r2"} - {f"r{bad}"})

    def test_list_and_missing_arguments(self, app):
        assert "refcoco-bbox" in run(app, "convert", "list").output
        with pytest.raises(UserError, match=r"`convert gqa` takes SOURCE and OUTPUT; 'gqa' needs .*balanced"):
            CliRunner().invoke(app, ["convert", "gqa"], catch_exceptions=False)


class TestCheck:
    def test_tokens_are_those_of_training(self, tiny_tasks, pixel_model):
        config = tiny_tasks[0]
        task = load_task(config)
        encoder = ConversationEncoder(load_processor(str(pixel_model)), 128)
        samples = [encoder.training_sample(record, task.image_path) for record in task.train]
        result = check_files([config.train], config.image_root, pixel_model, max_length=128, batch_size=3, epochs=2)
        (file,) = result.files
        assert list(file.lengths) == [len(sample.input_ids) for sample in samples]
        assert file.supervised == sum(sample.supervised for sample in samples) > 0
        assert (file.records, file.images, file.problems, file.cut) == (8, 8, 0, 0)
        assert result.steps == 6  # 16 records in batches of 3
        assert "steps: 6" in result.table()

    def test_the_last_batch_of_an_epoch_is_a_step_of_its_own(self, app, tiny_tasks):
        """12 records, 5 a step: 5, 5 and 2, six times."""
        result = run(app, "check", tiny_tasks[0].train, tiny_tasks[0].test, "--batch-size", 5, "--epochs", 6)
        assert "steps: 18 " in result.output

    def test_every_problem_is_named(self, app, tiny_tasks, tmp_path):
        task = tiny_tasks[0]
        lines = task.train.read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rows[1]["image"] = "images/none.png"
        rows[2]["image"] = "../secret.png"
        rows[3] = rows[0]
        del rows[4]["conversations"]
        rows[5]["id"] = rows[0]["id"]
        path = tmp_path / "bad.jsonl"
        path.write_text("\n".join([*map(json.dumps, rows), '{"id": ']))
        result = run(app, "check", path, "--image-root", task.image_root)
        assert result.exit_code == 1
        for line, text in [(2, "none.png does not exist"), (3, "outside"), (4, "all of it is the same"),
                           (5, "conversations"), (6, "its id is already used"), (9, "not valid JSON")]:  # fmt: skip
            assert any(f"line {line}" in row and text in row for row in result.output.splitlines()), text
        assert check_files([path], task.image_root).files[0].records == 5

    def test_an_image_that_training_refuses_is_a_problem(self, tiny_tasks, tmp_path):
        """A file that ends in the middle of its pixels, with a whole header: one text for both checks."""
        task = tiny_tasks[0].model_copy(update={"image_root": tmp_path})
        shutil.copytree(tiny_tasks[0].image_root / "images", tmp_path / "images")
        whole = (tmp_path / "images" / "colour_train_5.png").read_bytes()
        (tmp_path / "images" / "colour_train_5.png").write_bytes(whole[:-30])
        result = check_files([task.train], tmp_path)
        with pytest.raises(UserError) as refused:
            check_images(load_task(task))
        (shown,) = result.shown
        assert (result.problems, result.files[0].records) == (1, 7)
        assert shown.startswith(f"{task.train}, line 6 (id 'colour-train-5'): image ")
        assert shown.partition(": image ")[2] == str(refused.value).partition(": image ")[2]

    def test_what_is_odd_is_a_warning(self, app, tiny_tasks, pixel_model, tmp_path):
        """Named with its record, an image once; the exit code stays 0."""
        shutil.copytree(tiny_tasks[0].image_root / "images", tmp_path / "images")
        Image.new("RGBA", (64, 64), (9, 9, 9, 100)).save(tmp_path / "images" / "colour_train_0.png")
        rows = [json.loads(line) for line in tiny_tasks[0].train.read_text().splitlines()]
        rows[1]["image"] = rows[0]["image"]
        rows[2]["conversations"][1]["value"] += "</s>"
        rows[3]["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": " "}]
        rows[4]["conversations"].insert(0, {"from": "system", "value": "<pad>"})
        for number in (5, 7):
            rows[number]["conversations"] += rows[3]["conversations"][2:]
        path = tmp_path / "odd.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = run(app, "check", path, "--image-root", tmp_path, "--tokenizer", pixel_model)
        assert result.exit_code == 0
        head, numbers, _, *told = result.output.splitlines()
        assert dict(zip(head.split(), numbers.split(), strict=True))["warnings"] == "6"
        for line, (number, name, text) in zip(told, [
            (1, "colour-train-0", f"image {tmp_path}/images/colour_train_0.png has transparent pixels"),
            (3, "colour-train-2", "its text has '</s>', which the tokenizer takes for special tokens; spell it "
             "otherwise (and 1 more like it)"),
            (4, "colour-train-3", "of 2 answers, 2 is empty: the model learns to end at once (and 2 more like it)"),
        ], strict=True):  # fmt: skip
            assert line.startswith(f"warning: {path}, line {number} (id '{name}'): {text}")
        many = check_files([Path(shutil.copy(path, tmp_path / f"{number}.jsonl")) for number in range(22)])
        assert many.table().count(" is empty: the model learns to end at once (and 2 more like it)\n") == 20
        assert many.table().endswith("\n... and 6 more warnings")
        assert [text in run(app, "check", path).output for text in ("is empty", "</s>")] == [True, False]

    @pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n")])
    def test_a_file_without_records_is_a_problem(self, app, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        result = run(app, "check", tmp_path / name)
        assert result.exit_code == 1
        assert result.output.splitlines()[-1] == f"{tmp_path / name} has no records"

    @pytest.mark.parametrize("terminal", [True, False])
    def test_a_bar_on_a_terminal_and_lines_elsewhere(self, tiny_tasks, monkeypatch, terminal):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr("trainer.bars.DELAY", 0)
        monkeypatch.setattr("trainer.bars.LINE_EVERY", 0)
        monkeypatch.setattr("sys.stderr", stream)
        check_files([tiny_tasks[0].train])
        check_images(load_task(tiny_tasks[0]))
        assert ("colour_train.jsonl: 0 records" in stream.getvalue()) == terminal
        assert ("colour:   0%|" in stream.getvalue()) == terminal
        assert ("/16 " in stream.getvalue()) == terminal
        counts = [f"colour_train.jsonl: {k} records" for k in range(1, 9)]
        counts += [f"colour: {k} of 16 images" for k in range(1, 17)]
        assert (stream.getvalue().splitlines() == counts) != terminal

    def test_a_record_without_room_for_an_answer(self, tiny_tasks, pixel_model):
        result = check_files([tiny_tasks[0].train], None, pixel_model, max_length=6)
        assert result.problems == 8
        assert "no supervised token within 6 tokens" in result.shown[0]

    def test_good_files_give_exit_code_0(self, app, tiny_tasks):
        result = run(app, "check", tiny_tasks[0].train, tiny_tasks[2].train)
        assert result.exit_code == 0
        assert len(result.output.splitlines()) == 4
