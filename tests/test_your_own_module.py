"""The worked page on meta modules of one's own: its code runs, and prints what the page says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "your_own_module.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_code_of_the_page_prints_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), namespace)
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    expected = blocks("text")[0].splitlines()
    assert [line.partition(":")[0] for line in printed] == [line.partition(":")[0] for line in expected]
    for found, said in zip(printed, expected, strict=True):
        # Other releases and processors add up in another order, and the last batches decide on the last digits.
        assert numbers(found) == pytest.approx(numbers(said), abs=0.15)


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_the_module_of_the_page_has_thirty_lines_at_most():
    (module,) = [block for block in blocks("python") if "class ClassWeights" in block]
    assert len(module.splitlines()) <= 30
