"""A project of tiny notebooks, for tests of the pipeline that should take seconds."""
import json
import os
import subprocess
import sys
from pathlib import Path

FIRST = 'scale = "cpu"  # cpu, colab or gpu\nseed = 42\nworkspace = "runs/default"'
OPEN = 'import time\nfrom pathlib import Path\n' \
       'from llmnotes.core import Record, Workspace\nws = Workspace(workspace)'
SETTINGS = '[DEFAULT]\nlib_name = toys\nuser = someone\nrepo = something\nbranch = trunk\nnbs_path = nbs\n'


def notebook(name, *cells, parameters=FIRST):
    """JSON of a notebook: heading, cost line, parameters, then the given code cells."""
    def cell(i, kind, source, **metadata):
        c = dict(cell_type=kind, id=f'c{i}', metadata=metadata, source=source.splitlines(True))
        return c | (dict(execution_count=None, outputs=[]) if kind == 'code' else {})
    link = f'https://colab.research.google.com/github/old/old/blob/old/nbs/{name}.ipynb'
    head = [cell(0, 'markdown', f'# The {name[3:]}\n\n> A claim.'),
            cell(1, 'markdown', f'[Open in Colab]({link}) · `cpu` 99 s, 9.0 GiB · used next in 99_end'),
            cell(2, 'code', parameters, tags=['parameters'])]
    code = [cell(i + 3, 'code', s) for i, s in enumerate(cells)]
    kernel = dict(display_name='python3', language='python', name='python3')
    return json.dumps(dict(cells=head + code, metadata=dict(kernelspec=kernel), nbformat=4,
                           nbformat_minor=5), indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def adds(name, gives, takes='', *, before='', size=0):
    """Cells that copy the text of one artifact and add a line to it; `size` bytes of ballast."""
    old = f'(ws.artifact("{takes}", made_by="maker")/"text").read_text()' if takes else '""'
    return (OPEN, f"rec = Record('{name}', scale=scale, seed=seed, workspace=workspace)\n"
                  f"rec.metric('lines', {int(name[:2])}, 'lines')",
            f'old = {old}', f'''{before or "pass"}
with ws.writing("{gives}", made_by="{name}", seed=seed) as out:
    (out/"text").write_text(old + "{name} {{}}\\n".format(seed))
    (out/"ballast").write_bytes(bytes({size}))''', 'old')


def make_project(root, **changed):
    """Three notebooks in a chain: 01_one -> a -> 02_two -> b -> 03_three -> c."""
    chain = {'01_one': adds('01_one', 'a'), '02_two': adds('02_two', 'b', 'a'),
             '03_three': adds('03_three', 'c', 'b')} | changed
    (root/'nbs').mkdir(parents=True, exist_ok=True)
    (root/'settings.ini').write_text(SETTINGS)
    for name, cells in chain.items():
        if cells: (root/'nbs'/f'{name}.ipynb').write_text(notebook(name, *cells))
    return root


def command(*args, cwd, **kw):
    """Start `llmnotes ...` in a folder; returns the running process."""
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | kw
    return subprocess.Popen([sys.executable, '-m', 'llmnotes.cli', *map(str, args)],
                            cwd=cwd, env=os.environ | {'PYTHONUNBUFFERED': '1'}, **kw)


def llmnotes(*args, cwd, timeout=300, **kw):
    """Run `llmnotes ...` to its end: (exit code, stdout, stderr)."""
    p = command(*args, cwd=cwd, **kw)
    out, err = p.communicate(timeout=timeout)
    return p.returncode, out, err


def text_of(workspace, name): return (Path(workspace)/'artifacts'/name/'text').read_text()
