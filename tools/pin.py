"""Print constraints for all that the extras bring, as installed in this environment."""
import importlib.metadata
import re
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
HEAD = '''\
# Exact versions that were installed and tried together. The bounds in settings.ini say what
# may work; this file says what did. `make update` tries newer ones and writes it anew.
'''


def direct() -> Iterator[Requirement]:
    "What settings.ini asks for, all extras but `gpu`"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    for key, value in ini['DEFAULT'].items():
        if re.fullmatch(r'(?!gpu)(\w+_)?requirements', key):
            yield from map(Requirement, value.split())


def installed(
    wanted:Iterator[Requirement], # Where to begin
) -> dict[str, str]: # {name: version}, all that these need in turn
    "The closure of some requirements in this environment"
    found, todo, done = {}, list(wanted), set()
    while todo:
        r = todo.pop()
        key = canonicalize_name(r.name), frozenset(r.extras)
        if key in done: continue
        done.add(key)
        dist = importlib.metadata.distribution(r.name)
        found[key[0]] = dist.version.split('+')[0]           # 2.13.0+cpu is a build of 2.13.0
        for q in map(Requirement, dist.requires or ()):
            if q.marker is None or any(q.marker.evaluate({'extra': e}) for e in {'', *r.extras}):
                todo.append(q)
    return found


if __name__ == '__main__':
    print(HEAD + '\n'.join(f'{k}=={v}' for k, v in sorted(installed(direct()).items())))
