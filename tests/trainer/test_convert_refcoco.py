"""RefCOCO, RefCOCO+ and RefCOCOg: conversations, boxes, images that several splits have."""

from __future__ import annotations

import pytest
from raw_data import PAPER, RAW, SENTENCES, convert_raw, rows, values, write_raw

from trainer.data.converters.conversion import convert
from trainer.data.converters.refcoco import box_text


class TestRefCoco:
    @pytest.mark.parametrize("name", ["refcoco-caption", "refcoco-bbox"])
    def test_conversations_have_fewer_than_ten_turns(self, name, tmp_path):
        manifest = convert_raw(tmp_path, name, preset=PAPER)
        train = rows(manifest, "train")
        lengths = sorted(len(row["conversations"]) // 2 for row in train)
        assert sum(lengths) == 2 * 2 * SENTENCES  # two references in each of two data sets
        assert lengths == [2, 9, 9]
        assert len({row["id"] for row in train}) == 3
        assert all(values(row)[0].startswith("<image>\n") for row in train)

    def test_captions(self, tmp_path):
        manifest = convert_raw(tmp_path, "refcoco-caption", preset=PAPER)
        # 200 x 100 padded to 200 x 200 with 50 pixels above: (20, 10 + 50) to (120, 60 + 50) over 200.
        first = values(rows(manifest, "train")[0])
        assert first[0].endswith("\nProvide a short description for this region.")
        assert first[0].split("\n")[1] in ("[0.10,0.30,0.60,0.55]", "[0.10,0.30,0.61,0.55]", "[0.11,0.30,0.61,0.55]")
        (record,) = (row for row in rows(manifest, "testB_refcoco"))
        assert record["references"] == [f"refcoco testB 4 {i}" for i in range(SENTENCES)]
        assert values(record)[1] == record["references"][0]
        assert set(manifest.outputs) == {
            "train", "validation", "testA_refcoco", "testB_refcoco", "test_refcocog",
        }  # fmt: skip

    def test_boxes(self, tmp_path):
        manifest = convert_raw(tmp_path, "refcoco-bbox")
        by_id = {row["id"]: values(row) for row in rows(manifest, "train")}
        assert by_id["refcoco-0-2"] == ["<image>\nrefcoco train 0 2", "[0.10,0.10,0.60,0.60]"]
        assert len(rows(manifest, "testA_refcoco")) == SENTENCES

    def test_one_of_the_three_alone(self, tmp_path):
        manifest = convert("refcoco-bbox", write_raw(tmp_path, RAW["refcoco-bbox"]()) / "refcoco", tmp_path / "out")
        assert set(manifest.outputs) == {"train", "validation", "testA_refcoco", "testB_refcoco"}

    def test_references_that_fit_nothing(self, tmp_path):
        files = RAW["refcoco-bbox"]()
        first, second, *_ = files["refcoco/refs(unc).p"]
        first["split"], second["image_id"] = "trainval", files["refcoco/refs(unc).p"][2]["image_id"]
        manifest = convert_raw(tmp_path, "refcoco-bbox", files)
        assert manifest.rejected == {"malformed": 1, "no partner": 1}
        assert manifest.outputs["train"]["records"] == 2 * SENTENCES

    @pytest.mark.parametrize("side", ["width", "height"])
    def test_an_image_without_a_size(self, side, tmp_path):
        files = RAW["refcoco-bbox"]()
        files["refcoco/instances.json"]["images"][0][side] = 0
        manifest = convert_raw(tmp_path, "refcoco-bbox", files)
        assert manifest.rejected == {"malformed": 1, "no partner": 2}

    @pytest.mark.parametrize("name", ["refcoco-bbox", "refcoco-caption"])
    def test_a_blank_sentence_costs_itself_only(self, name, tmp_path):
        files = RAW[name]()
        train, _, _, test_a, test_b = files["refcoco/refs(unc).p"]
        train["sentences"][1]["sent"] = test_a["sentences"][0]["sent"] = " "
        test_b["sentences"] = [{"sent": ""}]
        manifest = convert_raw(tmp_path, name, files)
        assert (manifest.rejected, manifest.content["notes"]) == ({"empty text": 1}, {"blank sentences": 2})
        assert sum("refcoco train 0" in str(values(row)) for row in rows(manifest, "train")) == SENTENCES - 1
        scored = [
            answer for row in rows(manifest, "testA_refcoco") for answer in row.get("references", values(row)[:1])
        ]
        assert [text.removeprefix("<image>\n") for text in scored] == [
            f"refcoco testA 3 {i}" for i in range(1, SENTENCES)
        ]

    @pytest.mark.parametrize("name", ["refcoco-bbox", "refcoco-caption"])
    def test_training_questions_about_held_out_images(self, name, tmp_path):
        """RefCOCOg's training images are in RefCOCO's validation and test sets, which split COCO's images otherwise."""
        files, shared = RAW[name](), SENTENCES
        assert convert_raw(tmp_path, name, files).content["notes"] == {}
        for entry in (files["refcocog/refs(umd).p"][0], files["refcocog/instances.json"]["annotations"][0]):
            entry["image_id"] = files["refcoco/instances.json"]["annotations"][3]["image_id"]  # testA's
        kept = convert_raw(tmp_path, name, files, merge=True)
        assert kept.content["notes"] == {"training questions about images of validation or test": shared}
        dropped = convert_raw(tmp_path, name, files, merge=True, shared_images="drop")
        assert dropped.rejected == {"shared image": shared}
        assert dropped.content["notes"] == {}
        images = {split: {row["image"] for row in rows(dropped, split)} for split in dropped.outputs}
        assert all(images["train"].isdisjoint(images[split]) for split in images if split != "train")
        assert kept.outputs["train"]["questions"] - dropped.outputs["train"]["questions"] == shared

    @pytest.mark.parametrize(
        ("box", "size", "space", "text"),
        [
            ([0, 0, 100, 50], (100, 50), "image", "[0.00,0.00,1.00,1.00]"),
            ([0, 0, 100, 50], (100, 50), "pad", "[0.00,0.25,1.00,0.75]"),
            ([0, 0, 50, 100], (50, 100), "pad", "[0.25,0.00,0.75,1.00]"),
            ([10, 20, 30, 40], (100, 100), "pad", "[0.10,0.20,0.40,0.60]"),
            # 201 - 100 = 101 missing rows: 50 before the image, 51 after it.
            ([0, 0, 201, 100], (201, 100), "pad", "[0.00,0.25,1.00,0.75]"),
            ([0, 1, 21, 10], (21, 12), "pad", "[0.00,0.24,1.00,0.71]"),
            ([-1, -1, 202, 102], (200, 100), "image", "[0.00,0.00,1.00,1.00]"),  # a pixel outside may be rounding
            ([1, 2, 0.5, 0.6], (10, 10), "image", "[0.10,0.20,0.15,0.26]"),
        ],
    )
    def test_box_text(self, box, size, space, text):
        assert box_text(box, *size, space) == text

    @pytest.mark.parametrize(
        "box", [[0, 0, 0, 5], [0, 0, 5, -1], [190, 0, 20, 5], [10**400, 0, 5, 5], [-1.5, 0, 20, 5], [0, 9, 0.2, 40],
                [9, -1.5, 9, 9], [182, 0, 19.5, 9], [9, 92, 9, 9.5], [50, 9, -20, 9], [50, 20, 9, -9],
                [0, 99, 9, 9], None, "x",
                [1, 2, 3], [1, 2, 3, float("nan")], [True, 0, 5, 5]]
    )  # fmt: skip
    def test_wrong_boxes_are_rejected_with_their_place(self, box, tmp_path):
        files = RAW["refcoco-bbox"]()
        files["refcoco/instances.json"]["annotations"][1]["bbox"] = box
        manifest = convert_raw(tmp_path, "refcoco-bbox", files)
        assert manifest.rejected == {"wrong box": 1}
        (row,) = rows(manifest, "rejected")
        assert (row["file"], row["position"]) == ("refcoco/refs(unc).p", "record 1")
        assert manifest.outputs["train"]["records"] == 3 * SENTENCES
