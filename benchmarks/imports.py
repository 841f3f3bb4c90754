"""Time to import, in fresh processes: the part of a program that nobody asked for.

    python benchmarks/imports.py [--repeats 7]
"""
import argparse
import subprocess
import sys
import time

from _table import alternate, markdown, spread, write

JOBS = {  # name: (command line behind python, goal in seconds, of what it is the excess)
    'python itself': (['-c', 'pass'], None, None),
    'import llmnotes.core': (['-c', 'import llmnotes.core'], .2, 'python itself'),
    'import torch': (['-c', 'import torch'], None, None),
    'import llmnotes.model': (['-c', 'import llmnotes.model'], .1, 'import torch'),
    'llmnotes --help': (['-m', 'llmnotes.cli', '--help'], .5, None),
}


def start(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=7, help='rounds, after one to warm the disk')
    args = parser.parse_args()
    jobs = {name: lambda c=command: start(c) for name, (command, _, _) in JOBS.items()}
    alternate(jobs, 1)                                           # files into the page cache
    began = time.perf_counter()
    took = {name: spread(s) for name, s in alternate(jobs, args.repeats).items()}
    rows = []
    for name, (_, goal, base) in JOBS.items():
        t = took[name]
        cost = t['median'] - (took[base]['median'] if base else 0)
        said = f'{cost:.3f} s, goal {goal} s: ' + ('met' if cost < goal else 'missed') if goal else ''
        rows.append([name, f"{t['median']:.3f} s", f"{t['least']:.3f} to {t['most']:.3f}",
                     f'over {base}' if base else '', said])
        t.update(goal=goal, base=base, cost=cost)
    table = markdown(['what', 'median', 'spread (s)', 'counted', 'cost'], rows)
    write('imports', 'Import times', [table],
          f'Each is a fresh process; medians of {args.repeats} rounds in which all took turns, after '
          f'a round that brought the files into memory; {time.perf_counter() - began:.0f} s in all.',
          dict(seconds=took), 'torch', 'numpy')


if __name__ == '__main__':
    main()
