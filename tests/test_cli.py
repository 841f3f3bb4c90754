"""The command line: what it refuses, what it says, and how little it loads."""
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from toys import SETTINGS, adds, llmnotes, make_project, notebook

from llmnotes import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toy(tmp_path, monkeypatch):
    root = make_project(tmp_path/'toy')
    monkeypatch.chdir(root)
    return root


def test_help_loads_nothing_heavy():
    p = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'llmnotes.cli', '--help'],
                       capture_output=True, text=True)
    loaded = {line.split('|')[-1].strip().split('.')[0] for line in p.stderr.splitlines()}
    assert p.returncode == 0 and 'doctor' in p.stdout
    heavy = {'torch', 'numpy', 'matplotlib', 'papermill', 'nbconvert', 'nbformat', 'psutil', 'tqdm'}
    assert not loaded & heavy


@pytest.mark.parametrize('args, words', [
    (['run', '-p', 'sede=7'], "no selected notebook has a parameter 'sede'; there are seed"),
    (['run', '-p', 'seed=seven'], "seed is of type int"),
    (['run', '-p', 'seed=1.5'], "seed is of type int"),
    (['run', '-p', 'seed'], 'should be name=value'),
    (['run', '-p', 'scale=gpu'], 'use --scale'),
    (['run', '-p', 'workspace=x'], 'use --workspace'),
    (['run', '--scale', 'huge'], "invalid choice: 'huge'"),
    (['run', '--from', '99'], "there is no notebook '99'; there are 01, 02, 03"),
    (['run', '--to', '2'], "there is no notebook '2'"),
    (['run', '--from', '03', '--to', '01'], '--from 03 lies after --to 01'),
    (['run', '--workspace', 'settings.ini'], 'settings.ini is a file'),
    (['run', '--workspace', 'settings.ini/x'], 'settings.ini'),
    (['walk'], "invalid choice: 'walk'"),
    ([], 'required'),
    (['new', 'Chapter5'], 'is no name for a notebook'),
    (['new', '5_losses'], 'is no name for a notebook'),
    (['new', '62_GPTQ'], 'is no name for a notebook'),
    (['new', '../62_gptq'], 'is no name for a notebook'),
    (['new', '02_other'], 'the number 02 is taken by 02_two'),
    (['new', '62_two'], "the name 'two' is taken by 02_two"),
])
def test_refused_in_one_sentence_before_anything_runs(toy, capsys, args, words):
    code = cli.main(args)
    err = capsys.readouterr().err.strip()
    assert code in ((1, 2) if 'settings.ini/x' in args else (2,))
    assert words in err and len(err.splitlines()) == 1, err
    assert not (toy/'runs'/'default'/'stages').exists()
    assert len(list((toy/'nbs').iterdir())) == 3


def test_a_parameter_goes_only_to_the_notebooks_that_have_it(toy):
    from llmnotes.core import Workspace
    from llmnotes.pipeline import parse_parameters, read_stages, stage_values
    (toy/'nbs'/'01_one.ipynb').write_text(notebook('01_one', parameters='n = 1.5\nname = "x"\nmany = [1]'))
    stages = read_stages(toy)
    given = parse_parameters(['n=2', 'name=7', 'seed=-1', 'many=[1, 2]'], stages)
    first, second = (stage_values(s, Workspace(toy/'w'), 'cpu', given, toy) for s in stages[:2])
    assert first == {'n': 2.0, 'name': '7', 'many': [1, 2]} and type(first['n']) is float
    assert second == {'scale': 'cpu', 'seed': -1, 'workspace': 'w'}


def test_outside_a_clone(tmp_path):
    for args in (['run'], ['list'], ['new', '62_gptq']):
        code, out, err = llmnotes(*args, cwd=tmp_path)
        assert code == 2 and 'inside a clone of the project' in err and len(err.splitlines()) == 1


def test_a_notebook_that_is_not_python_is_named(toy, capsys):
    (toy/'nbs'/'02_two.ipynb').write_text(notebook('02_two', 'def f(:'))
    assert cli.main(['run']) == 2
    assert '02_two.ipynb is not valid Python' in capsys.readouterr().err


def test_without_the_extras_one_sentence_says_what_to_install(toy, capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, 'find_spec',
                        lambda name: None if name == 'papermill' else find(name))
    assert cli.main(['run']) == 2
    assert "papermill: pip install 'llmnotes[dev]'" in capsys.readouterr().err


def test_list_says_what_each_notebook_takes_gives_and_costs(toy, capsys):
    (toy/'results').mkdir()
    record = dict(notebook='02_two', scale='cpu', wall_s=12.4, peak_gib=.55, metrics=[], comparisons=[])
    (toy/'results'/'02-cpu.json').write_text(json.dumps(record))
    assert cli.main(['list']) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [r.split() for r in rows[1:]] == [
        ['01', 'The', 'one', '-', 'a', '-'], ['02', 'The', 'two', 'a', 'b', '12', 's,', '0.6', 'GiB'],
        ['03', 'The', 'three', 'b', 'c', '-']]


def test_doctor_needs_no_network_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://10.255.255.1')           # nobody answers there
    monkeypatch.setenv('NO_PROXY', '*')
    code, out, err = llmnotes('doctor', cwd=tmp_path, timeout=120)
    assert code == 0 and 'no answer from http://10.255.255.1' in out
    assert re.search(r'^torch +\d', out, re.M) and re.search(r'computes in \w+', out)
    assert 'models and data of the hub' in out.split('skipped here:')[1]


def test_the_network_probe_is_bounded(monkeypatch):
    import urllib.request
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *a, **k: time.sleep(30))
    start = time.perf_counter()
    assert not cli.reachable('http://somewhere', seconds=.3)
    assert time.perf_counter() - start < 5


def test_new_notebook_is_valid_runs_and_survives_nbdev(tmp_path, monkeypatch, capsys):
    root = tmp_path/'clone'
    make_project(root)
    shutil.copy(ROOT/'settings.ini', root)
    (root/'README.md').touch()
    monkeypatch.chdir(root)
    assert cli.main(['new', '62_gptq']) == 0
    path = root/'nbs'/'62_gptq.ipynb'
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    headings = re.findall(r'^## (.+)$', '\n'.join(c.source for c in nb.cells), re.M)
    for part in ('The idea', 'By hand', 'Against a reference', 'An experiment',
                 'What it costs and where it fails', 'At full size', 'Exercises', 'Further reading'):
        assert part in headings
    made = path.read_text()
    bin = Path(sys.executable).parent
    subprocess.run([bin/'nbdev_clean', '--fname', 'nbs/62_gptq.ipynb'], cwd=root, check=True)
    cleaned = nbformat.read(path, 4)
    assert [c.metadata.get('tags') for c in cleaned.cells if c.metadata.get('tags')] == [['parameters']]
    assert path.read_text() == made
    subprocess.run([bin/'nbdev_export'], cwd=root, check=True)
    compile((root/'llmnotes'/'compress'/'gptq.py').read_text(), 'gptq.py', 'exec')
    assert cli.main(['run', '--from', '62']) == 0
    assert json.loads((root/'runs/default/results/62-cpu.json').read_text())['metrics']


def test_save_outputs(tmp_path, monkeypatch, capsys):
    shows = ('import sys\nprint("seen", object(), file=sys.stdout)\n'
             'print("IProgress not found", file=sys.stderr)', '40 + 2')
    root = make_project(tmp_path/'toy', **{'02_two': None, '03_three': None},
                        **{'01_one': adds('01_one', 'a') + shows,
                           '04_large': ('print("x" * 500_000)',)})
    monkeypatch.chdir(root)
    before = json.loads((root/'nbs'/'01_one.ipynb').read_text())
    assert cli.main(['run', '--save-outputs', '-p', 'seed=3']) == 1          # one is too large
    assert '04_large: 50' in capsys.readouterr().out
    assert 'x' * 100 not in (root/'nbs'/'04_large.ipynb').read_text()
    saved = (root/'nbs'/'01_one.ipynb').read_text()
    after = json.loads(saved)
    nbformat.validate(nbformat.reads(saved, 4))
    rest = [i for i in range(len(before['cells'])) if i != 1]
    assert [after['cells'][i]['source'] for i in rest] == [before['cells'][i]['source'] for i in rest]
    assert [c['metadata'] for c in after['cells']] == [c['metadata'] for c in before['cells']]
    outputs = json.dumps([c.get('outputs') for c in after['cells']])
    assert 'papermill' not in saved and 'injected' not in saved and 'IProgress' not in outputs
    assert re.search(r'seen <object object>\\n', saved)                     # no address
    assert after['cells'][-1]['outputs'][0]['data'] == {'text/plain': ['42']}
    record = json.loads((root/'results'/'01-cpu.json').read_text())
    assert record['wall_s'] > 0 and record['peak_gib'] > .01 and record['metrics'][0]['value'] == 1
    line = ''.join(after['cells'][1]['source'])
    assert line.startswith('[Open in Colab](https://colab.research.google.com/github/someone/something/'
                           'blob/trunk/nbs/01_one.ipynb) · `cpu` ')
    assert line.endswith(' GiB · used next in 99_end') and '99 s' not in line
    capsys.readouterr()
    assert cli.main(['run', '--to', '01', '-p', 'seed=3']) == 0             # still done
    assert 'nothing to do' in capsys.readouterr().out
    bin = Path(sys.executable).parent
    (root/'settings.ini').write_text(SETTINGS + 'allowed_cell_metadata_keys = tags\n')
    subprocess.run([bin/'nbdev_clean', '--fname', 'nbs/01_one.ipynb'], cwd=root, check=True)
    assert (root/'nbs'/'01_one.ipynb').read_text() == saved
    (root/'nbs'/'01_one.ipynb').write_text(saved.replace('40 + 2', '40 + 3'))
    stages, ws = cli.read_stages(root), cli.Workspace('runs/default')
    assert 'its cells were changed since it ran' in cli.save_outputs(stages[:1], ws, root, 'cpu')[0]
