"""Extraction: archives that are damaged, pages of nowhere, and the pages of a real crawl."""
import gzip
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from llmnotes.data.extract import Page, decode_html, extract_pages, html_to_text, read_warc, write_warc

fastwarc = pytest.importorskip('fastwarc.warc', reason="needs fastwarc: pip install 'llmnotes[data]'")


def pages(n:int) -> list[Page]:
    rng = random.Random(0)
    return [Page(f'https://docs.example.org/{i}', f'<p>{i} {rng.random()}</p>'.encode() * rng.randint(1, 90))
            for i in range(n)]


def by_fastwarc(path:Path) -> list[tuple[str, bytes]]:
    every = fastwarc.ArchiveIterator(str(path), parse_http=True, auto_decode='all',
                                     record_types=fastwarc.WarcRecordType.response)
    return [(r.headers['WARC-Target-URI'].strip('<>'), r.reader.read()) for r in every]


def word_f1(a:str, b:str) -> float:
    a, b = a.split(), b.split()
    return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


def test_a_damaged_archive_gives_only_true_pages(tmp_path:Path) -> None:
    "Bytes flipped anywhere: never an error, never a page that was not written"
    want, path, rng = pages(60), tmp_path/'a.warc.gz', random.Random(1)
    write_warc(want, path)
    data = path.read_bytes()
    for draw in range(60):
        hurt = bytearray(data)
        for _ in range(3): hurt[rng.randrange(10, len(hurt))] ^= rng.randrange(1, 256)
        if draw % 3 == 0: hurt = hurt[:rng.randrange(len(hurt))]
        path.write_bytes(hurt)
        counts = Counter()
        got = list(read_warc(path, counts=counts))
        assert set(got) <= set(want) and got == sorted(got, key=want.index)
        if draw % 3: assert len(got) >= 56, counts


@pytest.mark.parametrize('gap', [*range(65_400, 65_560, 3), 200_000])
def test_the_next_record_is_found_wherever_it_begins(tmp_path:Path, gap:int) -> None:
    "Also across the edge of the blocks in which it is looked for"
    path, want = tmp_path/'a.warc.gz', pages(2)
    write_warc(want, path)
    whole, start = path.read_bytes(), [r.stream_pos for r in fastwarc.ArchiveIterator(
        str(path), parse_http=False)][1]
    junk = random.Random(gap).randbytes(gap)
    path.write_bytes(whole[:start] + b'\x1f\x8b\x08' + junk + whole[start:])
    counts = Counter()
    assert list(read_warc(path, counts=counts)) == want
    assert counts == Counter(warcinfo=1, pages=2) + Counter({'broken gzip': 1})


def test_a_record_that_is_too_long_is_passed_over(tmp_path:Path) -> None:
    small, path = pages(3), tmp_path/'a.warc.gz'
    write_warc([small[0], Page('https://docs.example.org/big', bytes(300_000)), *small[1:]], path)
    for packed in (True, False):
        if not packed: path.write_bytes(gzip.decompress(path.read_bytes()))
        counts = Counter()
        assert list(read_warc(path, counts=counts, max_bytes=100_000)) == small
        assert counts['too long'] == 1


def test_nonsense_is_read_without_an_error() -> None:
    rng = random.Random(2)
    parts = ['<p>', '</p>', '<a href=x>', '</a>', '<nav>', '</nav>', '<td>', '<pre>', '</pre>', '&nbsp;', '&#0;',
             '&#xd800;', '<', '>', '<!--', '-->', '<![', ']]>', '\x00', '\u3000', '\t', '\n', 'word', '"', "'", '=',
             '<script>', '</script>', '<br', '/>', '<title>', '</', '<?', '\udc80']
    for _ in range(1500):
        page = ''.join(rng.choices(parts, k=rng.randint(0, 40)))
        text = html_to_text(page)
        assert text == text.strip('\n') and '\xa0' not in text
        assert all(line == line.rstrip() for line in text.split('\n')), page
        decode_html(rng.randbytes(50) + page.encode('utf-8', 'surrogatepass'), rng.choice(
            ['', 'charset=hex', 'charset=idna', 'charset=utf-16', 'charset=undefined', 'charset="']))


def test_text_of_a_page_is_that_of_common_crawl(shared:Path) -> None:
    "Everything on the page, against the text that Common Crawl took out of it"
    folder = shared/'warc'
    page, = read_warc(folder/'whirlwind.warc.gz')
    (wet, gold), = extract_pages(read_warc(folder/'whirlwind.warc.wet.gz'))
    assert wet.kind == 'conversion' and wet.url == page.url
    html, encoding, replaced = decode_html(page.body, page.content_type)
    assert (encoding, replaced) == ('utf-8', 0)
    assert word_f1(html_to_text(html, boilerplate=True), gold) > .98
    assert len(html_to_text(html)) < len(gold) / 2


def test_real_archives_are_read_as_fastwarc_reads_them(shared:Path) -> None:
    for path in sorted((shared/'warc').glob('*.warc.gz')):
        counts = Counter()
        got = [(p.url, p.body) for p in read_warc(path, counts=counts)]
        assert got == by_fastwarc(path) and got
        assert not {'broken gzip', 'wrong length', 'no record', 'broken body'} & set(counts)


def test_real_pages_give_the_words_that_trafilatura_gives(shared:Path) -> None:
    "Nine of ten words that it takes for the article, on most pages, and fewer than stand on the page"
    trafilatura = pytest.importorskip('trafilatura', reason='needs trafilatura')
    share = []
    for path in sorted((shared/'warc').glob('sample-*.warc.gz')):
        for page, text in extract_pages(read_warc(path)):
            html = decode_html(page.body, page.content_type)[0]
            article = (trafilatura.extract(html, include_comments=False) or '').split()
            share.append(sum((Counter(text.split()) & Counter(article)).values()) / max(1, len(article)))
            assert len(text) < len(html_to_text(html, boilerplate=True))
    assert len(share) == 37 and sorted(share)[len(share) // 10] > .9, share


def test_each_loss_has_its_count(tmp_path:Path) -> None:
    "Lengths that lie, a foreign member, and records of other kinds, packed and not"
    write_warc(pages(4), tmp_path/'a.warc.gz')
    starts = [r.stream_pos for r in fastwarc.ArchiveIterator(str(tmp_path/'a.warc.gz'), parse_http=False)]
    data = (tmp_path/'a.warc.gz').read_bytes()
    records = [gzip.decompress(data[a:b]) for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    def lie(record:bytes, by:int) -> bytes:
        said = re.search(rb'Content-Length: (\d+)', record)
        return record.replace(said[0], b'Content-Length: %d' % (int(said[1]) + by), 1)
    strange = [records[0], records[1], lie(records[2], -9), records[3], lie(records[2], 9), records[4],
               b'hello\r\n\r\n', records[1].replace(b'WARC-Type: response', b'WARC-Type: request'), records[2]]
    for name, whole in (('b.warc', b''.join(strange)), ('b.warc.gz', b''.join(map(gzip.compress, strange)))):
        (tmp_path/name).write_bytes(whole)
        counts = Counter()
        assert [p.url[-1] for p in read_warc(tmp_path/name, counts=counts)] == ['0', '2', '3', '1']
        assert counts == {'warcinfo': 1, 'pages': 4, 'wrong length': 2, 'no record': 1, 'request': 1}


@pytest.mark.parametrize('page, text', [
    ('<p>a<br>\n&nbsp;&nbsp;b  c', 'a\n  b c'), ('<p>\u3000</p>x', 'x'), ('a &am', 'a &am'),
    ('<head><title>t<body>a', ''),
    ('<head><title>t</title><body>a', 'a'), ('<nav/>a', 'a'), ('<tr><td>a<td>b<tr><td>c', 'a\tb\n\nc'),
    ('<pre>  a\n\n    b</pre>', '  a\n\n    b'), ('<a href=x>one two</a> three', ''), ('<a name=x>one</a>', 'one')])
def test_layout_of_small_pages(page:str, text:str) -> None:
    assert html_to_text(page) == text
