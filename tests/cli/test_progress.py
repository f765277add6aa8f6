"""How far something is, told as often as promised, whether or not anything happens."""

from __future__ import annotations

import io

import pytest
import trio
from rich.console import Console
from trio.testing import MockClock

from cachefs.cli.progress import HowFar, shown


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


async def test_without_a_terminal_a_line_every_five_seconds() -> None:
    output = io.StringIO()
    done = 0
    async with shown(Console(file=output), "freeing", lambda: HowFar(f"{done} of 10 [files]", done, 10)):
        await trio.sleep(4.9)
        assert output.getvalue() == ""
        for _ in range(8):
            done += 1
            await trio.sleep(2)
    assert output.getvalue().splitlines() == [f"freeing: {number} of 10 [files]" for number in (1, 3, 6, 8)]


@pytest.mark.parametrize("total", [None, 0, 10])
async def test_on_a_terminal_a_bar_that_ends_with_how_far_it_came(total: int | None) -> None:
    output = io.StringIO()
    done = 0
    with pytest.RaisesGroup(OSError):
        async with shown(
            Console(file=output, force_terminal=True, width=100),
            "freeing",
            lambda: HowFar(f"{done} [done]", done, total),
        ):
            await trio.sleep(1)
            done = 7
            raise OSError
    assert "freeing" in output.getvalue() and "7 [done]" in output.getvalue()
