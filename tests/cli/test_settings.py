"""Flags, environment, file, defaults: which one counts, what is refused, and what is shown of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cachefs.cli.main import load_command, main
from cachefs.cli.settings import SECTIONS, settings_of, variable_of
from cachefs.fuse import probe
from cachefs.testing.processes import mountpoint_below, running

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A command, with a directory for configuration of its own."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cachefs", *map(str, arguments)]
        everything = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), **environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=everything)

    return run


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def shown(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_flag_before_environment_before_file_before_default(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", '[mount]\nopen-wait = "1M"\nthreads = 3\n[worker]\npromote = "always"\n')
    found = shown(run("config", "show", "--config", file, "--json", CACHEFS_OPEN_WAIT="2M"))["settings"]
    assert found["open-wait"] == {"value": 2 << 20, "from": "CACHEFS_OPEN_WAIT", "variable": "CACHEFS_OPEN_WAIT"}
    assert (found["threads"]["value"], found["threads"]["from"]) == (3, f"{file}: threads in [mount]")
    assert (found["promote"]["value"], found["promote"]["from"]) == ("always", f"{file}: promote in [worker]")
    assert (found["max-read"]["value"], found["max-read"]["from"]) == (1 << 20, "default")


def test_every_setting_can_be_set_in_the_file_and_in_the_environment(tmp_path: Path) -> None:
    """Whoever adds a flag adds a key and a variable: nothing is set up by hand."""
    examples = {"SIZE": "64K", "DURATION": "7s", "HOST:PORT": "127.0.0.1:99", "KIND:DIR:SIZE": "ssd:/x:1G"}
    examples |= {
        "PATH=URL": "/=file:///x",
        "PATH=MOUNTPOINT": "/x=/mnt/x",
        "NAME=VALUE": "rack=r7",
        "OCTAL": "022",
        "SIZE|PERCENT": "15%",
        "text": "some",
        "integer range": "1000",
    }

    def show(command: str, *arguments: str, **environment: str) -> dict[str, Any]:
        done = CliRunner().invoke(main, ["config", "show", command, "--json", *arguments], env=environment)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)["settings"]
        return found

    for command in SECTIONS:
        for option in settings_of(load_command(command)):
            choices = getattr(option.type, "choices", None)
            value: Any = choices[-1] if choices else examples.get(option.type.name, "true")
            key = max(option.opts, key=len).lstrip("-")
            text = "true" if option.is_flag else json.dumps([value] if option.multiple else value)
            file = write(tmp_path / "c.toml", f"[{command}]\n{key} = {text}\n")
            from_file = show(command, "--config", str(file))[key]
            assert from_file["from"] == f"{file}: {key} in [{command}]", key
            variables = {variable_of(option): "true" if option.is_flag else str(value)}
            from_variable = show(command, **variables)[key]
            assert from_variable["from"] == variable_of(option), key
            assert from_variable["value"] == from_file["value"], key


def test_the_users_own_file_is_found(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "config" / "cachefs" / "cachefs.toml", "[mount]\nthreads = 5\n")
    assert shown(run("config", "show", "mount", "--json"))["settings"]["threads"]["from"].startswith(str(file))
    other = write(tmp_path / "other.toml", "[mount]\nthreads = 6\n")
    assert (
        shown(run("config", "show", "mount", "--json", CACHEFS_CONFIG=str(other)))["settings"]["threads"]["value"] == 6
    )


def test_a_profile_counts_less_than_what_is_asked_for(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", '[mount]\nprofile = "training"\nattr-timeout = "5s"\n')
    found = shown(run("config", "show", "--config", file, "--json"))["settings"]
    assert (found["entry-timeout"]["value"], found["entry-timeout"]["from"]) == (7200, "profile training")
    assert found["attr-timeout"]["value"] == 5


def test_secrets_are_not_shown(run: Run, tmp_path: Path) -> None:
    options = json.dumps({"secret": "topsecret1", "endpoint_url": "http://user:topsecret2@host:1", "key": "topsecret3"})
    file = write(
        tmp_path / "c.toml",
        '[ufs.options]\nsession_token = "topsecret4"\nregion = "eu"\n[master]\nmount = ["/=s3://a:topsecret5@b/c"]\n',
    )
    for arguments in (["--json"], []):
        for command in ("up", "master"):
            done = run("config", "show", command, "--config", file, *arguments, CACHEFS_UFS_OPTIONS=options)
            assert done.returncode == 0
            assert "topsecret" not in done.stdout + done.stderr
            assert "region" in done.stdout and "host:1" in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mount]\nopen-wiat = 1\n", ["key in [mount]", "open-wiat", "open-wait, which is the nearest"]),
        ("[mont]\nthreads = 1\n", ["section", "[mont]", "mount, which is the nearest"]),
        ("threads = 1\n", ["section", "[threads]"]),
        ("[mount]\nthreads = true\n", ["threads in [mount]", "True", "a text or a number"]),
        ("[mount]\nallow-nonempty = 1\n", ["allow-nonempty in [mount]", "true or false"]),
        ('[mount]\nopen-wait = "lots"\n', ["--open-wait", "lots", "a size such as", "open-wait in [mount]"]),
        ("[mount]\nthreads = 0\n", ["--threads", "1<=x<=1024", "threads in [mount]"]),
        ('[mount]\nopen-mode = "fast"\n', ["--open-mode", "'fast'", "'no-open'", "open-mode in [mount]"]),
        ("[mount\n", ["--config", "a TOML file"]),
        ("[ufs]\noptins = 1\n", ["key in [ufs]", "options, a table"]),
        ("[ufs.options]\nsecret = 5\n", ["secret in [ufs.options]", "a text"]),
    ],
)
def test_what_is_wrong_in_the_file(run: Run, tmp_path: Path, text: str, said: list[str]) -> None:
    file = write(tmp_path / "c.toml", text)
    done = run("up", "file:///nowhere", tmp_path / "mnt", "--config", file)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for each in [str(file), *said]:
        assert each in done.stderr, done.stderr


def test_a_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    done = run("up", "file:///nowhere", tmp_path, "--config", tmp_path / "none.toml")
    assert "--config" in done.stderr and "No such file" in done.stderr


def test_variables(run: Run, tmp_path: Path) -> None:
    wrong = run("up", "file:///nowhere", tmp_path, CACHEFS_THREADS="many")
    assert "--threads" in wrong.stderr and "(from CACHEFS_THREADS)" in wrong.stderr
    misspelt = run("up", "file:///nowhere", tmp_path, CACHEFS_OPEN_WIAT="1M")
    assert "'CACHEFS_OPEN_WIAT' is not accepted; expected CACHEFS_OPEN_WAIT" in misspelt.stderr
    # Kubernetes puts these into every pod beside a service of that name.
    others = {"CACHEFS_MASTER_SERVICE_HOST": "10.0.0.1", "CACHEFS_MASTER_PORT": "tcp://10.0.0.1:7000"}
    assert run("config", "show", **others, CACHEFS_MASTER_PORT_7000_TCP="tcp://x").returncode == 0


def test_misspelt_commands_and_flags(run: Run, tmp_path: Path) -> None:
    assert "Did you mean 'report'?" in run("reprot").stderr
    done = run("up", "file:///nowhere", tmp_path, "--open-wiat", "1M")
    assert done.returncode == 2 and "--open-wait" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_CACHEFS_COMPLETE" in script
    completed = run(_CACHEFS_COMPLETE="bash_complete", COMP_WORDS="cachefs re", COMP_CWORD="1")
    assert {"plain,report", "plain,refresh"} <= set(completed.stdout.split())
    flags = run(_CACHEFS_COMPLETE="bash_complete", COMP_WORDS="cachefs up --open-", COMP_CWORD="2")
    assert {"plain,--open-mode", "plain,--open-wait"} <= set(flags.stdout.split())


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
def test_up_with_a_file_and_two_tiers(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data / "file", "content")
    file = write(
        tmp_path / "c.toml",
        f"""
        [up]
        state-dir = "{tmp_path / "state"}"
        [mount]
        open-mode = "cached"
        umask = "077"
        allow-other = false
        [worker]
        tier = ["ssd:{tmp_path / "one"}:1G", "ssd:{tmp_path / "two"}:2G"]
        [master]
        sync-interval = "7s"
        [ufs.options]
        settle = "0"
        """,
    )
    environment = {"CACHEFS_READ_AHEAD": "3M", "CACHEFS_OPEN_MODE": "auto"}
    with (
        mountpoint_below(tmp_path) as mountpoint,
        running("up", data.as_uri(), mountpoint, "--config", file, environment=environment) as process,
    ):
        assert process.facts["open_mode"] == "passthrough"
        listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
        mine = [line for line in listed if str(tmp_path) in line]
        (mount,) = [line for line in mine if " mount-server " in line]
        (worker,) = [line for line in mine if " worker " in line]
        (master,) = [line for line in mine if " master " in line]
        assert "--umask 77" in mount and "--no-allow-other" in mount and f"--read-ahead {3 << 20}" in mount
        assert f"--tier ssd:{tmp_path}/one:{1 << 30} --tier ssd:{tmp_path}/two:{2 << 30}" in worker
        assert "--sync-interval 7s" in master and "settle" not in master
        done = subprocess.run(
            ["stat", "-c", "%A", str(mountpoint / "file")], capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "-rw-------\n"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["up"], "'URL'"),
        (["up", "s3://bucket"], "'MOUNTPOINT'"),
        (["mount", "/m"], "'--master'"),
        (["worker"], "'--master'"),
        (["master", "--listen", "127.0.0.1:0"], "'--data-dir'"),
    ],
)
def test_what_is_missing_is_named(run: Run, arguments: list[str], missing: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("Error: ")]
    assert line.startswith("Error: Missing ") and missing in line and "from" not in line


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("sync-interval", "soon", "a duration such as"),
        ("sync-interval", "-2", "-1 for never"),
        ("page-size", "3", "64 KiB to 16 MiB"),
        ("page-size", "65537", "a multiple of 4 KiB"),
    ],
)
@pytest.mark.parametrize("command", ["up", "master"])
def test_intervals_and_page_sizes(run: Run, tmp_path: Path, command: str, key: str, value: str, accepted: str) -> None:
    """Told by the command itself, before it starts anything, and by `config show` too."""
    given = ["file:///nowhere", tmp_path] if command == "up" else ["--data-dir", tmp_path / "m", "--listen", "[::1]:0"]
    by_flag = run(command, *given, f"--{key}", value)
    assert by_flag.returncode == 2 and f"'--{key}'" in by_flag.stderr and accepted in by_flag.stderr
    file = write(tmp_path / "c.toml", f'[{command}]\n{key} = "{value}"\n')
    shown_of_it = run("config", "show", command, "--config", file)
    said = f"Error: {file}: {key} in [{command}]: {value!r} is not accepted; expected "
    assert shown_of_it.returncode == 1 and shown_of_it.stderr.startswith(said) and accepted in shown_of_it.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("threads", "0", "'0' is not accepted; expected 1 to 1024"),
        ("threads", "many", "'many' is not accepted; expected 1 to 1024"),
        ("metadata-cache-entries", "1", "'1' is not accepted; expected a whole number of at least 1000"),
        ("open-mode", "fast", "'fast' is not accepted; expected one of auto, passthrough, cached, no-open"),
        ("open-wait", "lots", "'lots' is not accepted; expected a size such as"),
        ("open-wait", "2G", "'2G' is not accepted; expected 0 to 1G"),
        ("read-ahead", "2T", "'2T' is not accepted; expected 0, or 4K to 1T"),
        ("attr-timeout", "400d", "'34560000s' is not accepted; expected 0 to 365d"),
    ],
)
def test_what_config_show_refuses_is_a_sentence(run: Run, key: str, value: str, said: str) -> None:
    variable = "CACHEFS_" + key.upper().replace("-", "_")
    assert run("config", "show", **{variable: value}).stderr.startswith(f"Error: {variable}: {said}")


def test_values_are_shown_as_they_are_written(run: Run, tmp_path: Path) -> None:
    """What is shown can be written on a command line, and says the same there."""
    tiers = [f"ssd:{tmp_path}/one:1536M", "mem:/dev/shm/two:3G"]
    file = write(
        tmp_path / "c.toml",
        f'[up]\ntier = {json.dumps(tiers)}\nsync-interval = "-1"\n'
        '[mount]\numask = "077"\nattr-timeout = "5m"\nread-ahead = "3M"\nallow-other = false\n',
    )
    arguments = ("config", "show", "up", "--config", file)
    text = run(*arguments).stdout
    assert "TierConfig" not in text and f"{file}: umask in [mount]" in text and f"{file}: tier in [up]" in text
    rows = {each[0]: each[1] for line in text.splitlines() if len(each := line.strip("│ ").split("│")) == 3}
    rows = {key.strip(): value.strip() for key, value in rows.items()}
    wanted = {"umask": "077", "attr-timeout": "300s", "read-ahead": "3M", "allow-other": "false", "sync-interval": "-1"}
    assert rows["tier"].split() == tiers
    assert {key: rows[key] for key in wanted} == wanted
    found = shown(run(*arguments, "--json"))["settings"]
    assert found["tier"]["value"] == tiers and found["umask"]["value"] == "077"
    assert (found["attr-timeout"]["value"], found["allow-other"]["value"]) == (300, False)
    master = shown(run("config", "show", "master", "--json", CACHEFS_MOUNT="/a=s3://b/c", CACHEFS_LISTEN="[::1]:7"))
    assert master["settings"]["mount"]["value"] == ["/a=s3://b/c"]
    assert master["settings"]["listen"]["value"] == "[::1]:7"


def test_what_nobody_set_has_a_value_too(run: Run, tmp_path: Path) -> None:
    found = shown(run("config", "show", "--json", "--config", write(tmp_path / "c.toml", "")))["settings"]
    for key in ("attr-timeout", "entry-timeout", "negative-timeout"):
        assert (found[key]["value"], found[key]["from"]) == (60, "default: that of --sync-interval")
    assert isinstance(found["allow-other"]["value"], bool)
    (tier,) = found["tier"]["value"]
    assert tier.startswith("ssd:/") and "half of what is free" in found["tier"]["from"]
    assert (found["page-size"]["value"], found["promote"]["value"], found["files-ahead"]["value"]) == (
        *(8 << 20, "if-space", 64),
    )
    assert found["umask"]["value"] == "000"
    never = shown(run("config", "show", "--json", CACHEFS_SYNC_INTERVAL="-1"))["settings"]
    assert never["attr-timeout"]["value"] == "for ever"
    mount = shown(run("config", "show", "mount", "--json"))["settings"]
    assert mount["attr-timeout"]["from"] == "default: that of the master's --sync-interval"
    assert mount["promote"]["from"] == "default: that of the worker"
