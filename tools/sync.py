"""Remake what is derived: README.md, llms.txt, CITATION.cff, two pages of the site, and links.

Owner, repository, version and description stand in settings.ini alone, a notebook's title and
claim in its first cell, the chapters in _quarto.yml. `--check` writes nothing and fails when
something is stale.
"""
import argparse
import json
import re
import sys
from configparser import ConfigParser, SectionProxy
from dataclasses import dataclass
from pathlib import Path

import yaml

from llmnotes.cli import colab_link
from llmnotes.core import conformance_table, read_records, write_atomic

ROOT = Path(__file__).resolve().parent.parent


def settings(root:Path=ROOT) -> SectionProxy:
    "settings.ini"
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


@dataclass
class Notebook:
    "What the first cells of a notebook say"
    path: Path
    title: str
    claim: str
    module: str # `llmnotes.core`, or '' where nothing is exported

    @property
    def number(self) -> str: return self.path.name[:2]


def cells(path:Path) -> list[dict]:
    "Cells of a notebook, each with `source` as one string"
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [c | {'source': ''.join(c['source'])} for c in nb['cells']]


def read_notebook(path:Path, lib:str) -> Notebook:
    "Title, claim and module"
    found = cells(path)
    head = re.match(r'# (.+)\n+> (.+)', found[0]['source'])
    if not head: raise ValueError(f'{path.name} does not begin with "# Title" and "> claim"')
    exp = next(filter(None, (re.match(r'#\| default_exp (\S+)', c['source']) for c in found)), None)
    return Notebook(path, head[1], head[2], f'{lib}.{exp[1]}' if exp else '')


def chapters(root:Path=ROOT) -> dict[str, list[str]]:
    "Chapter -> notebooks, as the sidebar has them"
    site = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']
    return {part['section']: part['contents'] for part in site['sidebar']['contents']
            if isinstance(part, dict) and 'section' in part}


def by_chapter(root:Path, lib:str) -> dict[str, list[Notebook]]:
    "The numbered notebooks that are there"
    found = {name: [read_notebook(root/'nbs'/f, lib) for f in files
                    if f[:2].isdigit() and (root/'nbs'/f).exists()]
             for name, files in chapters(root).items()}
    return {name: nbs for name, nbs in found.items() if nbs}


# The cells of index.ipynb that are made here

def links(cfg:SectionProxy, root:Path) -> str:
    return (f"[Read the site]({cfg['doc_host']}{cfg['doc_baseurl']}) · {colab_link('index', cfg)} · "
            f"[Source]({cfg['git_url']}) · [Test runs]({cfg['git_url']}/actions)")


def start(cfg:SectionProxy, root:Path) -> str:
    return (f"```sh\ngit clone {cfg['git_url']}\ncd {cfg['repo']}\n"
            'make run     # one model from raw text to a served endpoint, and look at it\n'
            'make test    # execute every notebook and every test\n```')


def install(cfg:SectionProxy, root:Path) -> str:
    extras = [k.removesuffix('_requirements') for k in cfg if k.endswith('_requirements')]
    named = ', '.join(f'`{e}`' for e in extras[:-1]) + f' and `{extras[-1]}`'
    return (f"```sh\npip install git+{cfg['git_url']}\n```\n\n"
            'The library alone is light: torch, numpy, and what reads tokenizers and weights. '
            f"The extras are {named}, as in `pip install '{cfg['lib_name']}[train]'`.")


def notebooks(cfg:SectionProxy, root:Path) -> str:
    rows = ['| | notebook | claim |', '|---|---|---|']
    for chapter, nbs in by_chapter(root, cfg['lib_name']).items():
        rows.append(f'| | **{chapter}** | |')
        rows += [f'| {nb.number} | [{nb.title}]({nb.path.name}) | {nb.claim} |' for nb in nbs]
    return '\n'.join(rows)


def index_notebook(cfg:SectionProxy, root:Path) -> str:
    "index.ipynb with its made cells made again"
    nb = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))
    makers = dict(links=links, start=start, install=install, notebooks=notebooks)
    for cell in nb['cells']:
        mark = re.match(r'<!-- sync: (\w+) -->', ''.join(cell['source']))
        if mark:
            text = f'{mark[0]}\n{makers[mark[1]](cfg, root)}'
            cell['source'] = text.splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'


def with_links(cfg:SectionProxy, path:Path) -> str:
    "A notebook whose first Colab link, the one in its head, is ours"
    return re.sub(r'\[Open in Colab\]\(https://[^)\s"]*\)', colab_link(path.stem, cfg),
                  path.read_text(encoding='utf-8'), count=1)


# Files that are made here

def output_text(cell:dict) -> str:
    "What a cell printed or showed, as text"
    shown = (o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell['outputs'])
    return ''.join(map(''.join, shown)).rstrip()


def readme(index:str) -> str:
    "index.ipynb as Markdown, with links that hold from the root"
    parts = []
    for cell in json.loads(index)['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            source = re.sub(r'<!-- sync: \w+ -->\n', '', source)
            source = re.sub(r'\]\((?!\w+:|#|\.\./)', '](nbs/', source)
            parts.append(source.replace('](../', ']('))
        elif cell['cell_type'] == 'code':
            parts.append(f'```python\n{source}\n```')
            if text := output_text(cell): parts.append(f'```text\n{text}\n```')
    note = '<!-- Made from nbs/index.ipynb by `make sync`; edit that. -->\n\n'
    return note + '\n\n'.join(parts) + '\n'


def llms_txt(cfg:SectionProxy, root:Path) -> str:
    "An index of the notes for language models (llmstxt.org)"
    site = cfg['doc_host'] + cfg['doc_baseurl']
    parts = [f"# {cfg['title']}", f"> {cfg['description']}",
             'Notebooks that are at once a site, runnable lessons and the Python library '
             f"`{cfg['lib_name']}`. Every notebook is executed in continuous integration; import "
             'from the module named after each. Modules are exported by nbdev: change the '
             'notebook, never the module.']
    for chapter, nbs in by_chapter(root, cfg['lib_name']).items():
        lines = [f"- [{nb.title}]({cfg['git_url']}/blob/{cfg['branch']}/nbs/{nb.path.name}): "
                 f"{nb.claim}" + (f' (`{nb.module}`)' if nb.module else '') for nb in nbs]
        parts.append(f'## {chapter}\n\n' + '\n'.join(lines))
    parts.append('## Optional\n\n'
                 f'- [Conformance]({site}/conformance.html): differences from reference code\n'
                 f'- [Benchmarks]({site}/benchmarks.html): speed beside the best peer')
    return '\n\n'.join(parts) + '\n'


def citation(cfg:SectionProxy) -> str:
    "CITATION.cff"
    about = {'cff-version': '1.2.0', 'message': 'If these notes helped your work, cite them so.',
             'type': 'software', 'title': cfg['title'], 'abstract': cfg['description'],
             'authors': [{'name': cfg['author']}], 'version': cfg['version'],
             'license': 'Apache-2.0', 'repository-code': cfg['git_url'],
             'url': cfg['doc_host'] + cfg['doc_baseurl']}
    return '# Made from settings.ini by `make sync`.\n' + yaml.safe_dump(about, sort_keys=False)


def page(title:str, claim:str, body:str) -> str:
    return f'---\ntitle: {title}\ndescription: {claim}\n---\n\n{body}\n'


def conformance_page(root:Path) -> str:
    "Every comparison with a reference that the notebooks have recorded"
    text = ('Each notebook compares what it builds with an implementation that we did not write, '
            'or with a closed form, and fails when the difference is larger than the tolerance. '
            'The rows are the records of the run whose outputs the notebooks show.')
    table = conformance_table(read_records(root/'results'))
    return page('Conformance', 'How far each part is from a reference', f'{text}\n\n{table}')


def benchmark_page(root:Path) -> str:
    "The tables that `make bench` leaves"
    text = ('Both sides of a comparison are measured in one run, on the machine that the table '
            'names. `make bench` measures again.')
    tables = [re.sub(r'^#(?=#* )', '##', p.read_text(encoding='utf-8').strip(), flags=re.M)
              for p in sorted((root/'benchmarks/results').glob('*.md'))]
    return page('Benchmarks', 'Speed beside the best peer', '\n\n'.join([text, *tables]))


def derived(root:Path=ROOT) -> dict[Path, str]:
    "Every file that is made or touched here, as it should be"
    cfg = settings(root)
    nbs = {p: with_links(cfg, p) for p in sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb'))}
    index = index_notebook(cfg, root)
    return nbs | {
        root/'nbs/index.ipynb': index, root/'README.md': readme(index),
        root/'llms.txt': llms_txt(cfg, root), root/'CITATION.cff': citation(cfg),
        root/'nbs/conformance.qmd': conformance_page(root),
        root/'nbs/benchmarks.qmd': benchmark_page(root)}


def stale(root:Path=ROOT) -> list[Path]:
    "Files that are not as they should be"
    return [p for p, text in derived(root).items()
            if not p.exists() or p.read_text(encoding='utf-8') != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail if stale')
    args = parser.parse_args()
    wanted, old = derived(), stale()
    if args.check and old:
        sys.exit('stale, run `make sync`: ' + ', '.join(str(p.relative_to(ROOT)) for p in old))
    for path in old:
        write_atomic(path, wanted[path])
        print(path.relative_to(ROOT))


if __name__ == '__main__':
    main()
