"""Quality signals against values of RedPajama's own code, which lie beside a clone on some machines."""
import json
from pathlib import Path

import pytest

from llmnotes.data.signals import compute_signals

LISTS = {'rps_doc_ldnoobw_words', 'rps_doc_ut1_blacklist'} # need lists that are not here


def rows(path:Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_signals_of_edge_documents_equal_the_reference(shared:Path) -> None:
    "Values and spans, `None` included, to the last digit"
    golden, words = shared.parent/'facts'/'golden', shared/'stopwords-json'/'en.json'
    if not (golden.is_dir() and words.is_file()): pytest.skip('the values are not here')
    want = {r['id']: r['quality_signals'] for r in rows(golden/'rp2_edge_expected.jsonl')}
    stop_words = set(json.loads(words.read_text(encoding='utf-8')))
    for d in rows(golden/'rp2_edge_docs.jsonl'):
        have = compute_signals(d['text'], stop_words=stop_words)
        expected = {k: [tuple(s) for s in want[d['id']][k]] for k in have.keys() - LISTS}
        assert {k: have[k] for k in expected} == expected, d['id']
