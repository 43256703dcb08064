"""JSON files read one element after the other: the values of ``json.loads``, and damage named by its place."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.raw_json import Damage, elements


class TestRawJson:
    nested = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=12,
    )

    @given(st.lists(nested, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]))
    def test_lists_in_small_windows(self, data, window, indent):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setattr("trainer.data.raw_json._WINDOW", window)
            path = Path(folder) / "x.json"
            path.write_text(
                json.dumps(data, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass"
            )
            if not _is_utf8(path):
                return
            assert [element.value for element in elements(path, "list")] == data
            path.write_text(json.dumps({"other": data, "more": {"a": data}, "n": 1.5, "data": data}, indent=indent))
            assert [element.value for element in elements(path, "list", "data")] == data

    @given(st.dictionaries(st.text(max_size=5), nested, max_size=5), st.integers(1, 9))
    def test_objects_in_small_windows(self, data, window):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setattr("trainer.data.raw_json._WINDOW", window)
            path = Path(folder) / "x.json"
            path.write_text(json.dumps(data))
            assert {element.key: element.value for element in elements(path, "object")} == data

    @pytest.mark.parametrize(
        ("text", "read", "place", "reason"),
        [
            ("[1, 2", [1, 2], "byte 5", "middle of a value"),
            ('[1, "ab', [1], "byte 4", "Unterminated string"),
            ("[1 2]", [1], "byte 3", "expected , or ]"),
            ("[1, x" + " " * 40 + "]", [1], "byte 4", "not valid JSON"),
            ("[1] x", [1], "byte 4", "after the end"),
            ("{}", [], "byte 0", "expected ["),
            ("", [], "byte 0", "middle of a value"),
            ("[1, " + "[" * 100_000, [1], "byte 4", "recursion"),
            ("[1, " + "9" * 5000 + ", 2]", [1], "byte 4", "not a usable JSON value"),
        ],
    )
    def test_damage_has_a_place_and_a_reason(self, text, read, place, reason, tmp_path):
        (tmp_path / "x.json").write_text(text)
        *good, bad = elements(tmp_path / "x.json", "list")
        assert [element.value for element in good] == read
        assert isinstance(bad.value, Damage)
        assert bad.where == place
        assert reason in bad.value.reason

    def test_a_member_that_is_not_there(self, tmp_path):
        (tmp_path / "x.json").write_text('{"a": [1], "b": {"c": [2]}, "d": 3}')
        (bad,) = elements(tmp_path / "x.json", "list", "c")
        assert bad.value == Damage("the file has no member 'c'")

    def test_bytes_that_are_not_utf8(self, tmp_path):
        (tmp_path / "x.json").write_bytes(b'["a", "\xff", "b"]')
        *good, bad = elements(tmp_path / "x.json", "list")
        assert [element.value for element in good] == ["a"]
        assert "UTF-8" in bad.value.reason

    def test_lines_go_on_after_damage(self, tmp_path, monkeypatch):
        monkeypatch.setattr("trainer.data.raw_json.LARGEST_ELEMENT", 20)
        lines = [b'\xef\xbb\xbf{"a": 1}\n', b"\n", b'{"a": \n', b'"' + b"x" * 50 + b'"\n', b'"\xff"\n', b"2"]
        (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
        found = list(elements(tmp_path / "x.jsonl", "lines"))
        assert [element.where for element in found] == [f"line {number}" for number in (1, 3, 4, 5, 6)]
        assert [isinstance(element.value, Damage) and element.value.ends for element in found] == [False] * 5
        assert [element.value for element in found if not isinstance(element.value, Damage)] == [{"a": 1}, 2]
        assert [element.offset for element in found] == [sum(map(len, lines[:number])) for number in (1, 3, 4, 5, 6)]
        (tmp_path / "x.jsonl").write_bytes(b'1\n{"a": ')
        *_, cut = elements(tmp_path / "x.jsonl", "lines")
        assert cut.value.ends

    def test_a_damaged_file_does_not_fill_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr("trainer.data.raw_json.LARGEST_ELEMENT", 1000)
        monkeypatch.setattr("trainer.data.raw_json._WINDOW", 100)
        (tmp_path / "x.json").write_text('[1, "' + "x" * 100_000 + '"]')
        *_, bad = elements(tmp_path / "x.json", "list")
        assert "longer than 1000" in bad.value.reason
        assert bad.offset < 10_000


def _is_utf8(path):
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
