"""What the benchmarks share: alternating measurement, a Markdown table, a record."""
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmnotes.core import hardware, package_versions, write_atomic

RESULTS = Path(__file__).parent/'results'


def alternate(
    jobs: dict[str, Callable[[], Any]],  # name: one measured unit of work
    repeats: int | dict[str, int],  # rounds; a slow job may have fewer
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # seconds of each repeat
    "Run all jobs in turn, round after round, so that a busy minute hits all alike"
    if isinstance(repeats, int): repeats = dict.fromkeys(jobs, repeats)
    took = {name: [] for name in jobs}
    for i in range(max(repeats.values())):
        for name, job in jobs.items():
            if i >= repeats[name]: continue
            start = clock()
            job()
            took[name].append(clock() - start)
    return took


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return dict(median=statistics.median(seconds), least=min(seconds), most=max(seconds),
                repeats=len(seconds))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def write(
    name: str,  # results/NAME.md and .json
    title: str,
    tables: Sequence[str],  # Markdown
    notes: str,  # what the numbers mean, in sentences
    data: dict[str, Any],
    *packages: str,  # whose versions matter
) -> None:
    "Print the table, and write it beside the machine and the versions that made it"
    where, versions = hardware(), package_versions('llmnotes', *packages)
    load = os.getloadavg()[0]
    machine = (f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, "
               f"GPU: {where['gpu'] or 'none'}; load {load:.1f} at the end; "
               + ', '.join(f'{k} {v}' for k, v in versions.items()))
    day = time.strftime('%Y-%m-%d', time.gmtime())
    text = '\n\n'.join([f'# {title}', *tables, notes, f'Measured {day}: {machine}.']) + '\n'
    record = dict(title=title, date=day, hardware=where, load=load, versions=versions, **data)
    write_atomic(RESULTS/f'{name}.json', json.dumps(record, indent=1) + '\n')
    write_atomic(RESULTS/f'{name}.md', text)
    print(text)
