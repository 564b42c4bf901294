"""Calibration text: every kind of file, and what is wrong with the broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from slim_core.errors import InvalidDatasetError
from slim_core.recipe import DatasetConfig
from slim_llm.calibration import TextSample, find_dataset, read_samples, tokenize, tokenize_extra
from slim_llm.resources import CALIBRATION_FOLDER

TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def tokens(inputs: list[dict[str, Any]]) -> list[list[int]]:
    return [row for given in inputs for row in given["input_ids"].tolist()]


def test_jsonl(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "a.jsonl",
        lines(
            {"inputs_pretokenized": "one"},
            {"text": "two"},
            {"prompt": "三"},
            "four",
            {"messages": CHAT},
            {"q": "五", "n": 1},
        ),
    )
    assert read_samples(path) == [
        TextSample(f"{path}:1", "one"),
        TextSample(f"{path}:2", "two"),
        TextSample(f"{path}:3", "三"),
        TextSample(f"{path}:4", "four"),
        TextSample(f"{path}:5", messages=tuple(CHAT)),
        TextSample(f"{path}:6", '{"q": "五", "n": 1}'),
    ]


def test_the_first_key_that_is_there_counts(tmp_path: Path) -> None:
    path = written(
        tmp_path, "a.jsonl", lines({"messages": CHAT, "prompt": "p", "inputs_pretokenized": "i", "text": "t"})
    )
    assert read_samples(path) == [TextSample(f"{path}:1", "i")]


def test_json(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", json.dumps(["one", {"text": "two"}, {"messages": CHAT}], indent=1))
    assert [sample.where for sample in read_samples(path)] == [f"{path}[0]", f"{path}[1]", f"{path}[2]"]
    assert [sample.text for sample in read_samples(path)] == ["one", "two", ""]


@pytest.mark.parametrize("blank", ["\n\n", "\n \t\n", "\n\n\n\n", "\r\n\r\n"])
def test_txt(tmp_path: Path, blank: str) -> None:
    path = written(tmp_path, "a.txt", f"\n first\nstill first {blank}second{blank}")
    assert [sample.text for sample in read_samples(path)] == ["first\nstill first", "second"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_may_end_or_not(tmp_path: Path, end: str) -> None:
    path = written(tmp_path, "a.jsonl", f'"one"{end or chr(10)}"two"{end}')
    assert [sample.text for sample in read_samples(path)] == ["one", "two"]


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '"one\u2028\u0085one"\n"two"\n')
    assert [sample.text for sample in read_samples(path)] == ["one\u2028\u0085one", "two"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "place", "message"),
    [
        ("a.jsonl", b'"ok"\n"\xff"\n', "", r"is not UTF-8 text \(byte 6\)"),
        ("a.jsonl", '"ok"\n{"text": \n', ":2", "not valid JSON: Expecting value"),
        ("a.jsonl", '"ok"\n\n"ok"\n', ":2", "the line is empty"),
        ("a.jsonl", '"ok"\n   \n', ":2", "the line is empty"),
        ("a.jsonl", "", "", "the calibration set is empty"),
        ("a.jsonl", '"ok"\n"  "\n', ":2", "the text is empty"),
        ("a.jsonl", '"ok"\n"ok"\n{"text": ""}\n', ":3", "the text is empty"),
        ("a.jsonl", '{"text": 3}\n', ":1", "'text' is not a string"),
        ("a.jsonl", '{"prompt": null}\n', ":1", "'prompt' is not a string"),
        ("a.jsonl", "3\n", ":1", "is a int, not an object or a string"),
        ("a.jsonl", '["a"]\n', ":1", "is a list, not an object or a string"),
        ("a.jsonl", f"{DEEP}\n", ":1", "not valid JSON"),
        ("a.jsonl", '{"messages": []}\n', ":1", "'messages' must be a non-empty list"),
        ("a.jsonl", '{"messages": {}}\n', ":1", "'messages' must be a non-empty list"),
        ("a.jsonl", '{"messages": ["x"]}\n', ":1", r"messages\[0\] needs a 'role' and a 'content'"),
        (
            "a.jsonl",
            lines({"messages": [*CHAT, {"role": "user"}]}),
            ":1",
            r"messages\[2\] needs a 'role' and a 'content'",
        ),
        ("a.jsonl", lines({"messages": [{"content": "x", "role": 1}]}), ":1", r"messages\[0\] needs"),
        ("a.json", '{"text": "x"}', "", "must hold a JSON array"),
        ("a.json", "[", "", "not valid JSON"),
        ("a.json", DEEP, "", "not valid JSON"),
        ("a.json", "[]", "", "the calibration set is empty"),
        ("a.json", '["x", 1]', r"\[1\]", "is a int"),
        ("a.txt", " \n\n \n", "", "the calibration set is empty"),
        ("a.txt", b"\xfe", "", "is not UTF-8"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, place: str, message: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(InvalidDatasetError, match=f"{name}{place}: .*{message}"):
        read_samples(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(InvalidDatasetError, match=r"a\.jsonl: cannot be read"):
        read_samples(tmp_path / "a.jsonl")


def test_finding_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_dataset("mix_calib.jsonl") == CALIBRATION_FOLDER / "mix_calib.jsonl"
    mine = written(tmp_path, "mine.txt", "x")
    assert find_dataset(str(mine)) == mine
    assert find_dataset("mine.txt").resolve() == mine
    assert not caplog.records
    written(tmp_path, "mix_calib.jsonl", '"x"')
    assert find_dataset("mix_calib.jsonl").resolve() == tmp_path / "mix_calib.jsonl"
    assert "not the bundled calibration set of that name" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing.jsonl",
            r"spec\.dataset: there is no calibration set 'nothing\.jsonl' \(give a path, or one of: .*mix_calib",
        ),
        ("folder.jsonl", "there is no calibration set"),
        ("data.csv", r"data\.csv: '\.csv' files are not read"),
        ("huge.jsonl", "larger than 4 GiB"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    written(tmp_path, "data.csv", "x")
    with (tmp_path / "huge.jsonl").open("wb") as stream:
        stream.truncate((4 << 30) + 1)
    with pytest.raises(InvalidDatasetError, match=message):
        find_dataset(name)


def test_the_bundled_set_is_whole(tokenizer: Any) -> None:
    samples = read_samples(CALIBRATION_FOLDER / "mix_calib.jsonl")
    assert len(samples) >= 128
    inputs = tokenize(samples, tokenizer, DatasetConfig(path="x"), None)
    assert len(tokens(inputs)) == len(samples)


def texts(*values: str) -> list[TextSample]:
    return [TextSample(f"f:{i + 1}", value) for i, value in enumerate(values)]


def test_tokens_are_those_of_the_tokenizer(tokenizer: Any) -> None:
    samples = texts("Hello, world", "A list is mutable.")
    inputs = tokenize(samples, tokenizer, DatasetConfig(path="x"), 64)
    assert tokens(inputs) == [tokenizer(sample.text)["input_ids"] for sample in samples]
    assert all(given["use_cache"] is False and given["input_ids"].dtype == torch.int64 for given in inputs)


def test_conversations_go_through_the_template(tokenizer: Any) -> None:
    inputs = tokenize([TextSample("f:1", messages=tuple(CHAT))], tokenizer, DatasetConfig(path="x"), None)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.decode(tokens(inputs)[0]) == text


def test_conversations_without_a_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    inputs = tokenize([TextSample("f:1", messages=tuple(CHAT))], tokenizer, DatasetConfig(path="x"), None)
    assert tokenizer.decode(tokens(inputs)[0]) == "user: Hi\nassistant: Hello"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].content + 1 }}", "{% if %}"]
)
def test_a_template_that_refuses(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InvalidDatasetError, match=r"^f:1: the tokenizer's chat template refuses the conversation"):
        tokenize([TextSample("f:1", messages=tuple(CHAT))], tokenizer, DatasetConfig(path="x"), None)


@pytest.mark.parametrize(
    "sample",
    [TextSample("f:7", "half \ud800 a pair"), TextSample("f:7", messages=({"role": "user", "content": "\udc00"},))],
)
def test_half_of_a_surrogate_pair(tokenizer: Any, sample: TextSample) -> None:
    with pytest.raises(InvalidDatasetError, match=r"^f:7: .*surrogate"):
        tokenize([sample], tokenizer, DatasetConfig(path="x"), None)


def test_a_sample_without_tokens() -> None:
    def nothing(_text: str) -> dict[str, list[int]]:
        return {"input_ids": []}

    with pytest.raises(InvalidDatasetError, match=r"^f:1: the sample has no tokens"):
        tokenize(texts("x"), nothing, DatasetConfig(path="x"), None)


def letters(text: str) -> dict[str, list[int]]:
    """A tokenizer with a token for every character."""
    return {"input_ids": [ord(c) for c in text]}


@pytest.mark.parametrize(
    ("max_length", "positions", "length", "warned"),
    [
        (None, None, 9, False),
        (4, None, 4, False),
        (None, 5, 5, True),
        (4, 5, 4, False),
        (7, 5, 5, False),
        (20, 20, 9, False),
    ],
)
def test_lengths(
    max_length: int | None, positions: int | None, length: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = tokenize(texts("abcdefghi", "abc"), letters, DatasetConfig(path="x", max_length=max_length), positions)
    assert tokens(inputs) == [[ord(c) for c in "abcdefghi"[:length]], [97, 98, 99]]
    assert ("1 calibration samples were cut" in caplog.text) == warned


def test_number_of_samples() -> None:
    read: list[str] = []

    def counting(text: str) -> dict[str, list[int]]:
        read.append(text)
        return letters(text)

    assert len(tokenize(texts("a", "bb", "ccc"), counting, DatasetConfig(path="x", num_samples=2), None)) == 2
    assert read == ["a", "bb"]
    assert len(tokenize(texts("a"), letters, DatasetConfig(path="x", num_samples=9), None)) == 1


@pytest.mark.parametrize(
    ("share", "number", "want"),
    [
        (0.5, 2, ["ccc", "e"]),  # of four tokens; "dd" does not fit any more
        (1, 2, ["ccc", "dd", "e"]),
        (9, 2, ["ccc", "dd", "e", "ffff"]),
        (0.1, 2, []),
        (9, None, []),
        (9, 7, []),
    ],
)
def test_extra_samples_are_the_next_that_fit(share: float, number: int | None, want: list[str]) -> None:
    samples = texts("aaaaa", "bbb", "ccc", "dd", "e", "ffff")
    dataset = DatasetConfig(path="x", num_samples=number, extra_share=share)
    main = tokenize(samples, letters, dataset, None)
    extra = tokenize_extra(samples, letters, dataset, None, main)
    assert tokens(extra) == [[ord(c) for c in text] for text in want]


def test_extra_samples_share_forwards_and_are_cut_too() -> None:
    samples = texts("abcdefgh", "abc", "def", "ghijkl")
    dataset = DatasetConfig(path="x", num_samples=1, extra_share=9, batch_size=2, max_length=3)
    extra = tokenize_extra(samples, letters, dataset, None, tokenize(samples, letters, dataset, None))
    assert [given["input_ids"].shape for given in extra] == [(2, 3), (1, 3)]


def test_a_long_file_is_not_tokenized_beyond_what_is_needed() -> None:
    read: list[str] = []

    def counting(text: str) -> dict[str, list[int]]:
        read.append(text)
        return letters(text)

    samples, dataset = texts(*["ab"] * 500), DatasetConfig(path="x", num_samples=8)
    main = tokenize(samples, counting, dataset, None)
    assert len(tokenize_extra(samples, counting, dataset, None, main)) == 2
    assert len(read) == 8 + 16


@pytest.mark.parametrize(
    ("size", "shapes"), [(1, 6 * ["1x"]), (2, ["2x3", "1x1", "2x3", "1x2"]), (9, ["4x3", "1x1", "1x2"])]
)
def test_only_samples_of_one_length_share_a_forward(size: int, shapes: list[str]) -> None:
    samples = texts("abc", "d", "efg", "hij", "kl", "mno")
    inputs = tokenize(samples, letters, DatasetConfig(path="x", batch_size=size), None)
    assert sorted(map(bytes, tokens(inputs))) == sorted(sample.text.encode() for sample in samples)
    found = [f"{given['input_ids'].shape[0]}x{given['input_ids'].shape[1]}" for given in inputs]
    assert all(f.startswith(s) for f, s in zip(found, shapes, strict=True))
