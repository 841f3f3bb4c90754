"""Byte-level BPE against tiktoken with its published ranks, and at its edges."""
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from tiktoken.load import load_tiktoken_bpe

from llmnotes.tokenizers.bpe import (
    CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, BPETokenizer, split_words, train_bpe)

pytestmark = pytest.mark.filterwarnings('ignore:the corpus has only')  # small corpora, on purpose
CL100K_SPECIAL = {'<|endoftext|>': 100257, '<|fim_prefix|>': 100258, '<|fim_middle|>': 100259,
                  '<|fim_suffix|>': 100260, '<|endofprompt|>': 100276}
SAYINGS = [
    'Τῇ καλλίστῃ, Здравствуй мир, שלום עולם, مرحبا بالعالم',
    'नमस्ते दुनिया, สวัสดีชาวโลก, 你好世界，こんにちは、안녕하세요',
    '👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 e\u0301 ﬁ Ⅷ ½ ٣ ſ',
    '\x00\x01\x1b[0m\x7f\x85\ufeff\u200b\u2028', ' ' * 9 + '\t\t\n \r\n\xa0\u3000 x ',
    "'s'S'll 'LL can't WE'VE ſ'ſ", '<|endoftext|>', 'a' * 3000, '', '1234567890 12,345.67',
    'x = {"a": [1, 2]}\r\n\r\n\tpass\n\n']


def texts(n: int = 3000) -> list[str]:
    "Bytes that are no UTF-8, any code points, and whatever is hard to split"
    rng = random.Random(5)
    hard = [*" \t\n\r\x0b\x1c\x85\xa0a1é'sltvreSLTVREdmDM.{ſ٣½語\u2028\u200b", '  ', '\n\n', "'ll", "'VE", '123',
            '\r\n', 'the', ' of']

    def one() -> str:
        points = (rng.randrange(0x110000) for _ in range(rng.randrange(60)))
        return rng.choice([rng.randbytes(rng.randrange(80)).decode(errors='replace'),
                           ''.join(chr(c) for c in points if not 0xd800 <= c < 0xe000),
                           ''.join(rng.choices(hard, k=rng.randrange(60)))])
    return SAYINGS + [one() for _ in range(n)]


@pytest.fixture(scope='module', params=['r50k_base', 'cl100k_base'])
def pair(request: pytest.FixtureRequest, shared: Path) -> tuple[BPETokenizer, tiktoken.Encoding, Path]:
    "Ours and tiktoken's, from the same rank file"
    path = shared/'tiktoken-ranks'/f'{request.param}.tiktoken'
    gpt4 = request.param == 'cl100k_base'
    pattern, special = (CL100K_PATTERN, CL100K_SPECIAL) if gpt4 else (GPT2_PATTERN, {'<|endoftext|>': 50256})
    # tiktoken's own spelling of the pattern, with possessive quantifiers
    own = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
           r"|\s*[\r\n]|\s+(?!\S)|\s") if gpt4 else GPT2_PATTERN
    theirs = tiktoken.Encoding(request.param, pat_str=own, mergeable_ranks=load_tiktoken_bpe(str(path)),
                               special_tokens=special)
    return BPETokenizer.from_tiktoken(path, pattern=pattern, special_tokens=special), theirs, path


@pytest.mark.parametrize('compiled', [True, False])
def test_ids_are_those_of_tiktoken(pair: tuple, compiled: bool, shared: Path) -> None:
    ours, theirs, _ = pair
    ours = BPETokenizer(ours.vocab, ours.merges, pattern=ours.pattern, special_tokens=ours.special_tokens,
                        compiled=compiled)
    names = ['tinyshakespeare/input.txt', 'gutenberg/alice.txt', 'sentencepiece/botchan.txt']
    some = texts() + [(shared/n).read_text(encoding='utf-8')[:60_000] for n in names]
    want = [theirs.encode_ordinary(t) for t in some]
    assert [ours.encode(t) for t in some] == want
    assert ours.encode_batch(some) == want
    assert [ours.encode_to_numpy(t).tolist() for t in some] == want
    assert [ours.decode(ids) for ids in want] == some
    name = '<|endoftext|>'
    assert ours.encode(f'a{name}b', allowed_special='all') == theirs.encode(f'a{name}b', allowed_special='all')
    assert ours.special_tokens[name] not in ours.encode(f'a{name}b')


def test_rank_file_there_and_back(pair: tuple, tmp_path: Path) -> None:
    ours, _, path = pair
    assert ours.to_tiktoken(tmp_path/'ranks').read_bytes() == path.read_bytes()


def test_merges_are_found_behind_the_ranks(shared: Path) -> None:
    "GPT-2 published its merges as well as the ranks"
    ours = BPETokenizer.from_tiktoken(shared/'tiktoken-ranks'/'r50k_base.tiktoken', pattern=GPT2_PATTERN)
    lines = (shared/'gpt2-vocab'/'gpt2_merges.txt').read_text(encoding='utf-8').split('\n')
    published = [line for line in lines if line and not line.startswith('#version')]
    from llmnotes.tokenizers.bpe import BYTE_NAMES
    shown = [' '.join(''.join(BYTE_NAMES[b] for b in part) for part in merge) for merge in ours.merges]
    assert shown == published


def test_trained_ranks_in_tiktoken(tmp_path: Path) -> None:
    tok = train_bpe(['the cat sat on the mat, the cats sit on mats'] * 3, 300)
    # without special tokens bytes and merges come first, so ids are ranks
    ranks = load_tiktoken_bpe(str(tok.to_tiktoken(tmp_path/'ranks')))
    theirs = tiktoken.Encoding('own', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert [theirs.encode_ordinary(t) for t in SAYINGS] == tok.encode_batch(SAYINGS)
    again = BPETokenizer.from_tiktoken(tmp_path/'ranks', pattern=GPT2_PATTERN)
    assert (again.vocab, again.merges) == (tok.vocab, tok.merges)


@pytest.mark.parametrize('pattern', [GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN], ids=['gpt2', 'cl100k', 'o200k'])
def test_training_equals_the_library(pattern: str) -> None:
    "Merges of the slow, the compiled and Hugging Face's trainer, ties included"
    rng = random.Random(9)
    words = [''.join(rng.choices('abcdé語', k=rng.randrange(1, 7))) for _ in range(300)]
    some = [' '.join(rng.choices(words, k=80)) + rng.choice(['\n\n', ' 12345', "'Ll!"]) for _ in range(150)]
    slow, fast = (train_bpe(some, 900, pattern=pattern, compiled=c) for c in (False, True))
    assert (slow.vocab, slow.merges) == (fast.vocab, fast.merges)
    ref = tokenizers.Tokenizer(tokenizers.models.BPE())
    ref.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ref.train_from_iterator(some, tokenizers.trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    merges = json.loads(ref.to_str())['model']['merges']
    from llmnotes.tokenizers.bpe import BYTE_NAMES
    shown = [[''.join(BYTE_NAMES[b] for b in part) for part in merge] for merge in fast.merges]
    assert shown == [m if isinstance(m, list) else m.split(' ') for m in merges]


def test_patterns_cut_as_the_library_does() -> None:
    for pattern in (GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN):
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
        for text in texts(1500):
            text = text.replace('\u0295', '')       # its case differs between Unicode 16 and 17
            assert split_words(text, pattern) == [w for w, _ in split.pre_tokenize_str(text)], (pattern, text)


def test_bytes_come_back(pair: tuple) -> None:
    rng = random.Random(2)
    for tok in (pair[0], train_bpe(['some text'], 270)):
        for _ in range(300):
            raw = rng.randbytes(rng.randrange(100))
            ids = [tok.vocab[raw[i:i + 1]] for i in range(len(raw))]
            assert tok.decode_bytes(ids) == raw
        assert tok.decode(tok.encode('\x00\x00a\x00')) == '\x00\x00a\x00'


def test_a_text_without_a_space_takes_no_quadratic_time() -> None:
    "Fifty megabytes of one word, or of one letter: linear but for a logarithm"
    rng = random.Random(1)
    tok = train_bpe(['abcd efgh abab cdcd aaaa'] * 50, 290)
    tok = BPETokenizer(tok.vocab, tok.merges, compiled=True)
    unit = ''.join(rng.choices('abcdefgh', k=1_000_000))
    tok.encode_to_numpy(unit[:1000])
    took = {}
    for n in (2, 10):
        start = time.process_time()
        ids = tok.encode_to_numpy(unit * n)
        took[n] = time.process_time() - start
    assert tok.decode_bytes(ids) == (unit * 10).encode()
    assert took[10] < 12 * took[2] + 1, took               # five times as long, and some
    assert len(tok.encode_to_numpy('a' * 50_000_000)) == 25_000_000


def test_long_words_take_merges_in_order() -> None:
    "Words beyond 64 bytes go through a heap: the same ids as in Python, and as the library's"
    rng = random.Random(4)
    tok = train_bpe([''.join(rng.choices('abcd', k=9)) for _ in range(3000)], 600)
    fast, slow = (BPETokenizer(tok.vocab, tok.merges, compiled=c) for c in (True, False))
    for n in (63, 64, 65, 66, 200, 5000):
        for letters in ('abcd', 'ab', 'aaab', 'a'):
            word = ''.join(rng.choices(letters, k=n))
            assert fast.encode(word) == slow.encode(word)


def test_training_on_a_text_without_a_space() -> None:
    long = ''.join(random.Random(3).choices('abcdefgh', k=2_000_000))
    start = time.process_time()
    tok = train_bpe([long], 400, compiled=True)
    assert len(tok.merges) == 144 and time.process_time() - start < 60


def test_import_compiles_nothing_and_brings_no_torch() -> None:
    code = ('import sys, time\nimport llmnotes.tokenizers.bpe as bpe\n'
            'compiled = [n for n, f in vars(bpe).items() if getattr(f, "signatures", None)]\n'
            'print("torch" in sys.modules, compiled)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == 'False []', done.stdout + done.stderr


def test_small_work_stays_in_python() -> None:
    tok = train_bpe(['a few words'], 262)
    tok.encode('a few words')
    assert tok._fast is None
    assert BPETokenizer(tok.vocab, tok.merges, compiled=True).encode_to_numpy('a few').dtype == np.int32


@pytest.mark.parametrize('call, said', [
    (lambda: train_bpe([], 300), 'texts hold no characters'),
    (lambda: train_bpe([], 300, compiled=True), 'texts hold no characters'),
    (lambda: train_bpe([''] * 9, 300), 'texts hold no characters'),
    (lambda: train_bpe('abc', 300), 'texts is one string'),
    (lambda: train_bpe(['a'], 255), 'vocab_size 255 is below 256'),
    (lambda: train_bpe(['a'], 257, special_tokens=['<a>', '<b>']), 'vocab_size 257 is below 258'),
    (lambda: train_bpe(['a\ud800'], 300), 'lone surrogate U+D800'),
    (lambda: train_bpe(['a\ud800'], 300, compiled=True), 'lone surrogate U+D800'),
    (lambda: train_bpe(['a b'], 300, pattern=r'\w+'), 'covers 2 of 3 characters'),
    (lambda: train_bpe(['a b'], 300, pattern=r'\w+', compiled=True), 'covers 2 of 3 characters'),
    (lambda: train_bpe(['a b'], 300, pattern='('), 'is no regex'),
], ids=str)
def test_bad_training(call: object, said: str) -> None:
    with pytest.raises(ValueError) as e: call()
    assert said in str(e.value)


@pytest.mark.parametrize('compiled', [True, False])
def test_bad_encoding_and_decoding(compiled: bool) -> None:
    tok = train_bpe(['the cat'], 258)
    tok = BPETokenizer(tok.vocab, tok.merges, compiled=compiled)
    for call in (tok.encode, tok.encode_to_numpy, lambda t: tok.encode_batch([t])):
        with pytest.raises(ValueError, match=r'lone surrogate U\+DC80 at position 2'): call('ab\udc80')
    for ids, said in (([258], 'id 258 is outside'), ([-1], 'id -1 is outside')):
        with pytest.raises(ValueError, match=said): tok.decode(ids)


@pytest.mark.parametrize('content, said', [
    (b'', 'holds no ranks'), (b'IQ== 0\nIg=', 'line 2 is no token'), (b'IQ== x\n', 'line 1 is no token'),
    (b'IQ== 0\n', 'vocab lacks 255 of 256 bytes')])
def test_bad_rank_files(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path/'ranks').write_bytes(content)
    with pytest.raises(ValueError) as e: BPETokenizer.from_tiktoken(tmp_path/'ranks')
    assert said in str(e.value)


def test_truncated_tokenizer_json(tmp_path: Path) -> None:
    path = train_bpe(['the cat'], 258).save(tmp_path/'tokenizer.json')
    whole = path.read_text()
    for cut in (0, 10, len(whole) // 2, len(whole) - 3):
        path.write_text(whole[:cut])
        with pytest.raises(ValueError, match='is not whole JSON'): BPETokenizer.from_file(path)
