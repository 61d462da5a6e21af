"""Hangs of real groups are found in time, and slow steps are not taken for hangs:

    python -m tests.soak.hangs [--trials STOPS] [--minutes M] [--json FILE]

Stops: ranks of every layout stopped at every phase, in turn; how long until the group was given up. Alarms:
a group on all cores is kept saturated with prompts of 8,000 tokens in large chunks, some steps of which take
seconds, and is now and then left idle; any restart is a false alarm. For the latter, load the machine
otherwise too (nice -n 10). Ends with 1 unless all stops were found in time and there was no alarm.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engines.wire import Stats
from gateway.bench import machine
from gateway.workers.group import Group
from tests.engines import faults
from tests.engines.faults import LAYOUTS, Fault
from tests.engines.layouts import Layout
from tests.engines.reference import request_of
from tests.models import SMALL, make_llama

LIMIT_SECONDS = 5.0
LONG_PROMPT = 8000
LARGE = replace(SMALL, layers=6, max_positions=16384)
MAX_BATCHED = 2048
NUM_CLIENTS = 12
BUSY_SECONDS, IDLE_SECONDS = 100.0, 12.0


async def stops(count: int, model: Path) -> list[dict[str, Any]]:
    """Each layout gets its share of the stops, at random ranks, the phases in turn."""
    found: list[dict[str, Any]] = []
    phases = itertools.cycle(faults.PHASES)
    for number, layout in enumerate(LAYOUTS):
        share = len(range(number, count, len(LAYOUTS)))
        async with faults.supervised(faults.config_for(layout, model)) as (group, temp_dir):
            await faults.until_ready(group)
            expected = await faults.answer(group)
            for _ in range(share):
                rank = random.randrange(layout.tp * layout.pp)
                fault = Fault(rank, signal.SIGSTOP, next(phases))
                outcome = await faults.strike(group, temp_dir, fault, expected)
                print(f"{layout} {fault}: found after {outcome.ended:.2f} s: {outcome.reason}", flush=True)
                found.append({"layout": str(layout), "fault": str(fault), **asdict(outcome)})
    return found


@dataclass
class Load:
    """What the saturated group did."""

    seconds: float = 0.0
    num_alarms: int = 0
    num_prompts: int = 0  # long ones, answered
    num_tokens: int = 0  # generated
    num_steps: int = 0
    longest_step: float = 0.0  # seconds, as the heartbeats tell: a mean where several came between two


async def alarms(minutes: float, model: Path) -> Load:
    layout = Layout("native", tp=2)
    config = faults.config_for(layout, model).model_copy(
        update={
            "max_num_batched_tokens": MAX_BATCHED,
            "kv_cache_memory": 2 << 30,
            "prefix_cache": False,
            "response_timeout": 3600.0,  # saturated: prompts wait for others, and that is no hang
        }
    )
    load = Load()
    async with faults.supervised(config) as (group, _):
        await faults.until_ready(group)
        started = time.monotonic()
        measuring = asyncio.create_task(_measure(group, load))
        while time.monotonic() < started + 60 * minutes and not group.num_restarts:
            busy_until = min(time.monotonic() + BUSY_SECONDS, started + 60 * minutes)
            await asyncio.gather(*(_client(group, number, busy_until, load) for number in range(NUM_CLIENTS)))
            await asyncio.sleep(IDLE_SECONDS)
        measuring.cancel()
        load.seconds, load.num_alarms = time.monotonic() - started, group.num_restarts
        print(f"alarms: {load}{f' {group.failure}' if group.num_restarts else ''}", flush=True)
    return load


async def _client(group: Group, number: int, until: float, load: Load) -> None:
    """Long prompts or short ones, one after the other; a stream that runs out of time is closed."""
    generator = random.Random(number)
    length = LONG_PROMPT if number % 2 else 30
    for turn in itertools.count():
        prompt = [generator.randrange(2, LARGE.vocab) for _ in range(length)]
        request = request_of(f"{os.getpid()}-{time.monotonic()}-{number}-{turn}", prompt, 40)
        stream = group.generate(request)
        async for batch in stream:
            load.num_tokens += sum(len(delta.token_ids) for delta in batch)
            if time.monotonic() > until:
                await stream.aclose()
                return
        load.num_prompts += length == LONG_PROMPT


async def _measure(group: Group, load: Load) -> None:
    last: Stats | None = None
    while True:
        stats = group.stats
        if stats is not None and last is not None and stats.num_active_steps > last.num_active_steps:
            num_steps = stats.num_active_steps - last.num_active_steps
            load.num_steps += num_steps
            seconds = (stats.active_seconds - last.active_seconds) / num_steps
            load.longest_step = max(load.longest_step, seconds)
        last = stats
        await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="stops")
    parser.add_argument("--minutes", type=float, default=30.0, help="of saturation")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        small = make_llama(Path(directory) / "small", faults.SHAPE, seed=3)
        large = make_llama(Path(directory) / "large", LARGE, seed=3)
        found = asyncio.run(stops(args.trials, small)) if args.trials else []
        load = asyncio.run(alarms(args.minutes, large)) if args.minutes else Load()
    times = sorted(one["ended"] for one in found)
    in_time = sum(seconds <= LIMIT_SECONDS for seconds in times)
    print(f"{in_time} of {len(times)} stops found within {LIMIT_SECONDS:g} s; {load.num_alarms} false alarms")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python -m tests.soak.hangs " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "num_stops": len(times),
            "num_in_time": in_time,
            "slowest_seconds": times[-1] if times else None,
            "saturation": asdict(load),
            "stops": found,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(in_time < len(times) or load.num_alarms > 0)


if __name__ == "__main__":
    main()
