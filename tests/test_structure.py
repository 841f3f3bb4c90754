"""The rules that the notebooks, the library and the files around them keep."""
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NUMBERED = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
MODULES = sorted(p for p in (ROOT/'llmnotes').rglob('*.py') if p.name[0] != '_')
SCRIPTS = sorted(p for f in ('tests', 'benchmarks', 'tools') for p in (ROOT/f).glob('*.py'))
NO_TORCH = ('core', 'corpus', 'cli', 'pipeline', 'data', 'tokenizers')
OUTPUT_LIMIT = 400_000 # bytes of stored output a notebook

ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf-8')
CFG = ini['DEFAULT']
EXTRAS = {k.removesuffix('requirements').rstrip('_'): [Requirement(r) for r in v.split()]
          for k, v in CFG.items() if re.fullmatch(r'(\w+_)?requirements', k)}


def names(paths:list[Path]) -> list[str]: return [str(p.relative_to(ROOT)) for p in paths]


def cells(path:Path, kind:str='') -> list[dict]:
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [c | {'source': ''.join(c['source'])} for c in found if kind in ('', c['cell_type'])]


def python(*args:str, cwd:Path=ROOT, **env:str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env=os.environ | env)


def module_name(path:Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def tool(name:str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_something_to_test() -> None:
    "The checks below run over lists; an empty list would pass them all"
    assert len(NUMBERED) >= 1 and len(MODULES) >= 1 and ROOT/'nbs/index.ipynb' in NOTEBOOKS


# Imports

def code_of(path:Path) -> ast.Module:
    "A module, or a notebook's code cells"
    if path.suffix == '.py': return ast.parse(path.read_text(encoding='utf-8'))
    body = [node for c in cells(path, 'code') for node in code_of_cell(c['source'])]
    return ast.Module(body=body, type_ignores=[])


def code_of_cell(source:str) -> list[ast.stmt]:
    "A cell's statements, without magics"
    try: return ast.parse(source).body
    except SyntaxError: return ast.parse(re.sub(r'^[%!].*', '', source, flags=re.M)).body


def imported(tree:ast.AST, package:str='') -> set[str]:
    "Every module that is imported anywhere, `from a.b import c` as `a.b` and `a.b.c`"
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[:len(package.split('.')) - node.level + 1]
            base = '.'.join([*(above if node.level else ()), *filter(None, [node.module])])
            found |= {base} | {f'{base}.{a.name}' for a in node.names}
    return found


def imports_of(path:Path) -> set[str]:
    package = module_name(path).rpartition('.')[0] if path in MODULES else ''
    return imported(code_of(path), package)


def made_by(path:Path) -> int:
    "Number of the notebook that a module is exported from, as nbdev notes in its head"
    return int(re.search(r'File to edit: \S*?nbs/(\d\d)_', path.read_text(encoding='utf-8'))[1])


@pytest.mark.parametrize('path', [*MODULES, *NUMBERED], ids=names([*MODULES, *NUMBERED]))
def test_imports_point_to_lower_numbers(path:Path) -> None:
    number = {module_name(p): made_by(p) for p in MODULES}
    own = made_by(path) if path.suffix == '.py' else int(path.name[:2])
    above = {m: number[m] for m in imports_of(path) if number.get(m, -1) > own}
    assert not above, f'{path.name} is {own} and imports {above}'


def declared(*extras:str) -> set[str]:
    "Import names of what settings.ini asks for directly"
    wanted = {canonicalize_name(r.name) for e in extras for r in EXTRAS[e]}
    provided = importlib.metadata.packages_distributions()
    return {name for name, dists in provided.items()
            if wanted & {canonicalize_name(d) for d in dists}}


def third_party(path:Path) -> set[str]:
    top = {name.split('.')[0] for name in imports_of(path)}
    return top - set(sys.stdlib_module_names) - {'llmnotes'} - {p.stem for p in SCRIPTS}


def test_every_import_is_declared() -> None:
    "Nothing is used that came only because something else wanted it"
    known = declared(*EXTRAS) | {'flash_attn'}
    code = [*MODULES, *NOTEBOOKS, *SCRIPTS]
    missing = {p.name: extra for p in code if (extra := third_party(p) - known)}
    assert not missing, f'not in settings.ini: {missing}'


BLOCK = '''
import importlib, importlib.abc, sys
allowed = set({allowed!r})
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split('.')[0]
        if top in {known!r} and top not in allowed:
            raise ModuleNotFoundError(f'{{name}} is not a runtime requirement', name=name)
sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
print('fine')
'''


def runtime_closure() -> set[str]:
    "Import names of the runtime requirements and of all that these need in turn"
    dists = {canonicalize_name(d) for d in tool('pin').installed(iter(EXTRAS['']))}
    provided = importlib.metadata.packages_distributions()
    return {name for name, d in provided.items() if dists & {canonicalize_name(x) for x in d}}


def test_library_imports_without_extras() -> None:
    "Every module imports where only `pip install llmnotes` was run"
    known = sorted(importlib.metadata.packages_distributions())
    done = python('-c', BLOCK.format(allowed=sorted(runtime_closure() | {'llmnotes'}),
                                     known=known, modules=[module_name(p) for p in MODULES]))
    assert done.stdout.strip() == 'fine', done.stderr


def test_data_and_tokenizers_import_no_torch() -> None:
    light = [module_name(p) for p in MODULES if module_name(p).split('.')[1] in NO_TORCH]
    code = f'import sys, {", ".join(light)}; print("torch" in sys.modules)'
    done = python('-c', code)
    assert done.stdout.strip() == 'False', f'{light} import torch {done.stderr}'


# Code

@pytest.mark.parametrize('path', [*MODULES, *NOTEBOOKS], ids=names([*MODULES, *NOTEBOOKS]))
def test_no_star_import_and_no_broad_except(path:Path) -> None:
    for node in ast.walk(code_of(path)):
        if isinstance(node, ast.ImportFrom): assert node.names[0].name != '*', node.module
        if not isinstance(node, ast.ExceptHandler): continue
        caught = ast.unparse(node.type) if node.type else ''
        broad = caught in ('', 'Exception', 'BaseException')
        again = any(isinstance(n, ast.Raise) for n in ast.walk(node))
        assert again or not broad, f'line {node.lineno}: except {caught} that does not raise'


def functions(tree:ast.Module) -> list[tuple[ast.FunctionDef, bool]]:
    "Functions and methods of public classes in a module, and whether each is a method"
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != '_']
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return ([(n, False) for n in tree.body if isinstance(n, kinds)]
            + [(n, True) for c in classes for n in c.body if isinstance(n, kinds)])


@pytest.mark.parametrize('path', MODULES, ids=names(MODULES))
def test_functions_say_what_they_take_and_give(path:Path) -> None:
    "Types, and a docstring or a comment in the signature, on whatever is public"
    tree, lines = code_of(path), path.read_text(encoding='utf-8').splitlines()
    bad = []
    for f, method in functions(tree):
        if f.name[0] == '_' and f.name != '__init__': continue
        args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs,
                *filter(None, (f.args.vararg, f.args.kwarg))]
        bad += [f'{f.name}: {a.arg} has no type' for a in args[method and _bound(f):]
                if a.annotation is None]
        if f.returns is None and f.name != '__init__': bad.append(f'{f.name} has no return type')
        signature = lines[f.lineno - 1:f.body[0].lineno]
        said = ast.get_docstring(f) or any(' # ' in line for line in signature) or _short(f)
        if f.name != '__init__' and not said: bad.append(f'{f.name} has no docstring')
    bad += [f'{c.name} has no docstring' for c in tree.body if isinstance(c, ast.ClassDef)
            and c.name[0] != '_' and not ast.get_docstring(c)]
    assert not bad, '\n'.join(bad)


def _short(f:ast.FunctionDef) -> bool: # a property that only returns something says it in its name
    return len(f.body) == 1 and 'property' in {ast.unparse(d) for d in f.decorator_list}


def _bound(f:ast.FunctionDef) -> bool: # takes self or cls
    return 'staticmethod' not in {ast.unparse(d) for d in f.decorator_list}


def test_ruff_finds_nothing() -> None:
    done = python('-m', 'ruff', 'check', '--no-cache', '.')
    assert done.returncode == 0, done.stdout


# Notebooks

@pytest.mark.parametrize('path', NUMBERED, ids=names(NUMBERED))
def test_notebook_head_and_parameters(path:Path) -> None:
    found = cells(path)
    assert re.match(r'# .+\n\n> .+', found[0]['source']), 'first cell: "# Title", "> claim"'
    link = tool('sync').colab_link(path.stem, CFG)
    assert found[1]['source'].startswith(link), f'second cell begins with {link}'
    tagged = [c['source'] for c in found if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, f'{len(tagged)} cells are tagged parameters'
    values = {t.id: ast.literal_eval(n.value) for n in ast.parse(tagged[0]).body for t in n.targets}
    assert values.get('scale') == 'cpu' and values.get('workspace') == 'runs/default'
    assert isinstance(values.get('seed'), int)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=names(NOTEBOOKS))
def test_outputs_are_small_and_without_errors(path:Path) -> None:
    found = [o for c in cells(path, 'code') for o in c['outputs']]
    errors = [o['ename'] for o in found if o['output_type'] == 'error']
    assert not errors, errors
    size = len(json.dumps(found))
    assert size <= OUTPUT_LIMIT, f'{size:,} bytes of outputs, more than {OUTPUT_LIMIT:,}'


@pytest.mark.parametrize('path', NUMBERED, ids=names(NUMBERED))
def test_import_cells_are_pure(path:Path) -> None:
    "The site executes cells that import, at any depth, without the cells between them"
    kinds = (ast.Import, ast.ImportFrom)
    for cell in cells(path, 'code'):
        if re.search(r'^#\| *(export|eval: *false)', cell['source'], re.M): continue
        body = code_of_cell(cell['source'])
        imports = any(isinstance(n, kinds) for top in body for n in ast.walk(top))
        assert not imports or all(isinstance(n, kinds) for n in body), \
            f'an import shares a cell with other code:\n{cell["source"]}'


def test_index_shows_what_it_says(monkeypatch:pytest.MonkeyPatch) -> None:
    "The example of the first page runs, and prints what is stored"
    import nbformat
    from nbclient import NotebookClient
    path = ROOT/'nbs/index.ipynb'
    nb = nbformat.read(path, as_version=4)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    NotebookClient(nb, timeout=300, kernel_name='python3',
                   resources={'metadata': {'path': str(ROOT)}}).execute()
    show = tool('sync').output_text
    ran = [show(c) for c in nb.cells if c.cell_type == 'code']
    assert ran == [show(c) for c in cells(path, 'code')], 'stored outputs differ; execute it again'


def test_export_leaves_the_library_as_it_is(clone:Path) -> None:
    "What nbdev exports is what is committed, byte for byte"
    before = contents(clone)
    for p in (clone/'llmnotes').rglob('*.py'): p.unlink()      # also finds what nothing exports
    # nbdev fills these from the notebooks, and wants the folder to be a package
    (clone/'llmnotes/__init__.py').write_bytes(before['llmnotes/__init__.py'])
    nbdev('nbdev_export', clone)
    assert differences(before, contents(clone)) == []


def test_clean_leaves_the_notebooks_as_they_are(clone:Path) -> None:
    before = contents(clone)
    nbdev('nbdev_clean', clone)
    assert differences(before, contents(clone)) == []


def test_clean_keeps_the_parameters_tag_and_drops_the_rest(clone:Path) -> None:
    path = clone/'nbs'/NUMBERED[0].name
    nb = json.loads(path.read_text())
    tags = [c['metadata'].get('tags') for c in nb['cells']]
    nb['metadata'] |= dict(accelerator='GPU', widgets_state={'x': 1})
    for c in nb['cells']:
        c['metadata']['papermill'] = {'duration': 1}
        if c['cell_type'] == 'code': c['execution_count'] = 7
    path.write_text(json.dumps(nb))
    nbdev('nbdev_clean', clone)
    nb = json.loads(path.read_text())
    assert [c['metadata'].get('tags') for c in nb['cells']] == tags and ['parameters'] in tags
    assert nb['metadata']['accelerator'] == 'GPU' and 'widgets_state' not in nb['metadata']
    assert not any('papermill' in c['metadata'] or c.get('execution_count') for c in nb['cells'])


def nbdev(command:str, cwd:Path) -> None:
    code = (f'import sys; from importlib.metadata import entry_points as e; '
            f'sys.argv = ["{command}"]; '
            f'e(group="console_scripts", name="{command}")["{command}"].load()()')
    done = python('-c', code, cwd=cwd, PYTHONPATH='')
    assert done.returncode == 0, done.stderr


def contents(folder:Path) -> dict[str, bytes]:
    skip = ('.git', '__pycache__')
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*')
            if p.is_file() and not set(p.relative_to(folder).parts) & set(skip)}


def differences(a:dict[str, bytes], b:dict[str, bytes]) -> list[str]:
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


# The site, the pages and what is derived

def test_derived_files_are_current() -> None:
    "README.md, llms.txt, CITATION.cff, the made pages and every Colab link"
    assert names(tool('sync').stale()) == [], 'run `make sync`'


def test_a_new_owner_reaches_every_derived_file(clone:Path) -> None:
    "Owner and repository stand in settings.ini alone"
    ini = clone/'settings.ini'
    ini.write_text(ini.read_text().replace('user = llmnotes', 'user = someone'))
    old = [f"github.com/{CFG['user']}/", f"github/{CFG['user']}/", f"{CFG['user']}.github.io"]
    made = tool('sync').derived(clone)
    assert all('github.com/someone/' in made[clone/n] for n in ('README.md', 'llms.txt'))
    left = [p.name for p, text in made.items() if any(o in text for o in old)]
    written = {p: data for p, data in contents(clone).items() if clone/p not in made}
    outside = [p for p, data in written.items() if any(o.encode() in data for o in old)
               and p not in ('settings.ini', 'llmnotes/_modidx.py')]
    assert left + outside == []


def test_description_is_the_same_everywhere() -> None:
    "README, site, package and command say the same"
    from llmnotes.cli import make_parser
    said = ' '.join(make_parser().format_help().split())
    assert CFG['description'] in said, f'llmnotes --help says: {said}'
    claim = f"> {CFG['description']}\n"
    assert claim in (ROOT/'README.md').read_text(encoding='utf-8')
    assert cells(ROOT/'nbs/index.ipynb')[0]['source'].endswith(claim.strip())


def sidebar() -> list[str]:
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    def walk(x): # every file below
        if isinstance(x, str): return [x]
        if isinstance(x, list): return [f for i in x for f in walk(i)]
        return [x['href']] if 'href' in x else walk(x['contents'])
    return walk(site['website']['sidebar']['contents'])


def test_sidebar_has_every_page_once_in_order() -> None:
    shown = sidebar()
    assert [f for f in shown if f[:2].isdigit()] == [p.name for p in NUMBERED]
    pages = {p.name for p in (ROOT/'nbs').iterdir() if p.suffix in ('.ipynb', '.qmd')}
    assert sorted(shown) == sorted(pages)


def test_quarto_settings() -> None:
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and os.readlink(link) == '../_quarto.yml'
    site = yaml.safe_load(link.read_text(encoding='utf-8'))
    html = site['format']['html']
    assert set(html['theme']) == {'light', 'dark'} and html['code-copy'] is True
    assert html['html-math-method'] == 'mathml', 'mathematics reads offline'
    assert site['website']['search'] and site['website']['page-navigation']
    assert 'source' in site['website']['repo-actions'] and site['metadata-files'] == ['nbdev.yml']
    assert site['execute'] == {'enabled': False}, 'the site shows what is stored'


def test_nbdev_fills_in_the_site(clone:Path) -> None:
    "The step before Quarto: settings reach the site, chapters are ours, pages are processed"
    fake = clone/'bin'/'quarto'
    fake.parent.mkdir(); fake.write_text('#!/bin/sh\n'); fake.chmod(0o755)
    code = 'from nbdev.quarto import nbdev_proc_nbs; nbdev_proc_nbs.__wrapped__(n_workers=0)'
    done = python('-c', code, cwd=clone, PATH=f'{fake.parent}:{os.environ["PATH"]}')
    assert done.returncode == 0, done.stderr
    about = yaml.safe_load((clone/'_proc/nbdev.yml').read_text())
    assert about['website']['repo-url'] == CFG['git_url']
    assert about['project']['output-dir'] == CFG['doc_path']
    assert (clone/'nbs/_quarto.yml').is_symlink() and not (clone/'nbs/sidebar.yml').exists()
    assert (clone/'_proc/_quarto.yml').read_bytes() == (ROOT/'_quarto.yml').read_bytes()
    assert not [f for f in sidebar() if not (clone/'_proc'/f).exists()]


LINK = re.compile(r'!?\[[^\]]*\]\(<?([^)\s>]+)')


def prose(path:Path) -> str:
    text = '\n'.join(c['source'] for c in cells(path, 'markdown')) if path.suffix == '.ipynb' \
        else path.read_text(encoding='utf-8')
    return re.sub(r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', '', text, flags=re.S)


def broken_links(path:Path) -> list[str]:
    local = (re.sub('[#?].*', '', t) for t in LINK.findall(prose(path)) if not re.match(r'\w+:', t))
    return [t for t in local if t and not (path.parent/t).exists()]


def test_local_links_and_images_resolve(files:list[Path]) -> None:
    pages = [ROOT/f for f in files if f.suffix in ('.md', '.qmd', '.ipynb', '.txt')]
    broken = {str(p.relative_to(ROOT)): bad for p in pages if (bad := broken_links(p))}
    assert not broken


# The files around

def text_of(files:list[Path]) -> dict[str, str]:
    found = {}
    for f in files:
        if (ROOT/f).is_symlink(): continue
        data = (ROOT/f).read_bytes()
        if b'\0' not in data: found[str(f)] = data.decode('utf-8')
    return found


def test_no_path_of_one_machine(files:list[Path]) -> None:
    own = re.compile(r'(?<![\w.~}])/(?:work|root|home|Users|opt|mnt)/\w')
    found = {f: m[0] for f, text in text_of(files).items() if (m := own.search(text))}
    assert not found


def test_no_private_registry(files:list[Path]) -> None:
    "Where packages come from is the reader's own setting: no file names a host for them"
    known = {'github.com', 'colab.research.google.com',
             CFG['doc_host'].removeprefix('https://'), '%(user)s.github.io'}
    where = re.compile(r'settings\.ini|setup\.py|pyproject\.toml|constraints\.txt|Makefile'
                       r'|\.ci/.*|\.github/.*|\.devcontainer/.*|\.pre-commit.*|tools/.*')
    hosts = {f: set(re.findall(r'\w+://([\w.%()-]+)', text.replace('\\', ''))) - known
             for f, text in text_of(files).items() if where.fullmatch(f)}
    assert not {f: h for f, h in hosts.items() if h}


def test_files_are_small_and_ours(files:list[Path]) -> None:
    large = {str(f): n for f in files if (n := (ROOT/f).stat().st_size) > 1_000_000}
    assert not large, large


def test_nothing_is_copied_from_the_development_data(files:list[Path], shared:Path) -> None:
    def digest(p:Path) -> bytes: return hashlib.sha256(p.read_bytes()).digest()
    sizes = {(ROOT/f).stat().st_size: f for f in files if (ROOT/f).stat().st_size > 200}
    ours = {digest(ROOT/f) for f in files if (ROOT/f).is_file()}
    same = [p.name for p in shared.rglob('*') if p.is_file() and 'LICENSE' not in p.name
            and p.stat().st_size in sizes and digest(p) in ours]
    assert not same


def test_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert 'version' in project['dynamic'] and 'version' not in project
    init = (ROOT/'llmnotes/__init__.py').read_text()
    assert f'__version__ = "{CFG["version"]}"' in init


def test_constraints_lie_within_the_bounds() -> None:
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    pinned = dict(line.split('==') for line in lines if not line.startswith('#'))
    wanted = [r for extra, reqs in EXTRAS.items() if extra != 'gpu' for r in reqs]
    outside = [f'{r}: {pinned.get(canonicalize_name(r.name))}' for r in wanted
               if not r.specifier.contains(pinned.get(canonicalize_name(r.name), '0.dev0'))]
    assert not outside
    assert not any('+' in v or '@' in v for v in pinned.values()), 'local builds or addresses'
    torch = next(r for r in EXTRAS[''] if r.name == 'torch')
    assert '<' in str(torch.specifier), 'without an upper bound pip takes gigabytes of CUDA'


def test_runtime_requirements_are_light() -> None:
    heavy = {'trl', 'lm-eval', 'jupyterlab', 'transformers', 'datasets', 'nbdev', 'fastcore'}
    assert not heavy & {canonicalize_name(r.name) for r in EXTRAS['']}
    assert {'', 'data', 'train', 'eval', 'serve', 'gpu', 'dev'} == set(EXTRAS)


def test_extras_reach_the_package(tmp_path:Path) -> None:
    "setup.py reads settings.ini: `dev` holds every other extra but `gpu`"
    code = ('import setuptools; setuptools.setup = lambda **k: print(__import__("json").dumps('
            'dict(extras=k["extras_require"], version=k["version"], python=k["python_requires"])));'
            'import runpy; runpy.run_path("setup.py")')
    about = json.loads(python('-c', code).stdout)
    dev = set(about['extras']['dev'])
    others = {str(r) for e in ('data', 'train', 'eval', 'serve') for r in EXTRAS[e]}
    assert others <= {str(Requirement(r)) for r in dev}
    assert not any(r.startswith('flash') for r in dev)
    assert about['version'] == CFG['version'] and about['python'] == f">={CFG['min_python']}"


def test_workflows_use_what_is_there() -> None:
    makefile = (ROOT/'Makefile').read_text()
    targets = set(re.findall(r'^([a-z-]+):', makefile, flags=re.M))
    assert {'run', 'test', 'lab', 'docs', 'bench', 'clean', 'help', 'tgi-client'} <= targets
    flows = sorted((ROOT/'.github/workflows').glob('*.yml'))
    assert {p.stem for p in flows} == {'test', 'notebooks', 'docs', 'canary', 'release'}
    for p in [*flows, ROOT/'.pre-commit-config.yaml', ROOT/'.devcontainer/devcontainer.json']:
        text = p.read_text()
        assert isinstance(yaml.safe_load(text), dict)
        used = set(re.findall(r'(?:run: |": "|\n\s+)make ([a-z-]+)', text))
        assert used <= targets, f'{p.name}: {used - targets}'
        for minor in re.findall(r'python(?:-version)?: "3\.(\d+)"', text): assert int(minor) >= 11
    assert os.access(ROOT/'.ci/run', os.X_OK) and 'make test' in (ROOT/'.ci/run').read_text()


def test_old_python_is_refused_in_one_sentence(tmp_path:Path) -> None:
    old = tmp_path/'python3'
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; '
                   'sys.version_info = (3, 9, 6); sys.version = \'3.9.6 (main)\'; '
                   'exec(sys.argv[1])" "$2"\n')
    old.chmod(0o755)
    done = subprocess.run(['make', 'setup', f'PYTHON={old}', f'VENV={tmp_path}/venv'], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if not line.startswith('make')]
    assert done.returncode and len(said) == 1, done.stderr
    assert 'needs Python 3.11 or newer' in said[0] and '3.9.6' in said[0]
    assert not (tmp_path/'venv').exists()


def test_changelog_and_log_are_dated() -> None:
    "A release has a date; the log runs from the newest entry to the oldest"
    log = (ROOT/'LOG.md').read_text()
    dates = re.findall(r'^## (\d{4}-\d\d-\d\d)', log, flags=re.M)
    assert all(a >= b for a, b in pairwise(dates)), dates
    heads = re.findall(r'^## (.+)', (ROOT/'CHANGELOG.md').read_text(), flags=re.M)
    assert all(re.fullmatch(r'Unreleased|\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d', h) for h in heads), heads
