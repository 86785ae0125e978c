"""Signs of life of a long loop: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 20


def progress(items: Iterable[T], name: str, total: int, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """The items as they come; `size` of them add up to `total`."""
    with tqdm(total=total, desc=name, disable=None) as bar:  # None: no bar where there is no terminal
        done, last = 0, time.monotonic()
        for item in items:
            yield item
            done += size(item)
            bar.update(size(item))
            if bar.disable and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(f"{name}: {done} of {total}", flush=True)
