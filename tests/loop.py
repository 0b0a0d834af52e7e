"""What tests of asynchronous code share: a loop of their own, and how long they wait for what must come."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

PATIENCE_S = 60.0  # in which anything that will happen has happened, on a loaded machine too

P = ParamSpec("P")


def in_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make an asynchronous test a plain one, bounded in time; what fails behind its back fails it too."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        failures: list[dict[str, Any]] = []

        async def bounded() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
            async with asyncio.timeout(1.5 * PATIENCE_S):
                await test(*args, **kwargs)

        asyncio.run(bounded())
        assert failures == []

    return run
