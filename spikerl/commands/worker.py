"""One worker of a run: python -m spikerl.commands.worker SHARED_DIR [PID].

It is started by the elastic agent, whose process id is PID, or by mpiexec, without a PID.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from spikerl.distributed.launchers import adopt
from spikerl.distributed.process_lifetime import die_if_spawned, end_despite_threads, watched

die_if_spawned()


def main(shared_dir: Path, parent: int | None = None) -> int:
    if parent is None:
        adopt()
        parent = watched(shared_dir)
    from spikerl.commands import train
    from spikerl.distributed import launch

    def command(spec: dict[str, Any]) -> int:
        if "bench" in spec:
            from spikerl.commands.bench import workers

            return workers.run_in_worker(spec)
        return train.run_in_worker(spec, shared_dir)

    return launch.run_worker(shared_dir, parent, command)


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    end_despite_threads(status)
    sys.exit(status)
