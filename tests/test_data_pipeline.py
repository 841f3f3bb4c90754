"""Recipes over files: whatever is cut, killed, damaged or moved, the same documents come out."""
import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import llmnotes.data.pipeline as pipeline
from llmnotes.corpus import read_jsonl
from llmnotes.data.extract import Page, write_warc
from llmnotes.data.pipeline import STEPS, datatrove_step, read_recipe, run_recipe

STREAM = ['whitespace_normalization_mapper', 'fix_unicode_mapper', {'alphanumeric_filter': {'min_ratio': .3}},
          {'words_num_filter': {'min_num': 4}}, 'split_mapper']
RECIPE = [*STREAM, 'document_deduplicator', {'document_minhash_deduplicator': {'jaccard_threshold': .7}},
          {'quality_rules_filter': {'rules': [{'signal': 'rps_doc_word_count', 'high': 70}]}},
          {'character_repetition_filter': {'max_ratio': .4}}]


def rows(n: int = 300) -> list[dict]:
    "Random texts; every fifth copies an earlier one, some are too short, too long or repeat themselves"
    rng, out = random.Random(5), []
    for i in range(n):
        words = [f'wörd{rng.randrange(2000)}' for _ in range(rng.randrange(1, 80))]
        if i % 5 == 4:
            words = rng.choice(out)['text'].split()
            if i % 10 == 4: words[rng.randrange(len(words))] = 'new'
        if i % 23 == 0: words = ['na'] * 30
        if i % 31 == 0: words = ['?!'] * 9
        row = dict(id=f'd{i}', text=' '.join(words), n=i)
        if i % 3 == 0: row['more'] = [None, {'x': '\ud800'}]
        out.append(row)
    return out


def shards(folder: Path, rows: list[dict], n: int, packed: bool = False) -> list[Path]:
    folder.mkdir()
    paths = [folder/f'{k}.jsonl{".gz" * packed}' for k in range(n)]
    for k, path in enumerate(paths):
        part = rows[k * len(rows) // n:(k + 1) * len(rows) // n]
        data = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in part).encode('utf-8', 'backslashreplace')
        path.write_bytes(gzip.compress(data) if packed else data)
    return paths


def whole(report: dict) -> bytes:
    return b''.join(Path(report['folder'], s).read_bytes() for s in report['shards'])


def counts(report: dict) -> list:
    return [{k: v for k, v in t.items() if k != 'seconds'} for t in report['steps']]


@pytest.mark.parametrize('n, workers, packed', [(4, 1, False), (1, 4, False), (4, 2, True), (4, 4, False)])
def test_shards_and_workers_change_nothing(tmp_path: Path, n: int, workers: int, packed: bool) -> None:
    recipe = RECIPE if workers < 4 else RECIPE[:6]           # starting processes takes the time
    want = run_recipe(recipe, shards(tmp_path/'one', rows(), 1), tmp_path/'want')
    report = run_recipe(recipe, shards(tmp_path/'in', rows(), n, packed), tmp_path/'out', workers=workers)
    assert whole(report) == whole(want)
    assert counts(report) == counts(want)
    assert all(t['dropped'] for t in report['steps'] if 'mapper' not in t['step'] and t['step'] != 'read')
    for t in report['steps']:
        assert t['read'] == t['kept'] + sum(d['documents'] for d in t['dropped'].values())
        assert all(len(d['examples']) == min(3, d['documents']) for d in t['dropped'].values())
    texts = [json.loads(line)['text'] for line in whole(report).splitlines()]
    assert report['steps'][-1]['bytes'] == sum(len(t.encode()) for t in texts)


def test_rows_come_out_as_they_went_in(tmp_path: Path) -> None:
    "No step, no change: columns, nulls, surrogates outside of the text, order"
    paths = shards(tmp_path/'in', rows(), 3)
    for k, recipe in enumerate([[], [{'words_num_filter': {'min_num': 0}}], ['fix_unicode_mapper']]):
        report = run_recipe(recipe, paths, tmp_path/f'out-{k}')
        assert whole(report) == b''.join(p.read_bytes() for p in paths)


def test_no_reader_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, seen = shards(tmp_path/'in', rows(20), 2), []

    def look() -> Callable:
        def names(batch: dict) -> dict:
            seen.append(sorted(p.name for p in (tmp_path/'out/stage-0').glob('*.jsonl')))
            return {}
        return names
    monkeypatch.setitem(STEPS, 'look', look)
    run_recipe(['look'], paths, tmp_path/'out')
    assert seen == [[], ['0.jsonl']]


@pytest.mark.parametrize('where', ['_whole', '_save', '_count', '_compare', 'deduplicate_files'])
def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    "It fails at every call of a function in turn, in every stage"
    paths = shards(tmp_path/'in', rows(60), 2)
    want = run_recipe(RECIPE, paths, tmp_path/'want')
    f, failed, left = getattr(pipeline, where), 0, []

    def dies(*args: object, **how: object) -> object:
        if left:
            left.pop()
            if not left: raise KeyboardInterrupt
        return f(*args, **how)
    while True:
        left[:] = [0] * (1 + failed * (12 if where == '_count' else 1))
        monkeypatch.setattr(pipeline, where, dies)
        out = tmp_path/f'out-{failed}'
        try: report = run_recipe(RECIPE, paths, out)
        except KeyboardInterrupt:
            assert not list(out.glob('**/.*.part'))
            monkeypatch.setattr(pipeline, where, f)
            report = run_recipe(RECIPE, paths, out)
        else: break
        assert whole(report) == whole(want) and counts(report) == counts(want)
        failed += 1
    assert failed >= dict(_whole=8, _save=8, _count=10, _compare=4, deduplicate_files=1)[where]


def test_finished_shards_are_not_made_again_and_damaged_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, made = shards(tmp_path/'in', rows(60), 3), []
    want = whole(run_recipe(STREAM, paths, tmp_path/'out'))
    own = pipeline._whole
    monkeypatch.setattr(pipeline, '_whole', lambda p: made.append(p.name) or own(p))
    assert whole(run_recipe(STREAM, paths, tmp_path/'out')) == want and made == []
    (tmp_path/'out/stage-0/0.jsonl').unlink()
    with open(tmp_path/'out/stage-0/1.jsonl', 'r+b') as file: file.truncate(99)
    (tmp_path/'out/stage-0/counts/2.jsonl.json').unlink()
    (tmp_path/'out/stage-0/.2.jsonl.1.part').write_text('half')
    assert whole(run_recipe(STREAM, paths, tmp_path/'out')) == want
    assert made == ['0.jsonl', '1.jsonl', '2.jsonl'] and not list((tmp_path/'out/stage-0').glob('.*'))


def test_other_recipes_and_inputs_are_refused(tmp_path: Path) -> None:
    paths = shards(tmp_path/'in', rows(20), 2)
    run_recipe(STREAM, paths, tmp_path/'out')
    for recipe, inputs, how in [(STREAM[1:], paths, {}), (STREAM, paths[:1], {}), (STREAM, paths[::-1], {}),
                                (STREAM, paths, dict(max_line=99)), ([*STREAM, STREAM[0]], paths, {})]:
        with pytest.raises(ValueError, match='was begun with .* take another folder'):
            run_recipe(recipe, inputs, tmp_path/'out', **how)
    os.utime(paths[0], ns=(1, 1))
    with pytest.raises(ValueError, match='was begun with'): run_recipe(STREAM, paths, tmp_path/'out')


def test_every_cut_of_a_gzip_file(tmp_path: Path) -> None:
    "What stands before the cut is kept, whole lines of it, and the cut is counted"
    lines = [json.dumps(dict(id=i, text=f'{random.Random(i).random()}')) for i in range(40)]
    data = gzip.compress('\n'.join(lines).encode())
    last = 0
    for n in [*range(20, len(data), 61), len(data) - 9, len(data) - 1, len(data)]:
        path = tmp_path/f'{n}.jsonl.gz'
        path.write_bytes(data[:n])
        found = list(pipeline._rows(path, 2**20))
        good = [json.dumps(row) for row, why in found if why is None]
        assert good == lines[:len(good)] and len(good) >= last
        assert [why for _, why in found[len(good):]] == ([] if n == len(data) else ['broken gzip'])
        last = len(good)
    assert last == 40
    path.write_bytes(data[:len(data) // 2] + b'????' + data[len(data) // 2 + 4:])
    assert [why for _, why in pipeline._rows(path, 2**20)][-1] == 'broken gzip'


def test_bad_lines(tmp_path: Path) -> None:
    bad = {b'{"text": "\xff"}': 'no UTF-8', b'{"text": "\\udc00"}': 'no UTF-8', b'{': 'no JSON', b'x' * 500: 'no JSON',
           b'[' * 99_999: 'line too long', b'[' * 9000: 'no JSON', b'7' * 5000: 'no JSON', b'[]': 'no text',
           b'{"text": 7}': 'no text', b'{"id": 1}': 'no text', b'{"text": " \\n"}': 'empty', b'': None, b' \r': None}
    fine = b'\xef\xbb\xbf{"text": "fine\xe2\x80\xa8line"}\r'
    path = tmp_path/'a.jsonl'
    path.write_bytes(b'\n'.join([fine, *bad, fine]))
    found = list(pipeline._rows(path, 10_000))
    assert [why for _, why in found] == [None, *filter(None, bad.values()), None]
    assert found[0][0] == found[-1][0] == dict(text='fine\u2028line')
    for size, whys in [(30, [None] * 2), (29, ['line too long'] * 2)]: # to the byte, at the end of the file too
        path.write_bytes(b'\n'.join([b'{"text": "%s"}' % (b'x' * 18)] * 2))
        assert [why for _, why in pipeline._rows(path, size)] == whys
    path.write_bytes(b'{"text": "half')
    with pytest.raises(ValueError, match="no document could be read: {'no JSON': 1}"):
        run_recipe(STREAM, [path], tmp_path/'out')


def test_a_line_of_100_mb_is_not_held(tmp_path: Path) -> None:
    path = tmp_path/'a.jsonl'
    with open(path, 'wb') as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(100): file.write(b'x' * 10**6)
        file.write(b'"}\n{"text": "b"}')
    tracemalloc.start()
    report = run_recipe([], [path], tmp_path/'out')
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole(report) == b'{"text": "a"}\n{"text": "b"}\n' and top < 100e6
    assert list(report['steps'][0]['dropped']) == ['line too long']


def test_batches_are_bounded() -> None:
    for length, sizes in [(1, [256, 44]), (2**21, [2] * 150), (2**22, [1] * 300)]:
        found = pipeline._batches((dict(text=text), None) for text in ['x' * length] * 300)
        assert [len(batch) for batch in found] == sizes


def test_a_text_that_a_mapper_empties_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path/'a.jsonl'
    path.write_text('{"id": 1, "text": "\u200b"}\n{"id": 2, "text": "x"}\n{"id": 1, "text": "y"}\n'
                    + '{"text": "z"}\n' * 2)
    report = run_recipe(['whitespace_normalization_mapper', {'document_deduplicator': {'column': 'id'}},
                         'split_mapper'], [path], tmp_path/'out')
    assert [t['kept'] for t in report['steps']] == [5, 5, 4, 2]
    assert report['steps'][3]['dropped']['no id']['documents'] == 2
    assert [json.loads(line)['text'] for line in whole(report).splitlines()] == [' ', 'x']


def test_archives_are_read(tmp_path: Path) -> None:
    html = '<html><body><p>A page about {} and its text.</p></body></html>'
    pages = [Page(f'http://x.org/{w}', html.format(w).encode()) for w in ('cats', 'dogs', 'nothing')]
    pages[2] = Page('http://x.org/none', b'gone', status=404)
    write_warc(pages, tmp_path/'a.warc.gz')
    report = run_recipe(['text_length_filter'], [tmp_path/'a.warc.gz'], tmp_path/'out')
    documents = list(read_jsonl(Path(report['folder'], 'a.jsonl')))
    assert [(d.id, d.text) for d in documents] == [
        (f'http://x.org/{w}', f'A page about {w} and its text.') for w in ('cats', 'dogs')]
    assert {w: d['documents'] for w, d in report['steps'][0]['dropped'].items()} == {'status 404': 1}


def test_recipes_in_yaml(tmp_path: Path, shared: Path) -> None:
    "Data-Juicer's form and names, on a sample of C4, which has neither ids nor anything but text"
    path = tmp_path/'r.yaml'
    path.write_text('process:\n- text_length_filter:\n    min_len: 500\n- fix_unicode_mapper:\n'
                    '- character_repetition_filter: {rep_len: 10, max_ratio: 0.06}\n- document_minhash_deduplicator\n')
    demo = shared/'pruning-demos/c4_demo.jsonl'
    report = run_recipe(path, [demo], tmp_path/'out')
    want = sum(len(json.loads(line)['text']) >= 500 for line in demo.open())
    assert [t['kept'] for t in report['steps'][:3]] == [300, want, want] and 0 < report['steps'][3]['kept'] < want
    for text, said in [('process: [', 'is no YAML'), ('a: 1', 'must hold'), ('- x', 'must hold'),
                       ('process:\n  x: 1', 'a list of steps, not dict'), ('process: [{x: 1}]', "step 'x' is unknown"),
                       ('process: [{text_length_filter: 3}]', 'cannot take 3')]:
        path.write_text(text)
        with pytest.raises(ValueError, match=said): read_recipe(path)


@pytest.mark.parametrize('size', [1, 7, 256])
def test_batches_change_nothing(size: int) -> None:
    for name, settings in read_recipe([s for s in RECIPE if 'document' not in str(s)]):
        step, data = STEPS[name](**settings), rows(80)
        every = step(dict(text=[r['text'] for r in data], id=[r['id'] for r in data]))
        parts = [step(dict(text=[r['text'] for r in data[i:i + size]], id=[r['id'] for r in data[i:i + size]]))
                 for i in range(0, 80, size)]
        assert every == {k: [v for p in parts for v in p[k]] for k in every}


def through_datatrove(executor: Callable, tmp_path: Path, **how: object) -> tuple[list[bytes], list[bytes]]:
    "The same steps over the same shards, by an executor and by us"
    trove = pytest.importorskip('datatrove.data')
    data = [{k: v for k, v in r.items() if k != 'more'} for r in rows()]
    paths, made = shards(tmp_path/'in', data, 4), tmp_path/'made'
    made.mkdir()

    def read(data: object, rank: int, world_size: int) -> object:
        for path in paths[rank::world_size]:
            for line in path.open():
                row = json.loads(line)
                yield trove.Document(row.pop('text'), row.pop('id'), metadata=row | dict(shard=path.name))

    def write(data: object, rank: int, world_size: int) -> object:
        for d in data:
            row = dict(id=d.id, text=d.text, **d.metadata)
            with open(made/row.pop('shard'), 'a') as file: file.write(json.dumps(row, ensure_ascii=False) + '\n')
            yield d

    steps = [datatrove_step(name, **settings) for name, settings in read_recipe(STREAM)]
    executor([read, *steps, write], tasks=2, logging_dir=str(tmp_path/'logs'), **how).run()
    report = run_recipe(STREAM, paths, tmp_path/'out')
    return [(made/p.name).read_bytes() for p in paths], [Path(report['folder'], p.name).read_bytes() for p in paths]


@pytest.mark.parametrize('workers', [1, 2])
def test_datatrove_local(tmp_path: Path, workers: int) -> None:
    executor = pytest.importorskip('datatrove.executor')
    theirs, ours = through_datatrove(executor.LocalPipelineExecutor, tmp_path, workers=workers)
    assert theirs == ours and len(set(ours)) == 4
    with pytest.raises(ValueError, match='works on files'): datatrove_step('document_deduplicator')


def test_datatrove_ray(tmp_path: Path) -> None:
    ray = pytest.importorskip('ray', reason='ray is not installed')
    from datatrove.executor import RayPipelineExecutor
    ray.init(num_cpus=2, include_dashboard=False)
    try: theirs, ours = through_datatrove(RayPipelineExecutor, tmp_path, workers=2, mem_per_cpu_gb=.2)
    finally: ray.shutdown()
    assert theirs == ours
