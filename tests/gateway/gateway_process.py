"""A gateway that does nothing but hold a FakeWorker group, for tests that kill it.

    python -m tests.gateway.gateway_process TEMP_DIR LOG_DIR

prints the pids of guard, launcher and ranks once one sequence runs, and goes on for ever.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil

from gateway.workers.supervisor import Supervisor
from tests.fake_worker import Behaviour
from tests.gateway.groups import fake_group, read, request, until_ready


async def main() -> None:
    temp_dir, log_dir = map(Path, sys.argv[1:])
    async with Supervisor([fake_group(Behaviour(num_ranks=2))], log_dir, temp_dir=temp_dir) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        stream = group.generate(request(4000))
        await anext(stream)
        pids = [process.pid for process in psutil.Process(os.getpid()).children(recursive=True)]
        print(json.dumps(pids), flush=True)
        await read(stream)
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main())
