"""Data sets that are conversations already: what is kept, cut, cleaned and counted."""

from __future__ import annotations

import pytest
from raw_data import PAPER, RAW, convert_raw, llava, rows, values

from trainer.data.converters.conversion import convert
from trainer.data.records import read_records


class TestConversations:
    def test_sharegpt4v_is_partitioned(self, tmp_path):
        manifest = convert_raw(tmp_path, "sharegpt4v", preset=PAPER, validation=2, test=3)
        ids = {split: {row["id"] for row in rows(manifest, split)} for split in ("validation", "test", "train")}
        assert [len(ids[split]) for split in ("validation", "test", "train")] == [2, 3, 4]
        assert len(set.union(*ids.values())) == 9
        other = convert_raw(tmp_path, "sharegpt4v", preset=PAPER, validation=2, test=3, seed=1)
        assert {row["id"] for row in rows(other, "validation")} != ids["validation"]

    def test_llava_files_stay_as_they_are(self, tmp_path):
        manifest = convert_raw(tmp_path, "llava-mix665k")
        written = rows(manifest, "train")
        assert [row["id"] for row in written] == [*(f"r{i}" for i in range(9)), "t"]
        assert values(written[3]) == ["<image>\nSay 3.", "Said number 3."]
        assert values(written[0])[0] == "<image>\nSay 0."  # its placeholder was missing
        assert "image" not in written[9]

    def test_what_published_files_have_now_and_then(self, tmp_path):
        raw = llava()
        raw[1]["conversations"][1]["value"] = 3
        raw[2]["image"] = ["coco/2.jpg"]
        raw[3]["image"] = 3
        raw[4]["conversations"].pop()
        raw[5]["conversations"] += raw[5]["conversations"][:1]
        manifest = convert_raw(tmp_path, "llava-mix665k", {"m.json": raw}, train=4)
        assert manifest.rejected == {"malformed": 1, "not alternating": 1, "too short": 1}
        assert (manifest.outputs["train"]["records"], manifest.content["not_drawn"]) == (4, {"train": 2})
        assert manifest.content["notes"] == {"image placeholder added": 1}
        manifest = convert_raw(tmp_path, "llava-mix665k", {"m.json": raw})
        assert [values(row)[1] for row in rows(manifest, "train")[:2]] == ["Said number 0.", "3"]
        assert [row["image"] for row in rows(manifest, "train")[1:3]] == ["coco/1.jpg", "coco/2.jpg"]

    def test_other_files_of_a_checkout_are_no_part_of_a_data_set(self, tmp_path):
        others = {"llava_instruct_150k.json": llava(count=3), "detail_23k.json": llava(count=2)}
        manifest = convert_raw(tmp_path, "llava-mix665k", others | RAW["llava-mix665k"]())
        assert [entry["file"] for entry in manifest.content["read"]] == ["llava_v1_5_mix665k.json"]
        (tmp_path / "raw" / "llava_v1_5_mix665k.json").unlink()
        with pytest.raises(ValueError, match=r"several files .* as SOURCE: detail_23k.json, llava_instruct_150k"):
            convert("llava-mix665k", tmp_path / "raw", tmp_path / "new")
        one = convert("llava-mix665k", tmp_path / "raw" / "detail_23k.json", tmp_path / "new")
        assert one.outputs["train"]["records"] == 2

    def test_repeated_ids_are_renamed_and_repeated_records_rejected(self, tmp_path):
        raw = llava()
        raw[4] = {**raw[4], "id": "r1"}
        raw[5] = raw[2]
        manifest = convert_raw(tmp_path, "llava-mix665k", {"m.json": raw})
        assert manifest.rejected == {"duplicate content": 1}
        assert [row["id"] for row in rows(manifest, "train")] == ["r0", "r1", "r2", "r3", "r1#0.5", "r6", "r7", "r8"]

    def test_sharegpt_filter(self, tmp_path):
        def dialogue(name, *turns):
            return {"id": name, "conversations": [{"from": who, "value": text} for who, text in turns]}

        ask, answer = ("human", "What is a question?"), ("gpt", "This is an answer.")
        raw = [
            dialogue("good", ask, answer),
            dialogue("leads", ("gpt", "Hello there."), ask, ("gpt", "One.")),
            dialogue("trails", ask, ("gpt", "Two."), ask),
            dialogue("system", ("system", "x"), ask, answer),
            dialogue("twice", ask, ask, answer, answer),
            dialogue("empty", ask, ("gpt", "  ")),
            dialogue("short", ("human", "a" + " " * 20), ("gpt", "b")),
            dialogue("limit", ask, ("gpt", "\nToo many requests in 1 hour. Try again later.")),
            dialogue("none"),
            dialogue("copy", ask, answer),
            dialogue("good", ask, ("gpt", "Another.")),
            {**dialogue("plugin", ask, ("gpt", "Three.")), "plugins": []},
            {**dialogue("image", ask, ("gpt", "Four.")), "image": "a.png"},
            dialogue("svg", ("human", "What is <image> in SVG?"), ("gpt", "<image> is a picture.")),
        ]
        manifest = convert_raw(tmp_path, "sharegpt", {"sg.json": raw})
        assert [row["id"] for row in rows(manifest, "train")] == ["good", "leads", "trails", "svg"]
        assert read_records(manifest.path.with_name("train.jsonl"))[-1].turns[0].answer == "<image> is a picture."
        assert {row["id"] or row["position"]: row["kind"] for row in rows(manifest, "rejected")} == {
            "record 3": "other role", "record 4": "not alternating", "record 5": "empty text", "record 6": "too short",
            "record 7": "blocked word", "record 8": "too short", "copy": "duplicate content", "good": "duplicate id",
            "record 11": "plugins", "record 12": "image",
        }  # fmt: skip

    def test_blocked_words_and_short_dialogues(self, tmp_path):
        def dialogue(name, *texts):
            sides = zip(("human", "gpt") * 2, texts, strict=False)
            return {"id": name, "conversations": [{"from": side, "value": text} for side, text in sides]}

        raw = [
            dialogue("15", "12345678", " 1234567 "), dialogue("16", "12345678", "abcdefgh"),
            dialogue("asked", "What is chatgpt?", "A model."), dialogue("said", "Who are you?", "One of OpenAI's."),
        ]  # fmt: skip
        manifest = convert_raw(tmp_path, "sharegpt", {"sg.json": raw})
        assert [row["id"] for row in rows(manifest, "train")] == ["16", "asked", "said"]
        blocked = convert_raw(tmp_path, "sharegpt", {"sg.json": raw}, blocked_words=["ChatGPT", "openai"])
        assert [row["id"] for row in rows(blocked, "train")] == ["16"]
        assert blocked.rejected == {"too short": 1, "blocked word": 2}

    def test_sharegpt_is_cut_at_a_number_of_tokens(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel({"w": 0, "[U]": 1}, unk_token="[U]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        (tmp_path / "model").mkdir()
        tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))

        def dialogue(name, *lengths):
            turns = [
                {"from": ("human", "gpt")[i % 2], "value": " ".join(f"{name}{i}w{j}" for j in range(n))}
                for i, n in enumerate(lengths)
            ]
            return {"id": name, "conversations": turns}

        raw = [dialogue("a", 4, 6, 3, 3), dialogue("b", 4, 6, 5, 6), dialogue("c", 8, 40), dialogue("d", 16, 4)]
        raw.append(dialogue("e", 15, 4))
        manifest = convert_raw(
            tmp_path, "sharegpt", {"sg.json": raw}, preset=PAPER, max_tokens=16, tokenizer=str(tmp_path / "model")
        )
        lengths = {row["id"]: [len(text.split()) for text in values(row)] for row in rows(manifest, "train")}
        assert lengths == {"a": [4, 6, 3, 3], "b": [4, 6], "c": [8, 8], "e": [15, 1]}
        assert manifest.rejected == {"too long": 1}
        assert manifest.content["notes"] == {"cut at 16 tokens": 3}
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(length=50)  # as a model folder may have it
        tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
        again = convert_raw(
            tmp_path, "sharegpt", {"sg.json": raw}, preset=PAPER, max_tokens=16, tokenizer=str(tmp_path / "model")
        )
        assert rows(again, "train") == rows(manifest, "train")
        with pytest.raises(ValueError, match=r"tokenizer: .*nowhere/tokenizer\.json cannot be read"):
            convert_raw(tmp_path, "sharegpt", preset=PAPER, tokenizer=str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match=r"max_tokens but no tokenizer.*tokenizer\.json"):
            convert_raw(tmp_path, "sharegpt", preset=PAPER)

    def test_mftcoder(self, tmp_path):
        manifest = convert_raw(tmp_path, "mftcoder")
        by_id = {row["id"]: values(row) for row in rows(manifest, "train")}
        assert len(by_id) == 7
        assert by_id["sort/a-2"] == ["Be brief.\n\nSort 1", "  sorted(1)\n", "Why?", "Because."]
        kept = convert_raw(tmp_path, "mftcoder", system="keep")
        (brief,) = (row["conversations"] for row in rows(kept, "train") if row["id"] == "sort/a-2")
        assert [turn["from"] for turn in brief] == ["system", "human", "gpt", "human", "gpt"]
        assert [turn["value"] for turn in brief[:2]] == ["Be brief.", "Sort 1"]
        assert kept.outputs["train"]["questions"] == manifest.outputs["train"]["questions"] == 7 + 3
        one = convert("mftcoder", tmp_path / "raw" / "b.jsonl", tmp_path / "one")
        assert [row["id"] for row in rows(one, "train")] == ["b-1", "b-2", "b-3"]
        dropped = convert_raw(tmp_path, "mftcoder", system="drop", validation=2)
        assert dropped.outputs["validation"]["records"] == 2
        assert not any("brief" in text for row in rows(dropped, "train") for text in values(row))
