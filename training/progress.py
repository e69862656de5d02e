"""Progress bars for work that reports (done, total)."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm


def progress_bar(name: str) -> Callable[[int, int], None]:
    """A bar that appears with the first report."""
    bar: tqdm | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc=name, total=total, unit="")
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
