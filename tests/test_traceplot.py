"""plot_trace(): a picture that any XML reader takes, with every call in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import distpool
from distpool import traceplot

SVG = "{http://www.w3.org/2000/svg}"


def document(*events: dict[str, Any]) -> dict[str, Any]:
    head = {"name": "process_name", "ph": "M", "pid": 2, "tid": 0, "args": {"name": "worker 2 (here)"}}
    return {"traceEvents": [head, *events]}


def event(name: str, begin: float, duration: float, pid: int = 2, lane: int = 0, status: str = "ok") -> dict[str, Any]:
    args = {"function": name, "label": None, "status": status}
    return {"name": name, "ph": "X", "ts": begin, "dur": duration, "pid": pid, "tid": lane, "args": args}


def draw(tmp_path: Path, content: Any) -> ElementTree.Element:
    source, out = tmp_path / "in.json", tmp_path / "out.svg"
    source.write_text(json.dumps(content))
    distpool.plot_trace(source, out)
    return ElementTree.parse(out).getroot()


def bars(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Tooltip -> bar."""
    return {str(rect[0].text): rect for rect in root.iter(f"{SVG}rect") if len(rect)}


def texts(root: ElementTree.Element) -> list[str]:
    return [str(element.text) for element in root.iter(f"{SVG}text")]


def test_places_and_colours(tmp_path: Path) -> None:
    root = draw(
        tmp_path,
        document(event("f", 0, 1000), event("g", 1000, 500), event("f", 1500, 500), event("f", 0, 2000, pid=3)),
    )
    found = [rect for rect in root.iter(f"{SVG}rect") if len(rect)]
    by_tip = [(str(rect[0].text).partition(":")[0], rect) for rect in found]
    f1, g, f2, f3 = (rect for _, rect in by_tip)
    assert [name for name, _ in by_tip] == ["f", "g", "f", "f"]
    assert f1.get("fill") == f2.get("fill") == f3.get("fill") != g.get("fill")
    x = [float(rect.get("x", "nan")) for rect in found]
    wide = [float(rect.get("width", "nan")) for rect in found]
    assert wide[0] == pytest.approx(2 * wide[1], abs=0.1) and x[1] == pytest.approx(x[0] + wide[0], abs=0.1)
    assert f1.get("y") == g.get("y") != f3.get("y")
    assert wide[3] == pytest.approx(4 * wide[1], abs=0.1)
    assert "worker 2 (here)" in texts(root) and "worker 3" in texts(root)
    assert "100 % busy" in texts(root)
    assert "f: 3 calls, 3.5 ms" in texts(root)


def test_statuses_are_seen(tmp_path: Path) -> None:
    names = ("ok", "error", "unsendable", "running", "died")
    content = document(*(event(f"f{i}", 100 * i, 90, status=name) for i, name in enumerate(names)))
    found = {tip.partition(":")[0]: (tip, rect) for tip, rect in bars(draw(tmp_path, content)).items()}
    assert found["f0"][1].get("stroke") is None
    assert found["f1"][1].get("stroke") == found["f2"][1].get("stroke") == found["f4"][1].get("fill")
    assert found["f3"][1].get("fill-opacity")
    assert "raised" in found["f1"][0] and "died with its worker" in found["f4"][0]


def test_thin_calls_are_joined(tmp_path: Path) -> None:
    content = document(*(event("f", 2 * i, 1) for i in range(20_000)), event("g", 40_000, 20_000))
    found = bars(draw(tmp_path, content))
    assert len(found) == 2
    joined = next(tip for tip in found if "f" in tip.split(":")[0])
    assert "20000 calls of f: 20 ms in all, 1 µs each" in joined
    assert (tmp_path / "out.svg").stat().st_size < 10_000


def test_helpers_have_lanes(tmp_path: Path) -> None:
    root = draw(tmp_path, document(event("f", 0, 100), event("g", 10, 50, lane=1)))
    assert "helper 1" in texts(root)
    f, g = (rect for rect in root.iter(f"{SVG}rect") if len(rect))
    assert f.get("y") != g.get("y")


def test_names_are_only_text(tmp_path: Path) -> None:
    name = '<script>alert("x")</script> & co'
    root = draw(tmp_path, document(event(name, 0, 100)))
    assert not list(root.iter(f"{SVG}script"))
    assert any(name in tip for tip in bars(root))


def test_names_that_xml_does_not_know(tmp_path: Path) -> None:
    root = draw(tmp_path, document(event("a\x00\x1b[2J\udcff\n", 0, 10)))  # a file's name may be like that
    assert list(bars(root)) == ["a??[2J??: 10 µs\nfrom 0 µs"]


def test_an_end_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a trace file: a time must be a finite number"):
        draw(tmp_path, document(event("f", 1e308, 1e308)))


def test_many_functions(tmp_path: Path) -> None:
    content = document(*(event(f"function_{i}" * 9, 10 * i, 10) for i in range(40)))
    root = draw(tmp_path, content)
    height = float(root.get("height", "0"))
    assert all(float(text.get("y", "nan")) < height for text in root.iter(f"{SVG}text"))


@pytest.mark.parametrize("content", [document(), {"traceEvents": []}, []])
def test_empty_traces(tmp_path: Path, content: Any) -> None:
    assert "no calls" in texts(draw(tmp_path, content))


@pytest.mark.parametrize("text", ["", "no json", "{}", "7", '{"traceEvents": [{"ph": "X"}]}', "null", "[7]"])
def test_what_is_no_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(ValueError, match=r"in\.json is not a trace file"):
        distpool.plot_trace(tmp_path / "in.json", tmp_path / "out.svg")
    assert not (tmp_path / "out.svg").exists()


@pytest.mark.parametrize(
    "microseconds, text",
    [(0.5, "0.5 µs"), (12.3, "12.3 µs"), (999.6, "1 ms"), (1234, "1.23 ms"), (2e6, "2 s"), (123.4e6, "123.4 s")],
)
def test_durations(microseconds: float, text: str) -> None:
    assert traceplot.duration(microseconds) == text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", '"nan"'])
@pytest.mark.parametrize("field", ["ts", "dur", "pid"])
def test_times_that_are_none(tmp_path: Path, field: str, number: str) -> None:
    text = json.dumps([{**event("f", 0, 1), field: "HERE"}]).replace('"HERE"', number)
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(ValueError, match=r"in\.json is not a trace file"):
        distpool.plot_trace(tmp_path / "in.json", tmp_path / "out.svg")


def test_a_call_before_the_beginning(tmp_path: Path) -> None:
    """By the clock of another host, that is."""
    root = draw(tmp_path, document(event("f", -30, 10)))
    assert any(tip.startswith("f: 10 µs") for tip in bars(root))


def test_calls_of_different_ends_are_not_joined(tmp_path: Path) -> None:
    statuses = ("ok", "ok", "error", "ok")
    content = document(*(event("f", i, 1, status=s) for i, s in enumerate(statuses)), event("g", 9, 1e6))
    assert [tip.partition(":")[0] for tip in bars(draw(tmp_path, content))] == ["2 calls of f", "f", "f", "g"]


def test_overlapping_calls_are_counted_once(tmp_path: Path) -> None:
    root = draw(tmp_path, document(event("f", 0, 60), event("g", 0, 30), event("h", 90, 10)))
    assert "70 % busy" in texts(root)


def test_the_function_behind_a_label_is_told(tmp_path: Path) -> None:
    labelled = event("a label", 0, 5)
    labelled["args"].update(function="module.f", label="a label")
    (tip,) = bars(draw(tmp_path, document(labelled)))
    assert "(module.f)" in tip


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        distpool.plot_trace(tmp_path / "none.json", tmp_path / "out.svg")
    (tmp_path / "in.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a trace file"):
        distpool.plot_trace(tmp_path / "in.json", tmp_path / "out.svg")
    (tmp_path / "in.json").write_text("[]")
    with pytest.raises(OSError):
        distpool.plot_trace(tmp_path / "in.json", tmp_path / "no" / "out.svg")
