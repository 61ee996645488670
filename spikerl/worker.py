"""One worker of a run, as the elastic agent starts it: python -m spikerl.worker MAILBOX PID."""

from __future__ import annotations

import sys
from pathlib import Path

from spikerl.distributed.orphans import die_if_spawned

die_if_spawned()


def main(mailbox: Path, parent: int) -> int:
    from spikerl import runs
    from spikerl.distributed import launch

    def earlier_stop() -> int | None:
        return launch.stop_requested(mailbox)

    return launch.work(mailbox, parent, lambda spec: runs.work(spec, earlier_stop))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
