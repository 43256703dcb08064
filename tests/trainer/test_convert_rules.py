"""Converters: every raw format as it is published, and every processing rule of CoTBal section 4.1."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from raw_data import PAPER, RAW, convert_raw, questions, rows, values, vqav2, write_raw

from trainer.data.converters.conversion import convert
from trainer.data.converters.registry import CONVERTERS
from trainer.data.records import read_records
from trainer.metrics import get_metric

ONE_WORD = "Answer the question using a single word or phrase."


@pytest.mark.parametrize("name", list(CONVERTERS))
def test_everything_plain_is_kept_and_reads_as_records(name, tmp_path):
    manifest = convert_raw(tmp_path, name)
    assert not manifest.rejected
    assert manifest.complete
    read = sum(len(read_records(manifest.path.with_name(f"{split}.jsonl"))) for split in manifest.outputs)
    assert read == sum(entry["items"] for entry in manifest.content["read"]) > 0


class TestVqav2:
    def test_paper(self, tmp_path):
        manifest = convert_raw(tmp_path, "vqav2", preset=PAPER)
        train = rows(manifest, "train")
        assert len(train) == 3  # (2): one conversation for each image
        for row in train:
            image = int(row["image"][-16:-4])
            assert row["image"] == f"train2014/COCO_train2014_{image:012d}.jpg"
            asked = [re.search(r"What is (\d+)\?", text)[1] for text in values(row)[::2]]
            assert sorted(asked) == [str(3 * image + i) for i in range(3)]
            assert values(row)[1::2] == [f"a{number}" for number in asked]
            assert values(row)[0] == f"<image>\nWhat is {asked[0]}?\n{ONE_WORD}"
            assert values(row)[2] == f"What is {asked[1]}?"
            assert "references" not in row
        validation = rows(manifest, "validation")
        assert len(validation) == 6
        for row in validation:
            number = row["id"]
            assert values(row) == [f"<image>\nWhat is {number}?\n{ONE_WORD}", f"a{number}"]
            assert row["references"] == [f"a{number}"]
        answers = [record.answers for record in read_records(manifest.path.with_name("validation.jsonl"))]
        assert get_metric("exact_match").compute(["other"] * 6, answers).value == 0  # one annotator's, not the answer
        assert manifest.content["table_1"] == {"paper": 83_000, "written": 3, "agrees": False}

    def test_questions_of_an_image_are_shuffled_by_the_seed(self, tmp_path):
        files = vqav2()
        orders = {
            tuple(values(rows(convert_raw(tmp_path, "vqav2", files, merge=True, seed=seed), "train")[0])[::2])
            for seed in range(6)
        }
        assert len(orders) > 2

    def test_validation_is_drawn_at_random_and_reproducibly(self, tmp_path):
        drawn = [
            {row["id"] for row in rows(convert_raw(tmp_path, "vqav2", validation=2, seed=seed), "validation")}
            for seed in (0, 0, 1, 2, 3)
        ]
        assert all(len(ids) == 2 for ids in drawn)
        assert drawn[0] == drawn[1]
        assert len(set(map(frozenset, drawn))) > 1
        manifest = convert_raw(tmp_path, "vqav2", validation=2)
        assert manifest.content["not_drawn"] == {"validation": 4}

    def test_all_answers_and_prompt_on_every_turn(self, tmp_path):
        manifest = convert_raw(tmp_path, "vqav2", merge=True, prompt="Be brief.", prompt_turns="every")
        for row in rows(manifest, "validation"):
            assert row["references"] == ["other"] + [f"a{row['id']}"] * 9
        assert all(text.endswith("\nBe brief.") for row in rows(manifest, "train") for text in values(row)[::2])

    def test_an_annotator_who_wrote_nothing_is_one_of_the_ten(self, tmp_path):
        files = vqav2()
        files["v2_mscoco_val2014_annotations.json"]["annotations"][0]["answers"][0]["answer"] = " "
        manifest = convert_raw(tmp_path, "vqav2", files)
        assert not manifest.rejected
        last = rows(manifest, "validation")[-1]
        assert last["references"] == ["", *[f"a{last['id']}"] * 9]

    def test_questions_whose_answers_are_secret(self, tmp_path):
        asked = [{"image_id": 262144 + i // 2, "question": f"Is it {i}?", "question_id": 2000 + i} for i in range(4)]
        names = {name: f"v2_OpenEnded_mscoco_{name}2015_questions.json" for name in ("test", "test-dev")}
        files = vqav2() | {names["test"]: {"questions": asked}}
        manifest = convert_raw(tmp_path, "vqav2", files, preset=PAPER)
        assert [entry["questions"] for entry in manifest.outputs.values()] == [9, 6, 4]
        path = manifest.path.with_name("test2015.jsonl")
        for number, row in enumerate(rows(manifest, "test2015")):
            assert row == {
                "id": str(2000 + number), "image": f"test2015/COCO_test2015_{262144 + number // 2:012d}.jpg",
                "conversations": [{"from": "human", "value": f"<image>\nIs it {number}?\n{ONE_WORD}"}],
            }  # fmt: skip
        assert [len(record.turns) for record in read_records(path, answered=False)] == [1] * 4
        with pytest.raises(ValueError, match="must be a list with at least one human and one gpt turn"):
            read_records(path)
        # Test-dev is part of test, with the same ids.
        manifest = convert_raw(tmp_path, "vqav2", files | {names["test-dev"]: {"questions": asked[1:3]}})
        assert not manifest.rejected
        assert set(manifest.outputs) == {"train", "validation", "test-dev2015"}
        assert [row["id"] for row in rows(manifest, "test-dev2015")] == ["2001", "2002"]

    def test_answers_that_no_two_annotators_share(self, tmp_path):
        """Their consensus is anyone's; counted where they are scored, and training records need no references."""
        files = vqav2()
        for year in ("train", "val"):
            annotation = files[f"v2_mscoco_{year}2014_annotations.json"]["annotations"][0]
            for number, answer in enumerate(annotation["answers"]):
                answer["answer"] = f"b{number}"
        del files["v2_mscoco_val2014_annotations.json"]["annotations"][1]["answers"][0]
        manifest = convert_raw(tmp_path, "vqav2", files)
        assert manifest.content["notes"] == {"questions without two annotators who agree": 1}
        assert not any("references" in row for row in rows(manifest, "train"))
        assert manifest.rejected == {"malformed": 1, "no partner": 1}  # nine answers, and the question about them

    def test_a_question_without_an_answer_or_about_another_image(self, tmp_path):
        files = vqav2()
        annotations = files["v2_mscoco_train2014_annotations.json"]["annotations"]
        annotations[0]["image_id"] = 77
        del annotations[4]
        manifest = convert_raw(tmp_path, "vqav2", files)
        found = rows(manifest, "rejected")
        assert [(row["position"], row["kind"]) for row in found] == [
            ("questions[4]", "no partner"), ("questions[8]", "no partner"),
        ]  # fmt: skip
        assert manifest.outputs["train"]["records"] == 7


def test_gqa(tmp_path):
    manifest = convert_raw(tmp_path, "gqa", preset=PAPER, validation=4)
    train = rows(manifest, "train")
    assert sorted(row["image"] for row in train) == ["10.jpg", "11.jpg", "12.jpg"]
    assert sum(len(row["conversations"]) for row in train) == 2 * 8
    assert manifest.content["notes"] == {"not balanced": 1}
    assert len(rows(manifest, "validation")) == 4
    assert values(rows(manifest, "test")[0]) == [f"<image>\nIs it 0?\n{ONE_WORD}", "no"]


def test_chartqa_merges_human_and_augmented(tmp_path):
    manifest = convert_raw(tmp_path, "chartqa", preset=PAPER)
    train = rows(manifest, "train")
    assert sorted(row["image"] for row in train) == [f"train/png/train{i}.png" for i in range(3)]
    kinds = [sorted(re.findall("human|augmented", " ".join(values(row)))) for row in train]
    assert kinds == [["augmented", "human"]] * 3
    assert len(rows(manifest, "validation")) == 2
    assert len(rows(manifest, "test")) == 4


class TestOcrVqa:
    def test_splits_and_file_names(self, tmp_path):
        manifest = convert_raw(tmp_path, "ocrvqa", preset=PAPER)
        counts = {split: entry["records"] for split, entry in manifest.outputs.items()}
        assert counts == {"train": 4, "validation": 4, "test": 2}
        assert manifest.content["notes"] == {}
        assert {row["image"] for row in rows(manifest, "train")} == {f"{i:010d}.jpg" for i in range(4)}

    def test_books_that_cannot_be_used(self, tmp_path):
        files = RAW["ocrvqa"]()
        books = files["dataset.json"]
        for number, change in enumerate(
            [{"split": 4}, {"imageURL": "http://images.example/I/x"}, {"answers": ["W"]}, {"imageURL": "http://[x"}]
        ):
            books[f"{number:010d}"].update(change)
        books[""] = books.pop("0000000004")
        source = write_raw(tmp_path / "raw", files) / "dataset.json"
        manifest = convert("ocrvqa", source, tmp_path / "out")
        assert [row["reason"].partition(":")[0] for row in rows(manifest, "rejected")] == [
            "'split' must be 1, 2 or 3, got 4", "'imageURL' has no file extension", "2 question(s) but 1 answer(s)",
            "'imageURL' is not a URL", "the book has no id",
        ]  # fmt: skip
        assert {split: entry["records"] for split, entry in manifest.outputs.items()} == {"test": 2, "validation": 2}

    def test_a_blank_answer_costs_its_question_only(self, tmp_path):
        files = RAW["ocrvqa"]()
        books = files["dataset.json"]
        books["0000000000"]["answers"][0] = " "
        books["0000000001"]["questions"][1] = ""
        books["0000000002"]["answers"] = ["", "\n"]
        manifest = convert_raw(tmp_path, "ocrvqa", files)
        assert [row["id"] for row in rows(manifest, "train")] == [
            "0000000000-1", "0000000001-0", "0000000003-0", "0000000003-1",
        ]  # fmt: skip
        assert (manifest.rejected, manifest.content["notes"]) == ({"empty text": 1}, {"blank questions or answers": 2})

    def test_conversations_are_sampled_after_merging(self, tmp_path):
        manifest = convert_raw(tmp_path, "ocrvqa", preset=PAPER, train=3, validation=1)
        assert manifest.outputs["train"]["records"] == 3
        assert manifest.outputs["train"]["questions"] == 6
        assert manifest.outputs["validation"]["questions"] == 1

    def test_gifs_that_are_called_jpg(self, tmp_path):
        """As LLaVA saved them; the addresses of the published file answer no longer."""
        files = RAW["ocrvqa"]()
        for number in (0, 1, 2):
            files["dataset.json"][f"{number:010d}"]["imageURL"] = "http://images.example/I/x.gif"
        (tmp_path / "images").mkdir()
        for name in ("0000000000.jpg", "0000000001.gif", "0000000003.jpg"):
            Image.new("P", (4, 4)).save(tmp_path / "images" / name, "GIF")
        plain = convert_raw(tmp_path, "ocrvqa", files)
        assert {row["image"] for row in rows(plain, "train")} == {
            "0000000000.gif", "0000000001.gif", "0000000002.gif", "0000000003.jpg",
        }  # fmt: skip
        files["dataset.json"]["9" * 300] = files["dataset.json"].pop("0000000004")
        manifest = convert_raw(tmp_path, "ocrvqa", files, image_root=str(tmp_path / "images"))
        found = {row["image"] for row in rows(manifest, "train")}
        assert found == {"0000000000.jpg", "0000000001.gif", "0000000003.jpg"}
        assert manifest.rejected == {"missing image": 6, "unreadable image": 2}


def test_m3it_writes_its_images(tmp_path):
    manifest = convert_raw(tmp_path, "m3it")
    train = rows(manifest, "train")
    assert values(train[0]) == ["<image>\nLook.", "A0"]
    assert values(train[1]) == ["<image>\nLook.\nQ1", "A1"]
    assert all((tmp_path / "out" / row["image"]).is_file() for row in train)
    assert rows(manifest, "validation")[0]["image"] == train[2]["image"]
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 4
    files = RAW["m3it"]()
    first, second, third, _ = files["data/vqa/train.jsonl"]
    first["image_base64_str"], second["image_base64_str"] = first["image_base64_str"][0], {"a": "b"}
    third["image_base64_str"] = [3]
    again = convert_raw(tmp_path, "m3it", files, train=1)
    assert (again.rejected, again.outputs["train"]["records"]) == ({"malformed": 2}, 1)
    one = convert("m3it", tmp_path / "raw" / "data" / "cap" / "test.jsonl", tmp_path / "one")
    assert [row["id"] for row in rows(one, "test")] == ["test-1"]


def test_numbers_are_answers_too(tmp_path):
    files = RAW["chartqa"]()
    for row, label in zip(files["train/train_human.json"], [3, 0.5, 10**400], strict=True):
        row["label"] = label
    files["test/test_human.json"][0]["label"] = float("nan")
    files["test/test_human.json"][1]["label"] = True
    manifest = convert_raw(tmp_path, "chartqa", files)
    assert [values(row)[1] for row in rows(manifest, "train")][:3] == ["3", "0.5", str(10**400)]
    assert manifest.rejected == {"malformed": 2}


def test_xtreme_up(tmp_path):
    manifest = convert_raw(tmp_path, "xtreme-up-qa")
    assert values(rows(manifest, "validation")[0]) == ["question: q7? title: T context: c7 नमस्ते", "c7"]
    assert {split: entry["records"] for split, entry in manifest.outputs.items()} == {
        "train": 4, "validation": 1, "test": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["m3it", "xtreme-up-qa"])
def test_what_no_path_speaks_of_is_drawn_from_training(name, tmp_path):
    files = {path: data for path, data in RAW[name]().items() if "/train" in path}
    manifest = convert_raw(tmp_path, name, files, validation=1, test=2)
    assert {split: entry["records"] for split, entry in manifest.outputs.items()} == {
        "validation": 1, "test": 2, "train": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "path"), [("gqa", "train_balanced_questions.json"), ("xtreme-up-qa", "test/a.jsonl")])
def test_a_number_of_records_of_a_split_that_is_not_there(name, path, tmp_path):
    data = next(iter(RAW[name]().values()))
    with pytest.raises(
        ValueError, match=f"'validation' has nothing to count: the raw data of '{name}' has no such split"
    ):
        convert_raw(tmp_path, name, {path: data}, validation=1)
    assert not (tmp_path / "out").exists()
    convert_raw(tmp_path, name, {path: data}, preset=PAPER if name == "gqa" else None)


def test_table_1_of_the_paper():
    """Its sizes in thousands, its response-format instructions, and the numbers of the rules (1) and (3) to (6)."""
    boxed = "Provide the bounding box coordinate of the region this sentence describes."
    assert {name: (own.paper_size, own.paper.get("prompt")) for name, own in CONVERTERS.items() if own.paper} == {
        "sharegpt": (41_000, None), "sharegpt4v": (98_000, None), "vqav2": (83_000, ONE_WORD),
        "gqa": (72_000, ONE_WORD), "chartqa": (18_000, ONE_WORD), "ocrvqa": (80_000, ONE_WORD),
        "refcoco-caption": (41_000, "Provide a short description for this region."), "refcoco-bbox": (41_000, boxed),
    }  # fmt: skip
    numbers = {name: {key: n for key, n in own.paper.items() if type(n) is int} for name, own in CONVERTERS.items()}
    assert {name: own for name, own in numbers.items() if own} == {
        "sharegpt4v": {"validation": 2_000, "test": 2_000}, "refcoco-caption": {"max_turns": 9},
        "refcoco-bbox": {"max_turns": 9}, "ocrvqa": {"train": 80_000, "validation": 20_000},
        "vqav2": {"validation": 20_000}, "gqa": {"validation": 20_000}, "sharegpt": {"max_tokens": 2048},
    }  # fmt: skip


class TestManifest:
    def test_every_raw_record_is_accounted_for(self, tmp_path):
        files = RAW["gqa"]()
        files["train_balanced_questions.json"]["t0"]["question"] = " "
        manifest = convert_raw(tmp_path, "gqa", files, validation=2)
        content = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert content == manifest.content
        read = sum(entry["records"] for entry in content["read"])
        written = sum(entry["questions"] for entry in content["outputs"])
        assert read == 17 == written + sum(content["rejected"].values()) + 4 + content["notes"]["not balanced"]

    def test_digests(self, tmp_path):
        manifest = convert_raw(tmp_path, "ocrvqa")
        for entry in manifest.content["inputs"]:
            assert entry["sha256"] == hashlib.sha256((tmp_path / "raw" / entry["file"]).read_bytes()).hexdigest()
        for entry in manifest.content["outputs"]:
            assert entry["sha256"] == hashlib.sha256((tmp_path / "out" / entry["file"]).read_bytes()).hexdigest()

    def test_the_same_for_any_number_of_workers(self, tmp_path):
        source = write_raw(tmp_path / "raw", RAW["chartqa"]())
        one = convert("chartqa", source, tmp_path / "one", preset=PAPER)
        two = convert("chartqa", source, tmp_path / "two", preset=PAPER, workers=2)
        assert one.content == two.content
        assert questions(one) == questions(two)

    def test_limit(self, tmp_path):
        manifest = convert_raw(tmp_path, "chartqa", preset=PAPER, limit=1)
        assert manifest.outputs["train"]["records"] == 1
        assert manifest.content["table_1"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "paper"}, r"unknown preset of 'gqa' 'paper'"),
        ({"valdiation": 3}, "unknown option of 'gqa' 'valdiation'.*did you mean 'validation'"),
        ({"validation": 0}, "'validation' must be a whole number"),
        ({"merge": "yes"}, "'merge' must be true or false"),
        ({"prompt_turns": "all"}, "'prompt_turns' must be first or every"),
        ({"image_root": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_raw(tmp_path, "gqa", **options)


@pytest.mark.parametrize("name", ["sharegpt", "mftcoder", "xtreme-up-qa", "m3it"])
def test_where_no_image_is_looked_for_there_is_no_root_of_them(name, tmp_path):
    with pytest.raises(ValueError, match=f"unknown option of '{name}' 'image_root'"):
        convert_raw(tmp_path, name, image_root=str(tmp_path))


@pytest.mark.parametrize("name", list(CONVERTERS))
def test_missing_files_are_named(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        convert(name, tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist; 'gqa' needs"):
        convert("gqa", Path("/nonexistent"), tmp_path / "out")
