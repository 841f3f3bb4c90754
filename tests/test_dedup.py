"""Deduplication of files: the cut, the processes and a kill change nothing."""
import hashlib
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

import llmnotes.data.dedup as dedup
from llmnotes.corpus import Document, write_jsonl
from llmnotes.data.dedup import deduplicate, deduplicate_files, minhash_signature, normalise, shingle_hashes


def corpus(n: int = 400) -> list[Document]:
    "Random texts; every fifth one copies an earlier one, exactly or with a few words changed"
    rng, documents = random.Random(7), []
    for i in range(n):
        words = [f'w{rng.randrange(3000)}' for _ in range(rng.randrange(3, 90))]
        if i % 5 == 4:
            words = rng.choice(documents).text.split()
            if i % 10 == 4: words[rng.randrange(len(words))] = 'new'
        documents.append(Document(f'd{i}', ' '.join(words), 'web', 'made', 'none'))
    return documents


def shards(folder: Path, documents: list[Document], n: int) -> list[Path]:
    folder.mkdir()
    cuts = np.linspace(0, len(documents), n + 1).astype(int)
    paths = [folder/f'{k}.jsonl' for k in range(n)]
    for path, i, j in zip(paths, cuts, cuts[1:]): write_jsonl(documents[i:j], path)
    return paths


def whole(out: Path, paths: list[Path]) -> tuple[bytes, bytes]:
    return tuple(b''.join((folder/p.name).read_bytes() for p in paths) for folder in (out, out/'dropped'))


@pytest.mark.parametrize('n, workers', [(1, 1), (4, 1), (1, 4), (4, 4)])
def test_shards_and_workers_change_nothing(tmp_path: Path, n: int, workers: int) -> None:
    documents = corpus()
    kept, dropped = deduplicate(documents)
    paths = shards(tmp_path/'in', documents, n)
    counts = deduplicate_files(paths, tmp_path/'out', workers=workers)
    lines, gone = whole(tmp_path/'out', paths)
    assert [json.loads(x)['id'] for x in lines.splitlines()] == [d.id for d in kept]
    assert sorted(map(json.loads, gone.splitlines()), key=lambda r: r['id']) == \
        sorted(dropped, key=lambda r: r['id'])
    why = [r['why'] for r in dropped]
    assert counts == dict(read=400, kept=len(kept), exact=why.count('exact'), near=why.count('near'), bad=0)
    assert counts['exact'] > 20 and counts['near'] > 10


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Shards that were read are not read again, and nothing half written is left"
    documents, scan, seen = corpus(), dedup._scan, []
    paths = shards(tmp_path/'in', documents, 4)
    deduplicate_files(paths, tmp_path/'want')

    def dies(path: Path, *rest: object) -> dict:
        seen.append(path.name)
        if len(seen) == 3: raise KeyboardInterrupt
        return scan(path, *rest)
    monkeypatch.setattr(dedup, '_scan', dies)
    with pytest.raises(KeyboardInterrupt): deduplicate_files(paths, tmp_path/'out')
    assert not list((tmp_path/'out').glob('*.jsonl'))
    deduplicate_files(paths, tmp_path/'out')
    assert seen == ['0.jsonl', '1.jsonl', '2.jsonl', '2.jsonl', '3.jsonl']
    assert whole(tmp_path/'out', paths) == whole(tmp_path/'want', paths)
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == [*(f'{k}.jsonl' for k in range(4)), 'dropped']


def test_other_settings_are_not_taken_from_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shards(tmp_path/'in', corpus(60), 2)
    finish = dedup._finish
    def dies(*args: object) -> dict: raise KeyboardInterrupt
    monkeypatch.setattr(dedup, '_finish', dies)
    with pytest.raises(KeyboardInterrupt): deduplicate_files(paths, tmp_path/'out', ngram=13)
    monkeypatch.setattr(dedup, '_finish', finish)
    deduplicate_files(paths, tmp_path/'out')
    deduplicate_files(paths, tmp_path/'want')
    assert whole(tmp_path/'out', paths) == whole(tmp_path/'want', paths)


def test_odd_lines(tmp_path: Path) -> None:
    "No newline at the end, empty documents, a line of megabytes, bytes that are no UTF-8"
    path, long = tmp_path/'a.jsonl', ' '.join(f'w{i}' for i in range(400_000))
    rows = [dict(id='long', text=long), dict(id='empty', text=''), dict(id='none', text=' \n'),
            dict(id='null', text=None), dict(id='again', text=long)]
    path.write_bytes(b'\xff\n' + '\n'.join(map(json.dumps, rows)).encode())
    start = time.process_time()
    assert deduplicate_files([path], tmp_path/'out') == dict(read=6, kept=2, exact=2, near=0, bad=2)
    assert time.process_time() - start < 60
    assert [json.loads(x)['id'] for x in (tmp_path/'out'/'a.jsonl').open()] == ['long', 'empty']


def test_hashes_of_any_text() -> None:
    rng = random.Random(3)
    points = [*range(0x250), *range(0x370, 0x400), *range(0x1e00, 0x2070), 0x212a, 0x2260, 0x226e, 0xfb01, 0x1f600]
    for _ in range(2000):
        text = ''.join(map(chr, rng.choices(points, k=rng.randrange(40))))
        words = normalise(text).encode().split(b' ')
        runs = {b' '.join(words[i:i + 2]) for i in range(len(words) - 1)}
        want = sorted({int.from_bytes(hashlib.sha1(r).digest()[:4], 'little') for r in runs})
        assert shingle_hashes(text, ngram=2).tolist() == want, ascii(text)


def test_golden_six() -> None:
    six = [186966786, 59101012, 343111293, 638598101, 286703813, 1039572128]
    assert minhash_signature('the quick brown fox jumps over the lazy dog')[:6].tolist() == six
