"""Language identification on real text, which was not used to make it."""
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llmnotes.data.language import LanguageIdentifier, load_identifier, ngram_table, save_identifier, word_lists

# File of the declaration in the corpus of NLTK, for each of our languages that is there
FILES = dict(item.split('=') for item in '''
Afrikaans=afr Albanian=als Arabic=arb Armenian=hye Azerbaijani=azj_latn Basque=eus Belarusian=bel Bengali=ben
Breton=bre Bulgarian=bul Catalan=cat Croatian=hrv Czech=ces Danish=dan Dutch=nld English=eng Esperanto=epo
Estonian=est Finnish=fin French=fra Galician=glg Georgian=kat German=deu Greek=ell_monotonic Gujarati=guj
Hebrew=heb Hindi=hin Hungarian=hun Icelandic=isl Igbo=ibo Indonesian=ind Irish=gle Italian=ita Javanese=jav
Kannada=kan Kazakh=kaz Korean=kor Latin=lat Latvian=lav Lithuanian=lit Macedonian=mkd Malayalam=mal Maltese=mlt
Marathi=mar Nepali=nep Norwegian_Bokmal=nob Norwegian_Nynorsk=nno Persian=pes_1 Polish=pol Portuguese=por_PT
Romanian=ron Russian=rus Slovak=slk Slovenian=slv Spanish=spa Swahili=swh Swedish=swe Tagalog=tgl Tamil=tam
Turkish=tur Ukrainian=ukr Urdu=urd Uzbek=uzn_latn Vietnamese=vie Welsh=cym Yoruba=yor'''.split())


@pytest.fixture(scope='module')
def identifier() -> LanguageIdentifier:
    "With the temperature and power that 28_language_identification finds"
    lists = word_lists()
    return LanguageIdentifier(list(lists), ngram_table(lists), temperature=.63, power=.6)


@pytest.fixture(scope='module')
def paragraphs(shared: Path) -> list[tuple[str, str]]:
    with zipfile.ZipFile(shared/'nltk-corpora'/'udhr2.zip') as file:
        texts = {l: file.read(f'udhr2/{name}.txt').decode() for l, name in FILES.items()}
    return [(l, p.strip()) for l, text in texts.items() for p in text.split('\n') if len(p.strip()) > 60]


def test_paragraphs_of_66_languages(identifier: LanguageIdentifier, paragraphs: list[tuple[str, str]]) -> None:
    "FEATURES asks for 97 %; among the 89 languages, twins included"
    assert len(paragraphs) > 3000 and len(FILES) == 66
    right = np.array([identifier.identify(text)[0] == language for language, text in paragraphs])
    assert right.mean() > .97


def test_probabilities_can_be_believed(identifier: LanguageIdentifier, paragraphs: list[tuple[str, str]]) -> None:
    "Expected calibration error, on whole paragraphs and on their first ten words"
    for words, most in ((None, .03), (10, .06)):
        answers = [(identifier.identify(' '.join(t.split()[:words])), l) for l, t in paragraphs]
        p, right = np.array([p for (_, p), _ in answers]), np.array([a == l for (a, _), l in answers])
        place = np.minimum((p * 10).astype(int), 9)
        error = sum(abs(p[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in set(place))
        assert error < most, f'{words} words: {error:.3f}'


def test_saved_and_loaded(identifier: LanguageIdentifier, tmp_path: Path) -> None:
    path = save_identifier(identifier, tmp_path/'languages.safetensors')
    again = load_identifier(path)
    assert (again.languages, again.orders, again.temperature, again.power) == \
        (identifier.languages, identifier.orders, identifier.temperature, identifier.power)
    assert again.identify('Wer reitet so spät durch Nacht und Wind')[0] == 'German'
    for bad in (b'', path.read_bytes()[:50], b'{"a": 1}' * 9):
        (tmp_path/'bad').write_bytes(bad)
        with pytest.raises(ValueError, match='is no saved language identifier'): load_identifier(tmp_path/'bad')


def test_long_text_costs_no_more(identifier: LanguageIdentifier) -> None:
    "Two thousand characters are read, so a line of megabytes is answered like a page"
    text = 'the cat sat on the mat ' * 200_000
    assert identifier.identify(text) == identifier.identify(text[:2000])
