"""`python -m bench`: what it says to bad input, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from bench import cli, server
from bench.results import Results, load
from cachefs.testing.s3server import S3Server
from tests.bench.reading import Reading


class Choosy(Reading):
    def __init__(self, scale: object, options: dict[str, str] | None = None) -> None:
        super().__init__(scale, options)  # type: ignore[arg-type]
        if "bad" in self.chosen.get("do", ""):
            raise ValueError("do: 'bad' is none of stop, kill")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "known_workloads", lambda: {"reading": Choosy})
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cli, "terminate_as_interrupt", lambda: None)


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "there is no workload 'nosuch'; there are reading"),
        (["--systems", "native,ext9"], "there is no system 'ext9'; there are native, cachefs, cachefs_pyfuse3, rclone"),
        (["--option", "reading"], "'reading': WORKLOAD.NAME=VALUE is wanted"),
        (["--option", "fio.jobs=1"], "no workload 'fio' is run; there are reading"),
        (["--option", "reading.size=1"], "workload reading has no option 'size'; there are do"),
        (["--option", "reading.do=bad"], "workload reading: do: 'bad' is none of stop, kill"),
        (["--scale", "huge"], "'huge' is not one of 'smoke', 'standard', 'full'"),
        (["--rounds", "0"], "0 is not in the range 1<=x<=100"),
        (["--name", "../x"], "'../x': a file name without a directory is wanted"),
        (["--dir", "/nowhere/at/all"], "'/nowhere/at/all' does not exist"),
    ],
)
def test_bad_input_is_named_with_what_there_is(arguments: list[str], message: str) -> None:
    result = bench("run", "--dry-run", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_dry_run_shows_what_would_be_done(tmp_path: Path) -> None:
    result = bench("run", "--dry-run", "--systems", "native,rclone", "--rounds", "7", "--dir", tmp_path)
    assert result.exit_code == 0
    for each in ("reading", "native, rclone", " 7 ", "3 MB", "every file once", f"free in {tmp_path}"):
        assert each in result.output
    assert list(tmp_path.iterdir()) == []


def test_list_shows_workloads_systems_and_accelerators() -> None:
    result = bench("list")
    assert result.exit_code == 0
    for each in ("reading", "every file once", "native", "juicefs", "mountpoint-s3", "A100", "unet3d"):
        assert each in result.output


def test_results_that_could_not_be_written_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results").write_text("in the way")
    monkeypatch.setattr(cli, "run_plan", lambda plan: pytest.fail("it was measured"))
    result = bench("run", "--scale", "smoke", "--dir", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / 'results'} cannot be made" in result.output


def test_results_are_written_and_printed(tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running(directory: Path) -> Iterator[S3Server]:
        yield s3_server

    monkeypatch.setattr(server, "running_server", running)
    monkeypatch.setattr(server.Ceiling, "measure", lambda self: None)
    monkeypatch.setattr(server.Ceiling, "measures", lambda self: iter(()))
    where = tmp_path / "where"
    where.mkdir()
    result = bench(
        *("run", "reading", "--systems", "native", "--scale", "smoke", "--dir", where, "--name", "mine", "--json"),
        *("--option", "reading.do=native:gap"),
    )
    assert result.exit_code == 0, result.output
    kept = load(tmp_path / "results" / "mine.json")
    assert msgspec.json.decode(result.stdout, type=Results) == kept
    assert [each.case for each in kept.gaps] == ["other"]
    assert "mine.json" in result.stderr and "not measured: reading native skipped" in result.stderr
    assert list(where.iterdir()) == []
