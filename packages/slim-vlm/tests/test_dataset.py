"""Sets of images: every form they come in, and what is wrong with the broken ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import slim_vlm.dataset
import slim_vlm.records
from slim_core.errors import InvalidDatasetError
from slim_vlm.dataset import ImageSample, find_dataset, read_samples
from slim_vlm.resources import CALIBRATION_FOLDER

DEFAULT = "Describe it."


def picture(folder: Path, *names: str) -> None:
    """Pictures of 2 x 2 pixels, JPEG or PNG by name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.lower().endswith("png") else "JPEG"
        Image.new("RGB", (2, 2), "red").save(folder / name, kind)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def names(samples: Iterable[ImageSample]) -> list[str]:
    return [sample.image.name for sample in samples]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InvalidDatasetError) as caught:
        read_samples(path, DEFAULT, **options)
    assert caught.value.where
    assert caught.value.remedy
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one picture, a.jpg."""
    path = tmp_path / "set"
    path.mkdir()
    picture(path, "a.jpg")
    return path


class TestNames:
    def test_a_bundled_set(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_dataset("calibImages") == CALIBRATION_FOLDER / "calibImages"

    def test_a_bundled_set_comes_before_the_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "calibImages").mkdir()
        assert find_dataset("calibImages") == CALIBRATION_FOLDER / "calibImages"
        assert "the bundled calibration set calibImages is used" in caplog.text
        caplog.clear()
        assert find_dataset("./calibImages").resolve() == tmp_path / "calibImages"
        assert find_dataset("calibImages/").resolve() == tmp_path / "calibImages"
        assert not caplog.records

    def test_no_warning_where_both_are_the_same(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.chdir(CALIBRATION_FOLDER)
        find_dataset("calibImages")
        assert not caplog.records

    @pytest.mark.parametrize(
        "name", ["mine", "two words", "图片", "a.jsonl", "sub/mine", "./mine", "../here/mine", "."]
    )
    def test_what_is_in_the_working_folder(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        Path(name).mkdir(parents=True, exist_ok=True)
        assert find_dataset(name).resolve() == (here / name).resolve()
        assert find_dataset(str(here / name)).resolve() == (here / name).resolve()

    @pytest.mark.parametrize(
        "name",
        [
            "calibimages",
            "calibImages.jsonl",
            "",
            "./no",
            "no/calibImages",
            "a\0b",
            "\ud83d",
            "x" * 300,
            "x/" * 3000,
            "/no",
        ],
    )
    def test_what_is_nowhere(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InvalidDatasetError, match=r"spec\.dataset: .* does not exist \(.*one of: calibImages\)"):
            find_dataset(name)

    @pytest.mark.parametrize("target", ["loop", "nothing"])
    def test_links_to_nowhere(self, target: str, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to(target)
        with pytest.raises(InvalidDatasetError, match=r"spec\.dataset: .* leads nowhere"):
            find_dataset(str(tmp_path / "loop"))

    def test_a_bundled_set_of_texts_is_found_and_refused(self) -> None:
        """Also where the wheel of slim-vlm lies without it."""
        for name in ("mix_calib.jsonl", str(CALIBRATION_FOLDER / "mix_calib.jsonl")):
            message = refusal(find_dataset(name))
            assert "mix_calib.jsonl:1: has no 'image': texts are what modelslim_v1 calibrates" in message
            assert "shown pictures and prompts" in message

    def test_sets_of_texts_are_found_in_slim_llm(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(slim_vlm.dataset, "CALIBRATION_FOLDER", tmp_path)
        assert find_dataset("mix_calib.jsonl").is_file()


class TestFolders:
    def test_pictures_in_order_of_their_names(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        picture(tmp_path, "b.png", "a.JPG", "c 图.JpEg", "10.PNG", "2.png")
        (tmp_path / "notes.txt").write_text("not a picture")
        (tmp_path / "photo.gif").write_text("nor this")
        assert read_samples(tmp_path, DEFAULT) == [
            ImageSample(str(tmp_path / name), tmp_path / name, DEFAULT)
            for name in ("10.PNG", "2.png", "a.JPG", "b.png", "c 图.JpEg")
        ]
        assert not caplog.records

    def test_folders_in_it_and_hidden_files_are_not_read(self, tmp_path: Path) -> None:
        picture(tmp_path, "a.jpg", "sub/b.jpg", "dir.jpg/c.jpg", "._a.jpg")
        (tmp_path / "index.json").mkdir()
        (tmp_path / ".hidden.jsonl").write_text("broken")
        assert names(read_samples(tmp_path, DEFAULT)) == ["a.jpg"]

    def test_links_are_followed(self, folder: Path, tmp_path: Path) -> None:
        picture(tmp_path, "elsewhere.png")
        (folder / "b.png").symlink_to("../elsewhere.png")
        (tmp_path / "link").symlink_to("set")
        assert names(read_samples(tmp_path / "link", DEFAULT)) == ["a.jpg", "b.png"]

    @pytest.mark.parametrize("name", ["index.json", "index.jsonl", "数据.JSON", "my list.jsonl"])
    def test_with_a_file_that_lists_them(self, name: str, folder: Path) -> None:
        record = {"image": "a.jpg", "text": "What?"}
        path = written(folder, name, json.dumps(record))
        where = f"{path}:1" if name.endswith("l") else str(path)
        expected = [ImageSample(where, folder / "a.jpg", "What?")]
        assert read_samples(folder, DEFAULT) == expected
        assert read_samples(path, DEFAULT) == expected

    def test_a_list_without_pictures_beside_it(self, folder: Path, tmp_path: Path) -> None:
        picture(tmp_path, "lists/sub/b.png")
        written(tmp_path / "lists", "l.jsonl", lines({"image": str(folder / "a.jpg")}, {"image": "sub/b.png"}))
        assert [sample.image for sample in read_samples(tmp_path / "lists", DEFAULT)] == [
            folder / "a.jpg",
            tmp_path / "lists" / "sub" / "b.png",
        ]

    def test_pictures_that_are_not_listed(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        """They are not used, and one line says so. A link to a listed picture is that picture."""
        picture(folder, *(f"{i}.png" for i in range(7)))
        (folder / "link.jpg").symlink_to("a.jpg")
        path = written(folder, "l.jsonl", lines({"image": "a.jpg", "text": "x"}))
        assert names(read_samples(folder, DEFAULT)) == ["a.jpg"]
        assert [record.message for record in caplog.records] == [
            f"7 of the pictures in {folder} are not used, because l.jsonl does not list them: "
            "0.png, 1.png, 2.png, 3.png, 4.png, and 2 more"
        ]
        caplog.clear()
        read_samples(path, DEFAULT)
        assert not caplog.records
        listed = ("link.jpg", *(f"{i}.png" for i in range(7)))
        written(folder, "l.jsonl", lines(*({"image": name, "text": "x"} for name in listed)))
        read_samples(folder, DEFAULT)
        assert not caplog.records

    @pytest.mark.parametrize("others", [("index.json", "index.jsonl"), ("a.jsonl", "b.jsonl"), ("x.JSON", "y.json")])
    def test_several_lists(self, others: tuple[str, ...], folder: Path) -> None:
        for name in others:
            written(folder, name, "{}")
        assert f"{folder}: has 2 files that could list the samples: {', '.join(others)}" in refusal(folder)

    @pytest.mark.parametrize("content", [(), ("notes.txt", "photo.webp"), ("sub.jpg/a.jpg",)])
    def test_nothing_to_read(self, content: tuple[str, ...], tmp_path: Path) -> None:
        picture(tmp_path, *content)
        assert f"{tmp_path}: there is no picture in the folder" in refusal(tmp_path)

    def test_an_unreadable_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> list[str]:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "listdir", refuse)
        assert f"{folder}: cannot be read: Permission denied" in refusal(folder)

    @pytest.mark.parametrize(
        ("target", "problem"),
        [("b.jpg", "cannot be opened: Too many levels of symbolic links"), ("no.jpg", "is a link to something")],
    )
    def test_links_to_nowhere(self, target: str, problem: str, folder: Path) -> None:
        (folder / "b.jpg").symlink_to(target)
        assert f"{folder / 'b.jpg'}: {problem}" in refusal(folder)

    def test_what_is_no_file(self, folder: Path) -> None:
        os.mkfifo(folder / "b.png")
        assert f"{folder / 'b.png'}: is not a regular file" in refusal(folder)

    def test_without_answers(self, folder: Path) -> None:
        assert f"{folder}: is a folder of pictures without answers" in refusal(folder, answers=True)


class TestFiles:
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    def test_jsonl(self, end: str, mark: str, folder: Path) -> None:
        """Blank lines count for the numbers of lines; the separator U+2028 inside of a text ends none."""
        rows = ["", '{"image": "a.jpg", "text": "one\u2028two"}', " \t", '{"text": "二", "image": "./a.jpg"}', "", ""]
        path = written(folder, "l.jsonl", mark + end.join(rows))
        assert read_samples(path, DEFAULT) == [
            ImageSample(f"{path}:2", folder / "a.jpg", "one\u2028two"),
            ImageSample(f"{path}:4", folder / "a.jpg", "二"),
        ]

    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    def test_json(self, mark: str, folder: Path) -> None:
        records = [{"image": "a.jpg", "text": "one"}, {"image": "a.jpg", "text": "two", "audio": None, "video": None}]
        path = written(folder, "l.json", mark + json.dumps(records, indent=2).replace("\n", "\r\n"))
        assert read_samples(path, DEFAULT) == [
            ImageSample(f"{path}[0]", folder / "a.jpg", "one"),
            ImageSample(f"{path}[1]", folder / "a.jpg", "two"),
        ]

    def test_the_same_picture_several_times(self, folder: Path) -> None:
        rows = [{"image": "a.jpg", "text": text} for text in ("x", "y", "x")]
        assert [sample.text for sample in read_samples(written(folder, "l.jsonl", lines(*rows)), "")] == ["x", "y", "x"]

    @given(
        st.lists(
            st.fixed_dictionaries(
                {"image": st.just("a.jpg")},
                optional={
                    "text": st.none()
                    | st.text(st.characters(exclude_categories=["Cs"])).filter(lambda t: not t.isspace()),
                    "answer": st.none() | st.text(st.characters(exclude_categories=["Cs"])),
                    "audio": st.none(),
                },
            ),
            min_size=1,
            max_size=6,
        ),
        st.booleans(),
        st.booleans(),
    )
    def test_what_is_written_is_read(self, rows: list[dict[str, Any]], one_per_line: bool, ascii_only: bool) -> None:
        """Any text, from both kinds of file, whole."""
        with TemporaryDirectory() as name:
            picture(Path(name), "a.jpg")
            separator = "\n" if one_per_line else ","
            content = separator.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
            path = Path(name) / ("l.jsonl" if one_per_line else "l.json")
            path.write_bytes((content if one_per_line else f"[{content}]").encode())
            samples = read_samples(path, DEFAULT)
        assert [(sample.text, sample.answer) for sample in samples] == [
            (row.get("text") or DEFAULT, row.get("answer") or "") for row in rows
        ]

    @pytest.mark.parametrize("missing", [{}, {"text": None}, {"text": ""}])
    def test_samples_without_text(self, missing: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        record = {"image": "a.jpg"}
        path = written(folder, "l.jsonl", lines({**record, "text": "x"}, {**record, **missing}, {**record, **missing}))
        assert [sample.text for sample in read_samples(path, DEFAULT)] == ["x", DEFAULT, DEFAULT]
        assert [entry.message for entry in caplog.records] == [
            f"2 of the 3 samples of {path} have no text and get the default prompt, 'Describe it.'; "
            f"the first is {path}:2"
        ]

    @pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "\ufeff\r\n"])
    @pytest.mark.parametrize("name", ["l.json", "l.jsonl"])
    def test_empty(self, name: str, content: str, folder: Path) -> None:
        path = written(folder, name, content)
        assert refusal(path).startswith(f"{path}: lists no sample (")
        assert refusal(folder) == refusal(path)

    def test_an_empty_array(self, folder: Path) -> None:
        assert "l.json: lists no sample" in refusal(written(folder, "l.json", "[]"))

    @pytest.mark.parametrize(
        ("name", "content", "where", "problem"),
        [
            ("l.jsonl", '{"image": "a.jpg"}\n\n{"image": "a.jpg"\n', ":3", "not valid JSON: Expecting ',' delimiter"),
            ("l.jsonl", '[\n{"image": "a.jpg"}\n]', ":1", "not valid JSON"),
            ("l.jsonl", '[{"image": "a.jpg"}]', ":1", "is an array, not an object"),
            ("l.jsonl", "[" * 99_999, ":1", "not valid JSON"),
            ("l.jsonl", "9" * 9_999, ":1", "not valid JSON"),
            (
                "l.json",
                '[{"image": "a.jpg"},\n{"image" "a.jpg"}]',
                "",
                "not valid JSON: Expecting ':' delimiter: line 2",
            ),
            ("l.json", '{"image": "a.jpg"}\n{"image": "a.jpg"}\n', "", "one object per line must be called .jsonl"),
            ("l.json", "[" * 99_999, "", "not valid JSON"),
            ("l.json", '[{"image": "a.jpg"}, 5]', "[1]", "is a number, not an object"),
            ("l.json", "[null]", "[0]", "is null, not an object"),
            ("l.json", "true", "", "is a boolean, not an object"),
            ("l.jsonl", '{"image": "a.jpg", "image": "b.jpg"}', ":1", "in one object, the key 'image' stands twice"),
            ("l.json", '[{"text": "a", "text": "b"}]', "", "in one object, the key 'text' stands twice"),
            ("l.jsonl", b'{"image": "a.jpg"}\n\xff\xfe', ":2", "is not UTF-8 text (byte 19)"),
            ("l.json", '{"image": "a.jpg"}'.encode("utf-16"), ":1", "is not UTF-8 text (byte 0)"),
        ],
    )
    def test_what_is_no_json(self, name: str, content: str | bytes, where: str, problem: str, folder: Path) -> None:
        path = written(folder, name, content)
        assert refusal(path).startswith(f"{path}{where}: ")
        assert problem in refusal(path)

    @pytest.mark.parametrize("name", ["l.csv", "l", "l.parquet", "l.txt"])
    def test_other_files(self, name: str, folder: Path) -> None:
        path = written(folder, name, "content")
        assert f"{path}: '{path.suffix}' files are not read" in refusal(path)

    def test_texts_of_slim_llm(self, folder: Path) -> None:
        assert "texts are what modelslim_v1" in refusal(written(folder, "l.txt", "A text."))

    def test_a_picture(self, folder: Path) -> None:
        assert "a.jpg: is a picture, not a set of pictures" in refusal(folder / "a.jpg")

    def test_a_large_file(self, folder: Path) -> None:
        path = written(folder, "l.jsonl", "")
        os.truncate(path, (64 << 20) + 1)
        assert f"{path}: is larger than 64 MiB" in refusal(path)

    def test_the_largest_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = written(folder, "l.jsonl", lines({"image": "a.jpg"}))
        monkeypatch.setattr(slim_vlm.records, "_MAX_BYTES", path.stat().st_size)
        assert len(read_samples(path, DEFAULT)) == 1
        monkeypatch.setattr(slim_vlm.records, "_MAX_BYTES", path.stat().st_size - 1)
        refusal(path)

    @pytest.mark.parametrize("name", ["l.json", "l.jsonl"])
    def test_files_that_cannot_be_read(self, name: str, folder: Path) -> None:
        path = folder / name
        assert f"{path}: cannot be read: No such file" in refusal(path)
        path.symlink_to(name)
        assert f"{path}: cannot be read: Too many levels of symbolic links" in refusal(path)
        assert f"{path}: cannot be read: Too many levels of symbolic links" in refusal(folder)
        path.unlink()
        os.mkfifo(path)
        assert f"{path}: is not a regular file" in refusal(path)


RECORDS: list[tuple[dict[str, Any] | str, str]] = [
    ({"imgae": "a.jpg"}, "unknown key 'imgae' (did you mean 'image'?)"),
    ({"imgae": "a.jpg", "text": "x"}, "unknown key 'imgae' (did you mean 'image'?)"),
    ({"image": "a.jpg", "Text": "x"}, "unknown key 'Text' (did you mean 'text'?)"),
    ({"image": "a.jpg", "answers": "x"}, "unknown key 'answers' (did you mean 'answer'?)"),
    ({"image": "a.jpg", "audios": None}, "unknown key 'audios' (did you mean 'audio'?)"),
    ({"image": "a.jpg", "kind": 1}, "unknown key 'kind' (a sample has 'image', 'text', 'answer')"),
    ({"image": "a.jpg", "": 1}, "unknown key ''"),
    ({"image": "a.jpg", "messages": []}, "unknown key 'messages' (a sample has"),
    ({"image_path": "a.jpg", "text": "x"}, "unknown key 'image_path' (did you mean 'image'?)"),
    ({"image": "a.jpg", "audio": "a.wav"}, "has 'audio', but only images are calibrated"),
    ({"image": "a.jpg", "video": ""}, "has 'video', but only images are calibrated"),
    ({"video": "a.mp4"}, "has 'video', but only images are calibrated"),
    ({}, "has no 'image' (add the path of a picture)"),
    ({"image": None}, "has no 'image' (add"),
    ({"image": ""}, "has no 'image' (add"),
    ({"image": "", "text": "x"}, "has no 'image' (add"),
    ({"answer": "x"}, "has no 'image' (add"),
    ({"text": "x"}, "has no 'image': texts are what modelslim_v1 calibrates language models with"),
    ({"image": None, "text": "x"}, "has no 'image': texts are what"),
    ({"inputs_pretokenized": "x", "kind": "english"}, "has no 'image': texts are what"),
    ({"messages": []}, "has no 'image': texts are what"),
    ("a text", "is a text without an image: texts are what"),
    ({"image": ["a.jpg"]}, "'image' is an array, not a string"),
    ({"image": 5}, "'image' is a number, not a string"),
    ({"image": "a\0.jpg"}, "'image' holds the character NUL"),
    ({"image": "\ud83d.jpg"}, r"'image' holds half of a surrogate pair ('\ud83d')"),
    ({"image": "a.jpg", "text": "x\udc00"}, r"'text' holds half of a surrogate pair ('\udc00')"),
    ({"image": "a.jpg", "text": " \n"}, "'text' is blank"),
    ({"image": "a.jpg", "text": "\u3000"}, "'text' is blank"),
    ({"image": "a.jpg", "text": 5}, "'text' is a number, not a string (put it in quotes)"),
    ({"image": "a.jpg", "text": 0}, "'text' is a number, not a string"),
    ({"image": "a.jpg", "text": False}, "'text' is a boolean, not a string"),
    ({"image": "a.jpg", "text": []}, "'text' is an array, not a string"),
    ({"image": "a.jpg", "text": {"en": "x"}}, "'text' is an object, not a string"),
    ({"image": "a.jpg", "answer": 5}, "'answer' is a number, not a string"),
    ({"image": "b.jpg"}, "the image 'b.jpg' does not exist"),
    ({"image": "A.jpg"}, "the image 'A.jpg' does not exist"),
    ({"image": "sub/a.jpg"}, "the image 'sub/a.jpg' does not exist"),
    ({"image": "/nothing/a.jpg"}, "the image '/nothing/a.jpg' does not exist"),
    ({"image": "~/a.jpg"}, "the image '~/a.jpg' does not exist"),
    ({"image": "http://example.org/a.jpg"}, "the image 'http://example.org/a.jpg' does not exist"),
    ({"image": "a.jpg/a.jpg"}, "the image 'a.jpg/a.jpg' cannot be opened: Not a directory"),
    ({"image": "a.jpg/../a.jpg"}, "the image 'a.jpg/../a.jpg' cannot be opened: Not a directory"),
    ({"image": "x" * 300 + ".jpg"}, "cannot be opened: File name too long"),
    ({"image": "a.gif"}, "the image 'a.gif' has the suffix '.gif' (use pictures of the kinds .jpg, .jpeg, .png)"),
    ({"image": "a"}, "the image 'a' has the suffix ''"),
    ({"image": "dir.jpg"}, "the image 'dir.jpg' is a folder"),
    ({"image": "."}, "the image '.' has the suffix ''"),
    ({"image": "loop.jpg"}, "the image 'loop.jpg' cannot be opened: Too many levels of symbolic links"),
    ({"image": "ring/a.jpg"}, "the image 'ring/a.jpg' cannot be opened: Too many levels of symbolic links"),
    ({"image": "broken.jpg"}, "the image 'broken.jpg' is a link to something that does not exist"),
    ({"image": "pipe.jpg"}, "the image 'pipe.jpg' is not a regular file"),
    ({"image": "huge.jpg"}, "the image 'huge.jpg' is larger than 256 MiB"),
    ({"image": "../out.jpg"}, "the image '../out.jpg' lies outside of "),
    ({"image": "../set/a.jpg"}, "the image '../set/a.jpg' lies outside of "),
    ({"image": "dir.jpg/../../out.jpg"}, "the image 'dir.jpg/../../out.jpg' lies outside of "),
    ({"image": "../../../../../../../../etc/a.png"}, "lies outside of "),
    ({"image": "away.jpg"}, "the image 'away.jpg' lies outside of "),
    ({"image": "away/out.jpg"}, "the image 'away/out.jpg' lies outside of "),
    ({"image": "inner/../out.jpg"}, "the image 'inner/../out.jpg' lies outside of "),
]


@pytest.fixture
def tricky(folder: Path) -> Path:
    """A folder with links, a pipe, a folder and a huge file, and a picture beside it."""
    picture(folder.parent, "out.jpg")
    picture(folder, "dir.jpg/b.jpg")
    (folder.parent / "other").mkdir()
    for name, target in (
        ("loop.jpg", "loop.jpg"),
        ("ring", "gnir"),
        ("gnir", "ring"),
        ("broken.jpg", "nothing.jpg"),
        ("away.jpg", "../out.jpg"),
        ("away", ".."),
        ("inner", "../other"),
        ("near.jpg", "dir.jpg/b.jpg"),
    ):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.jpg")
    written(folder, "huge.jpg", "")
    os.truncate(folder / "huge.jpg", (256 << 20) + 1)
    return folder


@pytest.mark.parametrize(("record", "problem"), RECORDS, ids=[str(record)[:60] for record, _ in RECORDS])
def test_records_that_are_refused(record: dict[str, Any] | str, problem: str, tricky: Path) -> None:
    """From a JSONL file, an array and a single object; after a good one, which does not save the set."""
    good = {"image": "a.jpg"}
    for name, content, where in (
        ("l.jsonl", f"{json.dumps(good)}\n\n{json.dumps(record)}\n", ":3"),
        ("l.json", json.dumps([good, record]), "[1]"),
        ("l.json", json.dumps(record), ""),
    ):
        path = written(tricky, name, content)
        message = refusal(path)
        assert message.startswith(f"{path}{where}: ")
        assert problem in message


@pytest.mark.parametrize("name", ["./a.jpg", "dir.jpg/b.jpg", "dir.jpg/../a.jpg", "near.jpg"])
def test_paths_that_stay_inside(name: str, tricky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the folder of the file, from whatever folder and through whatever link that is reached."""
    path = written(tricky, "l.jsonl", lines({"image": name}))
    (tricky.parent / "link").symlink_to("set")
    monkeypatch.chdir(tricky.parent)
    for reached in (path, Path("set/l.jsonl"), Path("link/l.jsonl")):
        (sample,) = read_samples(reached, DEFAULT)
        assert sample.image.samefile(tricky / name)


def test_absolute_paths_may_be_anywhere(tricky: Path) -> None:
    rows = [{"image": str(tricky.parent / "out.jpg")}, {"image": str(tricky / "away.jpg")}]
    samples = read_samples(written(tricky, "l.jsonl", lines(*rows)), DEFAULT)
    assert all(sample.image.samefile(tricky.parent / "out.jpg") for sample in samples)


@given(st.lists(st.sampled_from(["..", ".", "in", "up", "down", "a.jpg"]), min_size=1, max_size=6))
def test_no_relative_path_leads_out(parts: list[str]) -> None:
    """Whatever is made of folders, links up and down, and steps back: what is read lies below the folder."""
    with TemporaryDirectory() as name:
        top = Path(name).resolve() / "top"
        picture(top.parent, "a.jpg", "in/a.jpg", "top/a.jpg", "top/in/a.jpg", "top/in/in/a.jpg")
        (top / "up").symlink_to("..")
        (top / "down").symlink_to("in/in")
        path = written(top, "l.jsonl", lines({"image": "/".join((*parts, "a.jpg")), "text": "x"}))
        with suppress(InvalidDatasetError):
            (sample,) = read_samples(path, DEFAULT)
            assert sample.image.resolve().is_relative_to(top)
            assert sample.image.is_file()


class TestAnswers:
    def test_they_are_read(self, folder: Path) -> None:
        path = written(folder, "l.jsonl", lines({"image": "a.jpg", "text": "x", "answer": " 是的。\n"}))
        assert read_samples(path, DEFAULT, answers=True) == read_samples(path, DEFAULT)
        assert read_samples(folder, DEFAULT, answers=True)[0].answer == " 是的。\n"

    @pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}, {"answer": " \n"}])
    def test_every_sample_needs_one(self, answer: dict[str, Any], folder: Path) -> None:
        good = {"image": "a.jpg", "text": "x", "answer": "y"}
        path = written(folder, "l.jsonl", lines(good, {"image": "a.jpg", "text": "x", **answer}))
        assert f"{path}:2: the sample has no answer, and an evaluation needs one" in refusal(path, answers=True)
        assert len(read_samples(path, DEFAULT)) == 2
