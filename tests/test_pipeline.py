"""Runs that are disturbed, and one whole run of the real notebooks at `cpu` scale."""
import contextlib
import errno
import html.parser
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from toys import adds, command, llmnotes, make_project, notebook, text_of

from llmnotes.core import Workspace, read_records
from llmnotes.pipeline import read_stages, stage_record
from llmnotes.report import held_out

ROOT = Path(__file__).parent.parent
SLOW = 'flag = Path(workspace)/"started"\nflag.touch()\nwhile not (Path(workspace)/"go").exists(): time.sleep(.02)'
WHOLE = '01_one 42\n02_two 42\n03_three 42\n'


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f'{path} did not appear'
        time.sleep(.05)


def ran(out): # names of the notebooks which ran, from the lines of the run
    return re.findall(r'^(\d\d_\w+) .*(?<!done before)$', out, flags=re.M)


def whole(workspace): # every artifact is what its manifest says
    ws = Workspace(workspace)
    names = [p.name for p in ws.artifacts.glob('*') if not p.name.startswith('.')]
    for name in names: ws.artifact(name)
    return sorted(names)


@pytest.fixture
def slow(tmp_path): # the second notebook waits in the middle, until the file `go` is there
    root = make_project(tmp_path/'toy', **{'02_two': adds('02_two', 'b', 'a', before=SLOW)})
    return root, root/'runs'/'default'


def test_run_again_changed_and_forced(tmp_path):
    root = make_project(tmp_path/'toy')
    code, out, err = llmnotes('run', cwd=root)
    assert (code, ran(out)) == (0, ['01_one', '02_two', '03_three']), err
    assert text_of(root/'runs/default', 'c') == WHOLE
    assert str(root/'runs/default/index.html') in out
    stage = json.loads((root/'runs/default/stages/01_one.json').read_text())
    assert stage['status'] == 'done' and stage['wall_s'] > .3 and stage['peak_gib'] > .02
    start = time.monotonic()
    code, out, err = llmnotes('run', cwd=root)
    assert code == 0 and ran(out) == [] and 'nothing to do' in out
    assert time.monotonic() - start < 60                                  # seconds; busy machines
    (root/'nbs/02_two.ipynb').write_text(notebook('02_two', *adds('02_two', 'b', 'a'), '# a remark'))
    code, out, err = llmnotes('run', cwd=root)
    assert ran(out) == ['02_two']                                         # b came out the same
    code, out, err = llmnotes('run', '--from', '02', '--to', '02', cwd=root)
    assert ran(out) == ['02_two'] and 'asked for' in out
    code, out, err = llmnotes('run', '-p', 'seed=7', cwd=root)
    assert len(ran(out)) == 3 and text_of(root/'runs/default', 'c') == WHOLE.replace('42', '7')


def test_sigkill_in_the_middle_of_a_stage_then_resume(slow):
    root, ws = slow
    p = command('run', cwd=root)
    wait_for(ws/'started')
    kernels = json.loads((ws/'.lock').read_text())['kernels']
    p.kill(); p.communicate()
    assert whole(ws) == ['a']
    assert json.loads((ws/'stages/02_two.json').read_text())['status'] == 'running'
    first = (ws/'stages/01_one.json').read_bytes()
    (ws/'started').unlink(); (ws/'go').touch()
    code, out, err = llmnotes('run', cwd=root)
    assert code == 0 and ran(out) == ['02_two', '03_three'] and 'was interrupted' in out
    assert first == (ws/'stages/01_one.json').read_bytes()                # not touched
    assert text_of(ws, 'c') == WHOLE and whole(ws) == ['a', 'b', 'c']
    assert not list(ws.glob('*/.*'))                                      # no leftovers
    assert kernels and not any(Path(f'/proc/{pid}').exists() for pid, _ in kernels)


def test_sigkill_at_random_moments_gives_the_same_bytes(tmp_path):
    root = make_project(tmp_path/'toy', **{'01_one': adds('01_one', 'a', size=4_000_000)})
    ws, draw = root/'runs'/'default', random.Random(0)
    for _ in range(4):
        p = command('run', cwd=root)
        with contextlib.suppress(subprocess.TimeoutExpired): p.wait(draw.uniform(1, 8))
        p.kill(); p.communicate()
        if (ws/'artifacts').exists(): whole(ws)
    code, out, err = llmnotes('run', cwd=root)
    assert code == 0 and text_of(ws, 'c') == WHOLE and whole(ws) == ['a', 'b', 'c']


def test_two_runs_in_one_workspace(slow):
    root, ws = slow
    p = command('run', cwd=root)
    wait_for(ws/'started')
    code, out, err = llmnotes('run', cwd=root)
    assert code == 2 and f'another run (process {p.pid}) is at work' in err and len(err.splitlines()) == 1
    (ws/'go').touch()
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0 and text_of(ws, 'c') == WHOLE                # the first was not harmed


@pytest.mark.parametrize('how, code', [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_interrupt_ends_with_a_sentence_and_takes_the_kernel_along(slow, how, code):
    root, ws = slow
    p = command('run', cwd=root)
    wait_for(ws/'started')
    kernels = json.loads((ws/'.lock').read_text())['kernels']
    p.send_signal(how)
    out, err = p.communicate(timeout=60)
    assert p.returncode == code and 'Traceback' not in err
    assert err.strip().splitlines()[-1].startswith('stopped')
    time.sleep(.5)
    assert kernels and not any(Path(f'/proc/{pid}').exists() for pid, _ in kernels)


def test_a_failing_notebook_says_where_in_five_lines(tmp_path):
    bad = ('rows = [1, 2, 3]', 'print(rows)\nrows[3]\n')
    root = make_project(tmp_path/'toy', **{'02_two': bad})
    code, out, err = llmnotes('run', cwd=root)
    lines = err.strip().splitlines()[-5:]
    assert code == 1 and 'Traceback' not in err
    assert lines[0] == '02_two failed in cell 5 of 5, line 2:' and lines[1].strip() == 'rows[3]'
    assert lines[2] == 'IndexError: list index out of range'
    assert Path(lines[4].split(':  ')[1]).is_file()
    record = json.loads((root/'runs/default/stages/02_two.json').read_text())
    assert record['status'] == 'failed'
    (root/'nbs/02_two.ipynb').write_text(notebook('02_two', *adds('02_two', 'b', 'a')))
    code, out, err = llmnotes('run', cwd=root)
    assert code == 0 and ran(out) == ['02_two', '03_three']


def test_a_flipped_byte_is_noticed_and_mended(tmp_path):
    root = make_project(tmp_path/'toy')
    ws = root/'runs'/'default'
    assert llmnotes('run', '--to', '01', cwd=root)[0] == 0
    victim = ws/'artifacts'/'a'/'text'
    data = bytearray(victim.read_bytes()); data[0] ^= 1; victim.write_bytes(data)
    code, out, err = llmnotes('run', '--from', '02', cwd=root)            # straight to the reader
    assert code == 1 and "artifact 'a' is damaged: text differ" in err
    code, out, err = llmnotes('run', cwd=root)                            # from the start: made again
    assert code == 0 and 'artifact a is damaged' in out and text_of(ws, 'c') == WHOLE


def test_a_missing_input_names_its_maker(tmp_path):
    root = make_project(tmp_path/'toy')
    code, out, err = llmnotes('run', '--from', '02', cwd=root)
    assert code == 1 and "no artifact 'a'; maker makes it" in err


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], capture_output=True)
    try: yield done.returncode == 0
    finally:
        if done.returncode == 0: subprocess.run(['umount', '-l', folder], check=True)


def test_disk_full_then_room_again(tmp_path):
    root = make_project(tmp_path/'toy', **{'02_two': adds('02_two', 'b', 'a', size=3_000_000)})
    ws = root/'runs'/'small'
    with mounted(ws, 'size=1m') as real:
        def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        kw = {} if real else {'preexec_fn': limit}
        code, out, err = llmnotes('run', '--workspace', ws, cwd=root, **kw)
        said = os.strerror(errno.ENOSPC if real else errno.EFBIG)
        assert code == 1 and said in err and 'Traceback' not in err
        assert len(err.strip().splitlines()) <= 6, err
        assert whole(ws) == ['a']
        if real: subprocess.run(['mount', '-o', 'remount,size=50m', ws], check=True)
        code, out, err = llmnotes('run', '--workspace', ws, cwd=root)
        assert code == 0 and ran(out) == ['02_two', '03_three'] and text_of(ws, 'c') == WHOLE


def test_read_only_workspace(tmp_path):
    root = make_project(tmp_path/'toy')
    ws = root/'runs'/'fixed'
    with mounted(ws, 'size=1m,ro') as real:
        if not real:
            if os.geteuid() == 0: pytest.skip('cannot mount, and permissions do not bind root')
            ws.chmod(0o555)
        code, out, err = llmnotes('run', '--workspace', ws, cwd=root)
        said = os.strerror(errno.EROFS if real else errno.EACCES)
        assert code == 1 and said in err and str(ws) in err and len(err.splitlines()) == 1, err


def test_pretraining_killed_and_resumed_is_bit_identical(tmp_path):
    if not (ROOT/'nbs/36_pretraining.ipynb').exists(): pytest.skip('there is no 36_pretraining yet')
    only = ('run', '--from', '36', '--to', '36', '-p', 'steps=10')
    calm, rough = tmp_path/'calm', tmp_path/'rough'
    assert llmnotes(*only, '--workspace', calm, cwd=ROOT, timeout=1200)[0] == 0
    p = command(*only, '--workspace', rough, cwd=ROOT)
    end = time.monotonic() + 900
    while not [f for f in rough.glob('checkpoints/36/*/**/*') if f.is_file()]:
        assert p.poll() is None and time.monotonic() < end, 'no checkpoint was written'
        time.sleep(.02)
    p.kill(); p.communicate()
    assert whole(rough) == []                                             # no half model
    code, out, err = llmnotes(*only, '--workspace', rough, cwd=ROOT, timeout=1200)
    assert code == 0, err
    weights = [(ws/'artifacts/base-model/model.safetensors').read_bytes() for ws in (calm, rough)]
    assert weights[0] == weights[1]


# The whole pipeline, once. LLMNOTES_WORKSPACE names a finished run to look at instead.

@pytest.fixture(scope='session')
def real(tmp_path_factory):
    given = os.environ.get('LLMNOTES_WORKSPACE')
    if given: return Path(given).resolve()
    ws = tmp_path_factory.mktemp('run')/'whole'
    code, out, err = llmnotes('run', '--scale', 'cpu', '--workspace', ws, cwd=ROOT, timeout=4500)
    assert code == 0, f'{out}\n{err}'
    assert out.strip().splitlines()[-1] == str(ws/'index.html')
    return ws


def test_every_notebook_ran_and_left_its_record(real):
    stages, ws = read_stages(ROOT), Workspace(real)
    records = {r['notebook']: r for r in read_records(ws.results)}
    for s in stages:
        run = stage_record(s, ws)
        assert run['status'] == 'done' and run['wall_s'] > 0 and run['peak_gib'] > 0, s.name
        assert records[s.name]['metrics'] or records[s.name]['comparisons'], s.name
        assert set(s.gives) <= set(run['artifacts']), s.name
    assert whole(real) == sorted(a for s in stages for a in s.gives)


def test_no_notebook_opens_what_a_later_one_makes():
    stages = read_stages(ROOT)
    made = {a: s.number for s in stages for a in s.gives}
    for s in stages:
        for a in s.takes: assert made.get(a, '') < s.number, f'{s.name} opens {a}'


def test_the_model_beats_xz_on_text_it_never_saw(real):
    _, found = held_out(read_records(Workspace(real).results))
    scores = dict(found)
    xz = [v for who, v in found if 'xz' in who]
    assert xz and scores['this model'] < min(xz)


def test_every_stage_does_what_it_should(real):
    ws = Workspace(real)
    report = json.loads((ws.artifact('evaluation')/'report.json').read_text())
    rows = {r['model']: r for r in report['models']}
    names = ['base-model', 'instruction-model', 'aligned-model', 'int8-model', 'nf4-model']
    assert sorted(rows) == sorted(names)
    for r in rows.values():
        assert report['chance'] < r['accuracy_easy'] < 1 and r['tokens_per_s'] > 0
    pair = {(p['a'], p['b']): p for p in report['pairs']}
    tuned = pair['instruction-model', 'base-model']
    gain, error = tuned['answer_bits_per_byte'], tuned['answer_bits_per_byte_se']
    assert gain < -1.96 * error, 'tuning must beat the base on held-out answers'
    assert tuned['accuracy'] > -1.96 * tuned['accuracy_se'], 'and must not lose questions'
    for small, whole in (('int8-model', 'aligned-model'), ('nf4-model', 'instruction-model')):
        p = pair[small, whole]
        assert p['bits_per_byte'] + 1.96 * p['bits_per_byte_se'] < .02, f'{small} costs too much'
        assert rows[small]['bytes'] < .7 * rows[whole]['bytes']
    counts = json.loads((ws.artifact('clean-corpus')/'counts.json').read_text())
    why = sum(row['documents'] for row in counts['dropped'].values())     # a document may break two
    assert counts['kept'] < counts['read'] <= counts['kept'] + why


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.found += [a[k] for k in ('href', 'src') if a.get(k)]
        if 'id' in a: self.ids.add(a['id'])


def test_every_link_and_image_of_the_page_resolves(real):
    pages = [real/'index.html', *sorted((real/'pages').glob('*.html'))]
    assert len(pages) == 1 + len(read_stages(ROOT))
    for page in pages:
        links = Links()
        links.feed(page.read_text())
        for link in links.found:
            url = urlsplit(link)
            if url.scheme in ('http', 'https', 'data', 'mailto'): continue
            if url.path: assert (page.parent/unquote(url.path)).is_file(), f'{page.name}: {link}'
            elif url.fragment: assert unquote(url.fragment) in links.ids, f'{page.name}: {link}'
        text = page.read_text()
        assert '<script' not in text and 'cdn' not in text.lower().split('<body')[0]


def test_the_page_shows_result_picture_and_costs(real):
    text = (real/'index.html').read_text()
    stages = read_stages(ROOT)
    assert 'bits per byte on text' in text and 'What each stage did' in text
    assert text.count('<svg') == 4                         # the models and the pipeline, each for two widths
    for s in stages: assert f'pages/{s.name}.html' in text
    for r in read_records(Workspace(real).results):
        for c in r['comparisons']: assert c['technique'].split('<')[0][:20] in text or '&' in c['technique']
