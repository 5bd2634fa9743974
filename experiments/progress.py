"""Progress bars out of the library's events: what, how far, time left."""

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Progress:
    """A callback that keeps one bar a stage; also prints lines above the bars.

    Args:
        prefix: put before each stage's name, such as the temperature.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self._bar: tqdm | None = None
        self._stage: str | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Move the bar of the event's stage; events without a count end it."""
        done, total = _count(event)
        if total is None:
            self.close()
            return
        stage = self.prefix + event["stage"]
        if stage != self._stage:
            self.close()
            self._stage = stage
            # A resumed stage starts where it stopped, or the time left would be nonsense.
            initial = done - 1 if event["event"] == "step" else 0
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=f"{stage:<28}",
                unit=event.get("unit", "step" if event["event"] == "step" else "ex"),
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.5,
            )
        assert self._bar is not None
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if event["event"] == "epoch":
            self._bar.set_postfix(
                {"loss": f"{event['loss']:.4f}", "acc": f"{event['accuracy']:.4f}"}
            )
        elif done >= total and event["event"] != "step":
            self.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._stage = None

    def say(self, line: str) -> None:
        """Print a line without breaking a bar."""
        tqdm.write(line, file=sys.stderr)


def _count(event: Mapping[str, Any]) -> tuple[int, int | None]:
    if event["event"] in ("step", "epoch"):
        return event["step"], event["num_steps"]
    return event.get("done", 0), event.get("total")
