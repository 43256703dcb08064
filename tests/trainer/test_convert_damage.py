"""Converters on damaged and hostile input: a report with places, never a traceback or a wrong record."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import pickle
import signal
import struct
import tempfile
import time
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_data import RAW, convert_raw, encoded, llava, png, questions, rows, write_raw

from trainer.data.converters import conversion, staging
from trainer.data.converters.conversion import convert
from trainer.data.converters.pickles import load_plain
from trainer.data.records import read_records
from trainer.locks import holding

PLAIN_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["<image>", "../../etc/passwd", "/etc/passwd", "\ud800", "\0", 10**400, "a\\..\\b", "human"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
FUZZ = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def spots(data, path=()):
    """Every place in nested data."""
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from spots(value, (*path, key))


def replaced(data, path, value):
    """A copy of nested data with another value at a place."""
    if not path:
        return value
    result = copy.copy(data)
    result[path[0]] = replaced(data[path[0]], path[1:], value)
    return result


@cache
def undamaged(name):
    """Every question of the fixture as it is written when nothing is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        return questions(convert_raw(Path(folder), name))


def sound(manifest):
    """What must hold whatever the input was; returns the questions written."""
    content = manifest.content
    for split, entry in manifest.outputs.items():
        path = manifest.path.with_name(f"{split}.jsonl")
        assert len(read_records(path)) == entry["records"] if entry["records"] else path.read_bytes() == b""
    rejected = rows(manifest, "rejected")
    assert all(row["file"] and row["position"] and row["reason"] for row in rejected)
    assert sum(manifest.rejected.values()) == len(rejected)
    return questions(manifest), content


@pytest.mark.parametrize("name", list(RAW))
class TestFuzz:
    """Three kinds of damage for every converter: cut files, changed bytes, changed values."""

    @FUZZ
    @given(st.data())
    def test_a_cut_file_gives_only_true_records(self, name, data):
        with tempfile.TemporaryDirectory() as folder:
            files = RAW[name]()
            whole = undamaged(name)
            path = data.draw(st.sampled_from(sorted(files)))
            content = encoded(path, files[path])
            files[path] = content[: data.draw(st.integers(0, len(content) - 1))]
            found, _ = sound(convert_raw(Path(folder) / "cut", name, files))
            # An image of M3IT cannot change unnoticed: a cut line is no JSON.
            assert all(count <= whole.get(key, 0) for key, count in found.items())

    @FUZZ
    @given(st.data())
    def test_changed_bytes_never_crash(self, name, data):
        with tempfile.TemporaryDirectory() as folder:
            files = RAW[name]()
            path = data.draw(st.sampled_from(sorted(files)))
            content = bytearray(encoded(path, files[path]))
            for _ in range(data.draw(st.integers(1, 4))):
                place = data.draw(st.integers(0, len(content)))
                content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
            files[path] = bytes(content)
            sound(convert_raw(Path(folder), name, files))

    @FUZZ
    @given(st.data())
    def test_a_changed_value_spoils_nothing_else(self, name, data):
        """Records of the raw records that were not touched are all there, word for word."""
        with tempfile.TemporaryDirectory() as folder:
            files = RAW[name]()
            whole = undamaged(name)
            path = data.draw(st.sampled_from(sorted(files)))
            spot = data.draw(st.sampled_from([spot for spot in spots(files[path]) if spot]))
            changed = replaced(files[path], spot, data.draw(PLAIN_JSON))
            try:
                written = encoded(path, changed)
            except (TypeError, ValueError, AttributeError):  # e.g. 10**400 is no JSON number that Python writes
                return
            without = {**files, path: written}
            found, _ = sound(convert_raw(Path(folder) / "changed", name, without))
            top = spot[:2] if isinstance(files[path], dict) and isinstance(files[path].get(spot[0]), list) else spot[:1]
            if top == spot and len(top) < 2 and isinstance(files[path], dict) and not name.startswith(("gqa", "ocr")):
                return  # the whole list of a file is gone
            touched = json.dumps(_at(files[path], top), ensure_ascii=False, default=str)
            lost = {key for key, count in whole.items() if found.get(key, 0) < count}
            assert all(_concerns(key, touched, name, path) for key in lost), (lost, touched)


def _at(data, path):
    for key in path:
        data = data[key]
    return data


def _concerns(key, touched, name, path):
    """Whether a written question stems from a raw record, by the texts that the fixtures make unique."""
    _, image, question, answer, _ = key
    if name == "vqav2":
        return answer in touched or f"What is {answer[1:]}?" in touched
    if name.startswith("refcoco"):
        sentence = question if question.startswith("ref") else answer
        number = sentence.split()[2]
        return sentence in touched or any(
            text in touched for text in (f'"id": {50 + int(number)},', os.path.basename(image))
        )
    return question.split("\n")[-1].removeprefix("<image>") in touched or answer in touched


class TestHostilePickles:
    class Runs:
        def __reduce__(self):
            return os.system, ("touch /tmp/pwned-by-test",)

    @pytest.mark.parametrize("protocol", [0, 1, 2, 4])
    def test_nothing_is_called(self, protocol, tmp_path, monkeypatch):
        path = tmp_path / "refs.p"
        path.write_bytes(pickle.dumps([self.Runs()], protocol))
        monkeypatch.setattr(os, "system", lambda command: pytest.fail("a pickle ran a command"))
        with pytest.raises(ValueError, match="it would run code"):
            load_plain(path)
        files = RAW["refcoco-bbox"]()
        files["refcoco/refs(unc).p"] = path.read_bytes()
        manifest = convert_raw(tmp_path, "refcoco-bbox", files)
        assert manifest.rejected == {"damaged": 1}
        assert not manifest.complete
        assert manifest.outputs["test_refcocog"]["records"] > 0  # the other data set is not lost

    @pytest.mark.parametrize(
        "content",
        [
            b"cos\nsystem\n.", b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", b"Pnowhere\n.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93.", b"", b"garbage", b"]" * 10, b"\x82\x01.",
        ],
    )  # fmt: skip
    def test_other_tricks(self, content, tmp_path):
        (tmp_path / "x.p").write_bytes(content)
        with pytest.raises(ValueError, match="not a pickle of plain data"):
            load_plain(tmp_path / "x.p")

    @pytest.mark.parametrize("content", [b"(lp4000000000\n.", b"]r\xff\xff\xff\xff."])
    def test_a_claimed_table_takes_no_memory(self, content, tmp_path):
        (tmp_path / "x.p").write_bytes(content)
        tracemalloc.start()
        assert load_plain(tmp_path / "x.p") == []
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20

    @pytest.mark.parametrize("protocol", range(6))
    def test_plain_data_of_every_protocol(self, protocol, tmp_path):
        data = [{"a": [1, -2, 2**80, 1.5, None, True, "é", ("x",)], "b": {}}] * 3
        (tmp_path / "x.p").write_bytes(pickle.dumps(data, protocol))
        assert load_plain(tmp_path / "x.p") == data

    def test_python_2_strings(self, tmp_path):
        (tmp_path / "x.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'id'\nL5L\nsa.")
        assert load_plain(tmp_path / "x.p") == [{"sent": "café", "id": 5}]


class TestImages:
    def convert(self, tmp_path, **options):
        (tmp_path / "images" / "coco").mkdir(parents=True, exist_ok=True)
        for number in range(0 if (tmp_path / "out").exists() else 9):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / "coco" / f"{number}.jpg")
        return convert_raw(tmp_path, "sharegpt4v", image_root=str(tmp_path / "images"), **options)

    def test_missing_broken_and_huge(self, tmp_path):
        folder = tmp_path / "images" / "coco"
        self.convert(tmp_path)
        (folder / "1.jpg").unlink()
        (folder / "2.jpg").write_bytes(b"not an image")
        (folder / "3.jpg").write_bytes(_bomb(20_000, 20_000))
        (folder / "4.jpg").write_bytes(_bomb(10_000, 10_000))  # Pillow alone would only warn
        manifest = self.convert(tmp_path)
        kinds = {row["position"]: row["kind"] for row in rows(manifest, "rejected")}
        assert kinds == {
            "record 1": "missing image", "record 2": "unreadable image", "record 3": "decompression bomb",
            "record 4": "decompression bomb",
        }  # fmt: skip
        assert manifest.outputs["train"]["records"] == 5
        assert manifest.content["images_checked"]

    def test_links_out_of_the_root(self, tmp_path):
        self.convert(tmp_path)
        link = tmp_path / "images" / "coco" / "5.jpg"
        outside = tmp_path / "secret.jpg"
        link.rename(outside)
        link.symlink_to(outside)
        manifest = self.convert(tmp_path)
        assert manifest.rejected == {"outside the image root": 1}
        assert "follow_links" in rows(manifest, "rejected")[0]["reason"]
        assert not self.convert(tmp_path, follow_links=True).rejected

    @pytest.mark.parametrize(
        "path", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "a\\..\\b.jpg", "", "a\0b", "\ud800"]
    )
    def test_paths_out_of_the_root(self, path, tmp_path):
        raw = llava()
        raw[3] = {**raw[3], "image": path}
        manifest = convert_raw(tmp_path, "llava-mix665k", {"m.json": raw})
        assert sum(manifest.rejected.values()) == 1
        assert rows(manifest, "rejected")[0]["position"] == "record 3"

    def test_merged_questions_about_a_missing_image_are_all_reported(self, tmp_path):
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "10.jpg")
        manifest = convert_raw(tmp_path, "gqa", merge=True, image_root=str(tmp_path / "images"))
        assert [row["image"] for row in rows(manifest, "train")] == ["10.jpg"]
        assert manifest.rejected == {"missing image": 5 + 6 + 2}

    def test_a_sample_is_refilled_after_missing_images(self, tmp_path):
        (tmp_path / "images").mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"n{number}.jpg")
        manifest = convert_raw(tmp_path, "gqa", validation=3, image_root=str(tmp_path / "images"))
        assert {row["image"] for row in rows(manifest, "validation")} == {"n0.jpg", "n1.jpg", "n2.jpg"}

    def test_m3it_refuses_bombs_and_noise(self, tmp_path):
        import base64

        def row(content):
            return {"instruction": "i", "inputs": "", "outputs": "o", "image_base64_str": content}

        bomb, inner = (base64.b64encode(_bomb(*size)).decode() for size in ((30_000, 30_000), (4, 4, b"0" * 2**21)))
        manifest = convert_raw(
            tmp_path, "m3it", {"train.jsonl": [row([bomb]), row([inner]), row(["@@"]), row([png(1)]), row("AAAA")]}
        )
        assert manifest.rejected == {"decompression bomb": 1, "unreadable image": 3}
        assert manifest.outputs["train"]["records"] == 1


def _bomb(width, height, text=b"x"):
    """A PNG of a few bytes that says it is huge, or whose text is."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    head += chunk(b"zTXt", b"a\0\0" + zlib.compress(text))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def endless_but_the_first(reading):
    """In place of ``read_source``, in a process of its own: which signal it gets when its parent ends."""
    if reading.number:
        time.sleep(20)
    sent = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(sent))  # PR_GET_PDEATHSIG
    return sent.value


class TestInterrupted:
    def test_reading_goes_on_where_it_was(self, tmp_path, monkeypatch):
        source = write_raw(tmp_path / "raw", {"m.json": llava(count=40)})
        whole = convert("llava-mix665k", source, tmp_path / "whole")
        monkeypatch.setattr(staging, "BATCH", 10)
        taken = []
        original = staging._Reader._take

        def dies(self, element):
            if len(taken) == 25:
                raise KeyboardInterrupt
            taken.append(element.where)
            original(self, element)

        monkeypatch.setattr(staging._Reader, "_take", dies)
        with pytest.raises(KeyboardInterrupt):
            convert("llava-mix665k", source, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.json*"))  # nothing that could be taken for a result
        monkeypatch.setattr(
            staging._Reader, "_take", lambda self, element: (taken.append(element.where), original(self, element))
        )
        for lock, busy in ((".lock", "another process is conv"), (".staging/0.lock", "a process of an earlier conv")):
            with holding(tmp_path / "out" / lock, "the test"), pytest.raises(ValueError, match=busy):
                convert("llava-mix665k", source, tmp_path / "out")
        resumed = convert("llava-mix665k", source, tmp_path / "out")
        assert taken[25:] == [f"record {i}" for i in range(20, 40)]  # the last commit was after 20
        assert resumed.content == whole.content
        assert not (tmp_path / "out" / ".staging").exists()

    def test_processes_that_read_end_at_once_and_with_their_parent(self, tmp_path, monkeypatch):
        source = write_raw(tmp_path / "raw", RAW["chartqa"]())
        found = []

        def interrupted(futures):
            found.extend(future.result() for future, number in futures.items() if number == 0)
            raise KeyboardInterrupt

        monkeypatch.setattr(conversion, "read_source", endless_but_the_first)
        monkeypatch.setattr(conversion, "as_completed", interrupted)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            convert("chartqa", source, tmp_path / "out", workers=2)
        assert time.monotonic() - started < 15
        assert found == [signal.SIGTERM]  # what the kernel sends to one whose parent is killed

    def test_writing_starts_over_without_repeating_rejections(self, tmp_path, monkeypatch):
        from trainer.data.converters.writing import OutputFile

        (tmp_path / "images" / "coco").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "coco" / "1.jpg")
        source = write_raw(tmp_path / "raw", {"m.json": llava()})
        options = {"image_root": str(tmp_path / "images")}

        def dies(self):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(OutputFile, "finish", dies)
            with pytest.raises(KeyboardInterrupt):
                convert("llava-mix665k", source, tmp_path / "out", options)
        manifest = convert("llava-mix665k", source, tmp_path / "out", options)
        assert manifest.rejected == {"missing image": 8}
        assert manifest.outputs["train"]["records"] == 1

    def test_a_finished_conversion_is_not_done_again(self, tmp_path, monkeypatch):
        source = write_raw(tmp_path / "raw", {"m.json": llava()})
        first = convert("llava-mix665k", source, tmp_path / "out")
        monkeypatch.setattr(staging._Reader, "_take", lambda *_: pytest.fail("it read again"))
        assert convert("llava-mix665k", source, tmp_path / "out").content == first.content

    def test_another_conversion_is_not_overwritten_unasked(self, tmp_path):
        source = write_raw(tmp_path / "raw", {"m.json": llava()})
        convert("llava-mix665k", source, tmp_path / "out", {"validation": 2})
        with pytest.raises(ValueError, match="holds another conversion"):
            convert("llava-mix665k", source, tmp_path / "out")
        manifest = convert("llava-mix665k", source, tmp_path / "out", overwrite=True)
        assert set(manifest.outputs) == {"train"}
        assert not (tmp_path / "out" / "validation.jsonl").exists()

    def test_files_that_no_conversion_wrote_are_kept(self, tmp_path):
        """Raw data of XTREME-UP has the names of outputs: train.jsonl."""
        source = write_raw(tmp_path / "raw", RAW["xtreme-up-qa"]())
        (raw,) = source.rglob("train/te.jsonl")
        raw = raw.rename(source / "train.jsonl")
        before = raw.read_bytes()
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="raw holds the raw data of 'xtreme-up-qa'; records need a folder"):
                convert("xtreme-up-qa", source, source, overwrite=overwrite)
        other = tmp_path / "out" / "train.jsonl"
        other.parent.mkdir()
        other.write_text("mine")
        with pytest.raises(ValueError, match=r"out holds train\.jsonl of unknown origin"):
            convert("xtreme-up-qa", source, other.parent)
        assert (raw.read_bytes(), other.read_text()) == (before, "mine")
        convert("xtreme-up-qa", source, other.parent, overwrite=True)
        (other.parent / "mine.jsonl").write_text("mine")
        convert("xtreme-up-qa", source, other.parent, {"train": 1}, overwrite=True)
        assert len(other.read_text().splitlines()) == 1
        assert (other.parent / "mine.jsonl").read_text() == "mine"

    def test_outputs_inside_the_raw_folder_are_not_read_again(self, tmp_path):
        source = write_raw(tmp_path / "raw", RAW["mftcoder"]())
        first = convert("mftcoder", source, source / "out")
        assert convert("mftcoder", source, source / "out").content == first.content
        assert convert("mftcoder", source, source / "out", overwrite=True).content == first.content
