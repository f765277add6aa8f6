"""Reports of results that were made up for these tests: what they show, and what they leave alone."""

from __future__ import annotations

import io
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bench.report.command import report as command
from bench.report.markdown import BEGIN, END, NoPlace, report
from bench.report.names import number, quantity, round_quantity, scale_of
from bench.report.plots import common_end
from bench.report.readme import write_readme
from bench.report.reasons import REASONS, UNKNOWN, Reason, why_ahead
from bench.report.tables import Ahead, ahead, ahead_table, cases_of, comparison, headline_metrics, of_workload
from bench.results import Gap, Machine, Measure, Results, save

MACHINE = Machine(kernel="Linux 6.18", cpu="A | B", processors=2, memory_bytes=8 << 30, medium="tmpfs", python="3.11.7")
SYSTEMS = {"native": 1.0, "cachefs": 0.9, "cachefs_pyfuse3": 0.3, "rclone": 0.2, "s3fs": 0.4, "juicefs": 0.5}


def measure(case: str, system: str, values: list[float], **others: Any) -> Measure:
    filled = {"workload": "fio", "metric": "bytes_per_s", "unit": "B/s", "better": "more", **others}
    return Measure(case=case, system=system, values=values, **filled)


def results(measures: list[Measure], gaps: list[Gap] | None = None, name: str = "made up") -> Results:
    return Results(
        name=name,
        began="2026-11-25T22:00:00Z",
        seconds=90.0,
        command=["python", "-m", "bench", "run", "a`b"],
        revision="d0aa98a+",
        machine=MACHINE,
        versions={"cachefs": "0.1", "rclone": "1.75"},
        flags={"rclone": ["mount", "--vfs-cache-mode", "full"], "s3fs": ["use_cache"]},
        scale="standard",
        measures=measures,
        gaps=gaps or [],
    )


def matrix() -> Results:
    """All that can be drawn: bars of three states, latencies, epochs with synthetic input, promises; and gaps."""
    measures: list[Measure] = []
    for size, state in itertools.product(("4k", "1M"), ("cold", "cached", "warm")):
        labels = {"size": size, "state": state}
        for place, (system, speed) in enumerate(SYSTEMS.items()):
            if (size, state, system) == ("4k", "warm", "rclone"):
                continue
            values = [1e9 * speed * each for each in (0.99, 1.0, 1.02)]
            measures.append(measure(f"{size}, {state}", system, values, labels=labels))
            for metric, seconds in (("p50_s", 1e-4), ("p99_s", 3e-3), ("p99.9_s", 0.2)):
                times = [seconds * (place + 1) * each for each in (1.0, 1.1, 1.2)]
                latency = {"metric": metric, "unit": "s", "better": "less", "labels": labels}
                measures.append(measure(f"{size}, {state}", system, times, **latency))
    for system, speed in SYSTEMS.items():
        for epoch in range(1, 4):
            labels = {"input": "files", "epoch": str(epoch), "state": "cold" if epoch == 1 else "cached"}
            images = {"workload": "resnet", "metric": "images_per_s", "unit": "1/s", "labels": labels}
            measures.append(measure(f"files, epoch {epoch}", system, [1000 * speed + epoch], **images))
            sent = {"metric": "under_store_bytes", "unit": "B", "better": "less"}
            values = [1e9 if epoch == 1 and system != "native" else 0.0]
            measures.append(measure(f"files, epoch {epoch}", system, values, **images | sent))
        labels = {"input": "synthetic", "epoch": "1", "state": "nothing is read"}
        images = {"workload": "resnet", "metric": "images_per_s", "unit": "1/s", "labels": labels}
        measures.append(measure("synthetic input, epoch 1", system, [1800.0], **images))
    kept = {"workload": "promises", "metric": "ratio", "unit": "", "required": 0.9, "note": "of a | b"}
    measures.append(measure("kept", "", [0.95, 0.97, 0.99], **kept))
    measures.append(measure("missed, over", "", [1.301], **kept | {"better": "less", "required": 1.02}))
    measures.append(measure("objects of 8 MiB", "", [2e9, 2.1e9, 2.2e9], workload="server"))
    gaps = [
        Gap(workload="fio", system="rclone", kind="hung", why="no answer in 23 s", case="4k, warm"),
        Gap(workload="fio", system="mountpoint-s3", kind="missing", why="apt-get install <mount-s3>"),
        Gap(workload="checkpoint", system="", kind="skipped", why="writing is refused"),
    ]
    return results(measures, gaps)


def test_the_table_has_median_spread_and_ratio_to_native() -> None:
    run = results([measure("a", "native", [2e9, 4e9, 3e9]), measure("a", "cachefs", [1e9, 2e9, 2.4e9])])
    lines = comparison(run, "fio", {"a": "bytes_per_s"}).markdown()
    assert lines[0] == "|  | unit | local files | cachefs |"
    # The ratios of the rounds are 0.5, 0.5 and 0.8.
    assert lines[2] == "| a | GB/s | 3.00 (2.00–4.00) | 2.00 (1.00–2.40) **0.50** |"


def test_the_ratio_says_the_same_of_times_as_of_speeds() -> None:
    times = {"metric": "p99_s", "unit": "s", "better": "less"}
    run = results([measure("a", "native", [0.002], **times), measure("a", "s3fs", [0.004], **times)])
    assert comparison(run, "fio", {"a": "p99_s"}).rows == [["a", "ms", "2.00", "4.00 **0.50**"]]


def test_what_is_not_there_has_no_ratio() -> None:
    explains = {"metric": "requests", "unit": "", "better": ""}
    run = results(
        [
            measure("alone", "cachefs", [1e6]),
            measure("zero", "native", [0.0]),
            measure("zero", "cachefs", [5.0, 7.0]),
            measure("explains", "native", [5.0], **explains),
            measure("explains", "cachefs", [10.0], **explains),
            measure("empty", "cachefs", []),
        ],
        [Gap(workload="fio", system="native", kind="crashed", why="it did", case="alone")],
    )
    metrics = {"alone": "bytes_per_s", "zero": "bytes_per_s", "explains": "requests"}
    assert comparison(run, "fio", metrics).rows == [
        ["alone (throughput)", "MB/s", "*crashed*", "1.00"],
        ["zero (throughput)", "B/s", "0", "6.00 (5.00–7.00)"],
        ["explains (requests)", "–", "5.000", "10"],
    ]
    assert "empty" not in headline_metrics(of_workload(run, "fio"))


def test_the_server_alone_is_the_last_row_where_it_was_measured_in_the_same() -> None:
    run = matrix()
    metrics = headline_metrics(of_workload(run, "fio"))
    last = comparison(run, "fio", metrics).rows[-1]
    assert last[0] == "*the S3 server alone, objects of 8 MiB: 2.10 GB/s (2.00–2.20)*"
    assert len(last) == 2 + len(SYSTEMS)
    training = comparison(run, "resnet", headline_metrics(of_workload(run, "resnet"))).rows
    assert training[-1][0] == last[0] and len(training[-1]) == len(training[0])
    assert "alone" not in str(comparison(run, "fio", cases_of(of_workload(run, "fio"), "p99_s")))


def test_others_that_are_ahead_are_named_with_reasons() -> None:
    labels = {"state": "cold"}
    run = results(
        [
            measure("clear", "cachefs", [1.0, 1.1, 1.2], labels=labels),
            measure("clear", "juicefs", [2.0, 2.2, 2.4], labels=labels),
            measure("clear", "native", [9.0, 9.0, 9.0], labels=labels),
            measure("clear", "cachefs_pyfuse3", [9.0, 9.0, 9.0], labels=labels),
            measure("within", "cachefs", [1.0, 1.1, 1.5]),
            measure("within", "s3fs", [1.2, 1.3, 1.4]),
            measure("behind", "cachefs", [3.0]),
            measure("behind", "s3fs", [2.0]),
            measure("nothing at all", "cachefs", [1.0], better="less"),
            measure("nothing at all", "s3fs", [0.0], better="less"),
        ]
    )
    found = {each.theirs.case: each for each in ahead(run)}
    assert set(found) == {"clear", "within", "nothing at all"}
    assert found["clear"].theirs.system == "juicefs"
    assert found["clear"].clear and found["clear"].by == {"bytes_per_s": pytest.approx(2.0)}
    assert not found["within"].clear
    assert found["nothing at all"].by == {"bytes_per_s": float("inf")}
    assert why_ahead(found["clear"].theirs) == next(each.why for each in REASONS if each.workload == "fio")
    assert why_ahead(found["within"].theirs) == UNKNOWN


def test_a_reason_is_written_once_and_referred_to() -> None:
    found = [
        Ahead(measure("a", "s3fs", [1.0], labels={"state": "cold"}), {"bytes_per_s": 2.0, "p99_s": 1.5}, True, "one"),
        Ahead(measure("b", "s3fs", [1.0], labels={"state": "none"}), {"p99.9_s": 1.25}, True, "one"),
        Ahead(measure("c | d", "rclone", [1.0], labels={"state": "cold"}), {"bytes_per_s": float("inf")}, True, "two"),
    ]
    *table, between, reason = ahead_table(found, runs=True)
    assert table[2:] == [
        "| fio: a (run one) | s3fs-fuse | throughput 2.00, p99 1.50 | (1) |",
        f"| fio: b (run one) | s3fs-fuse | p99.9 1.25 | {UNKNOWN} |",
        "| fio: c \\| d (run two) | rclone | throughput ∞ | (1) |",
    ]
    assert between == "" and reason == f"1. {REASONS[0].why}"
    assert "(run " not in str(ahead_table(found))


def test_a_reason_may_be_about_one_system_and_some_labels() -> None:
    reasons = (
        Reason(workload="fio", labels={"state": "cold"}, systems=frozenset({"s3fs"}), why="special"),
        Reason(workload="fio", labels={"state": "cold"}, why="general"),
    )
    cold = {"labels": {"state": "cold", "size": "4k"}}
    assert why_ahead(measure("a", "s3fs", [1.0], **cold), reasons) == "special"
    assert why_ahead(measure("a", "rclone", [1.0], **cold), reasons) == "general"
    assert why_ahead(measure("a", "rclone", [1.0], labels={"state": "warm"}), reasons) == UNKNOWN
    assert why_ahead(measure("a", "s3fs", [1.0], workload="other", **cold), reasons) == UNKNOWN


def test_the_document_says_all_of_it(tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "performance.md"
    out.write_text(f"# By hand\n\nBefore ü.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    (tmp_path / "performance").mkdir()
    (tmp_path / "performance" / "of-an-earlier-report.png").write_bytes(b"old")
    (tmp_path / "performance" / "kept.txt").write_text("not ours")
    report([matrix()], out)
    text = out.read_text()
    assert text.startswith(f"# By hand\n\nBefore ü.\n\n{BEGIN}\n") and text.endswith(f"\n{END}\n\nAfter.\n")
    assert "old" not in text.split(BEGIN)[1].split(END)[0].split()
    for said in (
        "*hung*",
        "- **rclone** hung in 4k, warm: no answer in 23 s",
        "- **Mountpoint for S3** missing: apt-get install &lt;mount-s3>",
        "- skipped: writing is refused",
        "1 of 2 promises are kept.",
        "| kept | at least 0.9 | **0.970 (0.950–0.990)** | yes | of a \\| b |",
        "| missed, over | at most 1.02 | 1.301 | no | of a \\| b |",
        "A \\| B, 2 processors, 8.0 GiB of memory, Linux 6.18",
        "`python -m bench run a'b`",
        "| rclone | 1.75 | `mount --vfs-cache-mode full` |",
        "| s3fs-fuse | | `use_cache` |",
        "In no case that was measured, beyond the spread.",
        "d0aa98a+",
    ):
        assert said in text, said
    pictures = sorted((tmp_path / "performance").glob("*.png"))
    assert [each.name for each in pictures] == [
        "fio-latency.png",
        "fio-ratios.png",
        "promises-promises.png",
        "resnet-epochs-images-per-s.png",
        "resnet-epochs-under-store-bytes.png",
    ]
    for each in pictures:
        with Image.open(each) as image:
            image.load()
            assert image.format == "PNG" and 600 <= image.width <= 1200 and 150 <= image.height <= 2000
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10
        assert 2_000 < each.stat().st_size < 80_000
        assert f"](performance/{each.name})" in text
    assert (tmp_path / "performance" / "kept.txt").exists()


def test_writing_it_again_changes_nothing(tmp_path: Path) -> None:
    run = results([measure("a", "native", [2.0]), measure("a", "cachefs", [1.0])])
    out, picture = tmp_path / "out.md", tmp_path / "out" / "fio-ratios.png"
    report([run], out)
    before = out.read_text(), picture.read_bytes(), picture.stat().st_mtime_ns
    report([run], out)
    assert (out.read_text(), picture.read_bytes(), picture.stat().st_mtime_ns) == before


def test_whatever_names_there_are_it_is_drawn(tmp_path: Path) -> None:
    """Many systems and cases, names that no font and no file system has, of mathematics and of Markdown."""
    systems = ["native", "cachefs", *(f"系统 $x_{each}$|`" for each in range(12))]
    measures = [
        measure(
            f"{'長い' * 40} {case} $\\frac{{1}}{{",
            system,
            [1.0 + case, 2.0],
            workload=workload,
            labels={"n": str(case)},
        )
        for workload in ("ü/../x", "../..")
        for case in range(30)
        for system in systems
    ]
    out = tmp_path / "performance.md"
    report([results(measures)], out)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"performance.md", "performance/unnamed-ratios.png", "performance/x-ratios.png"}
    assert "系统 $x_3$\\|`" in out.read_text()


def test_runs_of_the_same_workload_have_sections_and_plots_of_their_own(tmp_path: Path) -> None:
    measures = [measure("a", "native", [2.0]), measure("a", "cachefs", [1.0])]
    report([results(measures, name="one"), results(measures, name="two")], tmp_path / "both.md")
    text = (tmp_path / "both.md").read_text()
    assert "### fio, run one" in text and "### fio, run two" in text
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert names == {"fio-ratios-one.png", "fio-ratios-two.png"}


def test_without_matplotlib_there_is_markdown_that_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "performance.md"
    report([matrix()], out)
    assert "There are no plots here, as matplotlib is not installed: `pip install 'cachefs[bench]'`" in out.read_text()
    assert "![" not in out.read_text() and not (tmp_path / "performance").exists()


@pytest.mark.parametrize("text", ["nothing", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_document_without_a_place_for_it_is_left_alone(tmp_path: Path, text: str) -> None:
    out = tmp_path / "performance.md"
    out.write_text(text)
    with pytest.raises(NoPlace, match="needs these two lines once, in this order"):
        report([matrix()], out)
    with pytest.raises(NoPlace):
        write_readme([matrix()], out)
    assert out.read_text() == text and list(tmp_path.iterdir()) == [out]


def test_the_readme_compares_kinds_of_work_and_names_promises(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    write_readme([matrix()], readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| cachefs against | local files | rclone | s3fs-fuse | JuiceFS |"
    assert rows[2] == "| fio: cold | 0.90 | 4.50 | 2.25 | 1.80 |"
    assert "| fio: warm | 0.90 | 4.50 (1 of 2 cases) | 2.25 | 1.80 |" in rows
    assert "| kept | at least 0.9 | **0.970 (0.950–0.990)** | yes |" in rows
    assert not any("nothing is read" in row for row in rows)
    write_readme([matrix()], readme)
    assert readme.read_text() == text


def test_of_several_runs_the_readme_has_the_largest_and_last(tmp_path: Path) -> None:
    def run(scale: str, began: str, speed: float, kept: float) -> Results:
        promise = {"workload": "promises", "metric": "ratio", "unit": "", "required": 0.9}
        measures = [
            measure("a", "native", [2.0]),
            measure("a", "cachefs", [speed]),
            measure("kept", "", [kept], **promise),
        ]
        return msgspec.structs.replace(results(measures, name=f"{scale} {began}"), scale=scale, began=began)

    runs = [run("full", "2026-01", 1.0, 0.91), run("standard", "2026-03", 2.0, 0.92), run("full", "2026-02", 1.5, 0.93)]
    readme = tmp_path / "README.md"
    for ordered in (runs, runs[::-1]):
        readme.write_text(f"{BEGIN}\n{END}\n")
        write_readme(ordered, readme)
        rows = [line for line in readme.read_text().splitlines() if line.startswith("|")]
        assert [row for row in rows if "fio" in row] == ["| fio | 0.75 |"]
        assert [row for row in rows if "kept" in row] == ["| kept | at least 0.9 | **0.930** | yes |"]


def test_the_command(tmp_path: Path) -> None:
    made, out, readme = tmp_path / "made.json", tmp_path / "out.md", tmp_path / "README.md"
    save(results([measure("a", "native", [2.0]), measure("a", "cachefs", [1.0])]), made)
    readme.write_text(f"{BEGIN}\n{END}\n")
    done = CliRunner().invoke(command, [str(made), "--out", str(out), "--readme", str(readme)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [str(out), str(readme)]
    assert "## fio" in out.read_text() and "| fio | 0.50 |" in readme.read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read: No such file"), (b"{}", "holds no results"), (b"\xff", "holds no results")],
)
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    done = CliRunner().invoke(command, [str(path), "--out", str(tmp_path / "out.md")])
    assert done.exit_code == 1 and said in done.output and str(path) in done.output
    assert not (tmp_path / "out.md").exists()


def test_by_default_all_results_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, [])
    assert done.exit_code == 1 and "there are no results in bench/results" in done.output
    for name in ("one", "two"):
        save(results([measure("a", "cachefs", [1.0])], name=name), tmp_path / "bench/results" / f"{name}.json")
    done = CliRunner().invoke(command, [])
    assert done.exit_code == 0, done.output
    assert "run one" in Path("docs/performance.md").read_text() and "run two" in Path("docs/performance.md").read_text()


def test_what_all_cases_end_with_is_said_once() -> None:
    assert common_end(["a, x, epoch 1, cut", "a, y, epoch 2, cut", "cut"]) == ""
    assert common_end(["a, x, epoch 1 (cold), small, cut", "a, y, epoch 2, small, cut"]) == "small, cut"
    assert common_end(["a", "a"]) == ""


@given(st.floats(1e-4, 1e15) | st.floats(-1e15, -1e-4), st.sampled_from(["B/s", "B", "s", "1/s", ""]))
def test_what_is_written_is_the_number_to_half_a_percent(value: float, unit: str) -> None:
    for written in (quantity(value, unit), round_quantity(value, unit)):
        digits, name = re.fullmatch(r"(-?[\d,]+(?:\.\d+)?) ?(\D*)", written).groups()
        size, expected = scale_of(value, unit)
        assert name == expected
        assert float(digits.replace(",", "")) * size == pytest.approx(value, rel=0.0051)


def test_numbers_are_written_with_the_digits_that_count() -> None:
    assert [number(each) for each in (0, 0.00001234, 0.01234, 0.5, 1.0, 12.34, 123.4, 1234567.8, float("inf"))] == [
        *("0", "1.2e-05", "0.0123", "0.500", "1.00", "12.3", "123", "1,234,568", "∞"),
    ]
    assert [
        quantity(*each) for each in ((1.001, ""), (0.9, ""), (0.0123, "s"), (0.0, "s"), (-2e6, "B"), (7.4, "1/s"))
    ] == [
        *("1.001", "0.900", "12.3 ms", "0 s", "-2.00 MB", "7.40/s"),
    ]
    assert [round_quantity(*each) for each in ((0.9, ""), (300e6, "B"), (1.0, "s"), (10_000.0, "1/s"))] == [
        *("0.9", "300 MB", "1 s", "10,000/s"),
    ]
    assert scale_of(5e-10, "s") == (1e-9, "ns")


def test_the_places_of_this_projects_documents_are_there() -> None:
    root = Path(__file__).parent.parent.parent
    for name in ("README.md", "docs/performance.md"):
        text = (root / name).read_text()
        assert text.count(BEGIN) == text.count(END) == 1, name


def test_pictures_do_not_depend_on_how_matplotlib_is_set(tmp_path: Path) -> None:
    import matplotlib

    measures = [measure("a", "native", [2.0]), measure("a", "cachefs", [1.0])]
    report([results(measures)], tmp_path / "a.md")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        report([results(measures)], tmp_path / "b.md")
    first, second = (tmp_path / each / "fio-ratios.png" for each in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert io.BytesIO(first.read_bytes()).read(8) == b"\x89PNG\r\n\x1a\n"
