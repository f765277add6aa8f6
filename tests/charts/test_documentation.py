"""docs/kubernetes.md: its manifests are such as Kubernetes takes, its values such as the chart takes, and its commands
such as ours are.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cachefs.cli.mount_options import OF_A_VOLUME
from tests.charts.rendered import CHART, manifests_in, render, yaml
from tests.charts.test_commands import parsed
from tests.charts.test_rendering import kubernetes_validate, oldest_and_newest

pytestmark = pytest.mark.usefixtures("schemas_read_once")

TEXT = (CHART.parents[1] / "docs" / "kubernetes.md").read_text()
EXAMPLES = sorted(path for path in (CHART / "examples").glob("*-volume.yaml"))


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


MANIFESTS = [each for each in blocks("yaml") if "apiVersion:" in each]
VALUES = [each for each in blocks("yaml") if "apiVersion:" not in each]


def commands() -> list[list[str]]:
    """Of ours, in blocks and within lines: those that are more than a name."""
    found = []
    for block in blocks(""):
        lines = re.sub(r"\\\n", " ", block).splitlines()
        found += [shlex.split(line, comments=True) for line in lines if re.match("cachefs |in_cluster ", line.strip())]
    found += [shlex.split(each) for each in re.findall("`((?:cachefs|in_cluster) [^`]+)`", TEXT)]
    return [words for words in found if words[1:] != ["()", "{"]]


def test_there_is_something_to_check() -> None:
    assert len(MANIFESTS) >= 5 and len(VALUES) >= 3 and len(commands()) >= 15


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_of_volumes_stand_there_as_they_are(example: Path) -> None:
    assert example.read_text() in MANIFESTS


@pytest.mark.parametrize("text", MANIFESTS)
def test_kubernetes_takes_the_manifests(text: str) -> None:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    for version in oldest_and_newest():
        for each in documents:
            assert version.startswith(kubernetes_validate.validate(each, version, strict=True))


@pytest.mark.parametrize("text", VALUES)
def test_the_chart_takes_the_values(text: str) -> None:
    assert manifests_in(render(yaml.safe_load(text)))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_our_commands_take_what_is_shown(words: list[str]) -> None:
    # Some are in the text without what they are about.
    about = {"quota set": ["/data", "1G"], "mount": ["/mnt", "--master=m:7000"], "volume remove": ["train"]}
    where = ["--master=m:7000"] if words[0] == "in_cluster" else []
    _, told = parsed(["cachefs", *words[1:], *about.get(" ".join(words[1:]), []), *where])
    assert told


def test_the_options_of_volumes_are_all_there() -> None:
    table = TEXT.partition("## Mount options")[2].partition("\n## ")[0]
    named = {each.partition("=")[0] for line in table.splitlines() if line.startswith("| `")
             for each in re.findall("`([^`]+)`", line.split(" | ")[0])}  # fmt: skip
    assert named == {name.replace("_", "-") for name in OF_A_VOLUME}
