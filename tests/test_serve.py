"""The served endpoint: real clients, bad requests, clients that leave, and a server that stays."""
import http.client
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip('fastapi', reason="needs pip install 'llmnotes[serve]'")
pytest.importorskip('uvicorn', reason="needs pip install 'llmnotes[serve]'")
pytest.importorskip('transformers', reason="needs pip install 'llmnotes[train]'")

from llmnotes.core import Workspace
from llmnotes.infer.decoding import (CannotServe, Generation, Parameters, TextStream, load_model,
                                     make_prompt, tiny_model)
from llmnotes.serve import tgi
from llmnotes.serve.chat import chat_command

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 'def f(x):\n'
SERVE = ('import sys; from llmnotes.serve.tgi import serve_command; '
         'sys.exit(serve_command(sys.argv[1:]))')
ENV = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'} # It refuses 127.0.0.1


def first_line(process:subprocess.Popen, seconds:float=180) -> str:
    "A line of its output, within a time"
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    assert ready, 'the server said nothing in time'
    return process.stdout.readline()


@contextmanager
def served(*args:object) -> Iterator[tuple[str, subprocess.Popen]]:
    "The real command in a process of its own"
    process = subprocess.Popen([sys.executable, '-c', SERVE, *map(str, args), '--port', '0'],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=ENV | {'OMP_NUM_THREADS': '1'})
    try:
        line = first_line(process)
        assert 'http://' in line, line + process.stdout.read()
        yield re.search(r'http://[^ ]+', line)[0], process
    finally:
        process.kill(); process.wait(10); process.stdout.close()


@pytest.fixture(scope='module')
def model(tmp_path_factory:pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp('models')/'tiny', positions=1024)


@pytest.fixture(scope='module')
def loaded(model:Path): return load_model(model)


@pytest.fixture(scope='module')
def server(model:Path) -> Iterator[tuple[str, subprocess.Popen]]:
    with served(model, '--max-concurrent-requests', 3, '--max-input-tokens', 900,
                '--payload-limit', 100_000) as s: yield s


@pytest.fixture
def url(server:tuple[str, subprocess.Popen]) -> Iterator[str]:
    "The server, which is well before and after every test"
    yield server[0]
    assert server[1].poll() is None, 'the server is gone'
    idle(server[0])
    assert call(server[0], '/generate', ok())[0] == 200


def call(url:str, path:str, data:object=None, **headers:str) -> tuple[int, str]:
    "Status and text; bytes are sent as they are"
    body = data if isinstance(data, bytes | None) else json.dumps(data).encode()
    head = {'Content-Type': 'application/json'} | {k.replace('_', '-'): v for k, v in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body, head), timeout=60) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as e:
        with e: return e.code, e.read().decode()


def ok(n:int=3, **parameters:object) -> dict: # A request that is fine
    return {'inputs': PROMPT, 'parameters': {'max_new_tokens': n, **parameters}}


def gauge(url:str, name:str) -> int:
    return int(re.search(rf'^{name} (\d+)$', call(url, '/metrics')[1], flags=re.M)[1])


def idle(url:str, seconds:float=20) -> None:
    "Wait until nothing is being decoded"
    end = time.monotonic() + seconds
    while gauge(url, 'tgi_batch_current_size') + gauge(url, 'tgi_queue_size'):
        assert time.monotonic() < end, 'something is still being decoded'
        time.sleep(.02)


def alone(loaded, **parameters:object) -> Generation: # The same request, without a server
    g = Generation(loaded, make_prompt(loaded, PROMPT, Parameters(**parameters)))
    list(g)
    return g


def events(text:str) -> list[dict]:
    return [json.loads(line[5:]) for line in text.splitlines()
            if line.startswith('data:') and '[DONE]' not in line]


@contextmanager
def open_stream(url:str, n:int=900) -> Iterator[socket.socket]:
    "A streaming client that has read the first event and no more"
    host, port = url.removeprefix('http://').split(':')
    body = json.dumps(ok(n)).encode()
    with socket.create_connection((host, int(port)), timeout=60) as s:
        s.sendall(b'POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
                  b'Content-Length: %d\r\n\r\n' % len(body) + body)
        seen = b''
        while b'data:' not in seen: seen += s.recv(4096)
        yield s


# Clients

def test_curl(url:str, loaded) -> None:
    if not shutil.which('curl'): pytest.skip('curl is not here')
    curl = lambda path: subprocess.run(
        ['curl', '-sN', '--max-time', '60', url + path, '-H', 'Content-Type: application/json',
         '-d', json.dumps(ok(6))], capture_output=True, text=True, check=True).stdout
    want = alone(loaded, max_new_tokens=6)
    assert json.loads(curl('/generate')) == {'generated_text': want.text}
    got = events(curl('/generate_stream'))
    assert [e['token']['id'] for e in got] == [s.id for s in want.steps]
    assert [e['index'] for e in got] == [1, 2, 3, 4, 5, 6]
    assert got[-1]['generated_text'] == want.text and got[0]['details'] is None
    assert got[-1]['details'] == {'finish_reason': 'length', 'generated_tokens': 6, 'seed': None,
                                  'input_length': len(want.prompt.ids)}


def test_inference_client(url:str, loaded, monkeypatch:pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import ValidationError
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    client, want = InferenceClient(url, timeout=60), alone(loaded, max_new_tokens=8)
    out = client.text_generation(PROMPT, max_new_tokens=8, details=True, decoder_input_details=True,
                                 top_n_tokens=2)
    assert out.generated_text == want.text
    assert [t.id for t in out.details.prefill] == list(want.prompt.ids)
    assert [len(t) for t in out.details.top_tokens] == [2] * 8
    assert [t[0]['id'] for t in out.details.top_tokens] == [s.id for s in want.steps]
    stream = list(client.text_generation(PROMPT, max_new_tokens=8, stream=True, details=True))
    assert [s.token.id for s in stream] == [s.id for s in want.steps]
    assert stream[-1].generated_text == want.text
    assert stream[-1].details.finish_reason == 'length'
    best = client.text_generation(PROMPT, best_of=2, do_sample=True, max_new_tokens=4, details=True)
    assert len(best.details.best_of_sequences) == 1
    for stream in (False, True):
        with pytest.raises(ValidationError, match='`top_p` must be > 0.0 and < 1.0'):
            list(client.text_generation('x', top_p=1., stream=stream))


def test_inference_client_chat(url:str, monkeypatch:pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    client = InferenceClient(url, timeout=60)
    ask = dict(messages=[{'role': 'user', 'content': 'What does `sum` do?'}], max_tokens=9,
               temperature=0, logprobs=True, top_logprobs=2)
    whole = client.chat_completion(**ask)
    parts = list(client.chat_completion(**ask, stream=True, stream_options={'include_usage': True}))
    said = ''.join(c.choices[0].delta.content for c in parts if c.choices)
    assert said == whole.choices[0].message.content and whole.choices[0].finish_reason == 'length'
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 9
    assert len(whole.choices[0].logprobs.content) == 9
    hot = [client.chat_completion(ask['messages'], max_tokens=12, seed=s, temperature=1.5)
           .choices[0].message.content for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


THEIRS = '''
import asyncio, json, sys
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError, OverloadedError
url, prompt = sys.argv[1:]
c = Client(url, timeout=60)
whole = c.generate(prompt, max_new_tokens=8, decoder_input_details=True, top_n_tokens=2)
parts = list(c.generate_stream(prompt, max_new_tokens=8))
seeded = c.generate(prompt, max_new_tokens=8, do_sample=True, temperature=1.2, seed=7,
                    repetition_penalty=1.1, typical_p=.9, top_k=50, stop_sequences=['zzz'])
later = asyncio.run(AsyncClient(url, timeout=60).generate(prompt, max_new_tokens=8))
chat = c.chat([{'role': 'user', 'content': 'x'}], max_tokens=5, seed=1)
errors = []
for f in (lambda: c.generate(prompt, max_new_tokens=10 ** 6),
          lambda: list(c.generate_stream('', max_new_tokens=1))):
    try: f()
    except ValidationError as e: errors.append(str(e))
print(json.dumps(dict(text=whole.generated_text, prefill=len(whole.details.prefill),
    logprobs=[t.logprob for t in whole.details.tokens], top=len(whole.details.top_tokens),
    parts=parts[-1].generated_text, ids=[p.token.id for p in parts], end=parts[-1].details.finish_reason.value,
    seed=seeded.details.seed, later=later.generated_text, errors=errors,
    chat=chat.choices[0].message.content)))
'''


@pytest.fixture(scope='module')
def their_python() -> str:
    "Where `text-generation` lives: named by LLMNOTES_TGI_PYTHON, or made by the Makefile"
    if named := os.environ.get('LLMNOTES_TGI_PYTHON'): return named
    path = ROOT/'.venv-tgi'/'bin'/'python'
    if not path.exists():
        made = subprocess.run(['make', 'tgi-client', f'PYTHON={sys.executable}'], cwd=ROOT,
                              capture_output=True, text=True, timeout=300)
        if made.returncode: pytest.skip(f'make tgi-client failed: {made.stderr.strip()[-200:]}')
    return str(path)


def test_text_generation_client(url:str, loaded, their_python:str) -> None:
    done = subprocess.run([their_python, '-W', 'ignore', '-c', THEIRS, url, PROMPT],
                          capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-1500:]
    got, want = json.loads(done.stdout.splitlines()[-1]), alone(loaded, max_new_tokens=8)
    assert got['text'] == got['parts'] == got['later'] == want.text
    assert got['ids'] == [s.id for s in want.steps]
    assert got['logprobs'] == pytest.approx([s.logprob for s in want.steps], abs=1e-5)
    assert (got['prefill'], got['top'], got['end']) == (len(want.prompt.ids), 8, 'length')
    assert got['seed'] == 7 and isinstance(got['chat'], str)
    assert '1024 `max_new_tokens`' in got['errors'][0]
    assert '`inputs` cannot be empty' in got['errors'][1]


# What it says

def test_information(url:str, model:Path) -> None:
    status, text = call(url, '/info')
    info = json.loads(text)
    assert status == 200 and info['model_id'] == str(model)
    assert (info['max_input_tokens'], info['max_total_tokens']) == (900, 1024)
    for path in ('/health', '/ping', '/'): assert call(url, path) == (200, '')
    assert json.loads(call(url, '/v1/models')[1])['data'][0]['id'] == str(model)
    text = call(url, '/metrics')[1]
    assert re.search(r'^tgi_request_count \d+$', text, flags=re.M) and '_total' not in text
    tokens = json.loads(call(url, '/tokenize', {'inputs': 'é x'})[1])
    assert [t['start'] for t in tokens][0] == 0 and tokens[-1]['stop'] == 3


def test_headers_of_an_answer(url:str) -> None:
    connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=60)
    connection.request('POST', '/generate', json.dumps(ok(4)), {'Content-Type': 'application/json'})
    head = connection.getresponse().headers
    assert head['x-generated-tokens'] == '4' and head['x-compute-characters'] == str(len(PROMPT))
    for name in ('total', 'validation', 'queue', 'inference'):
        assert head[f'x-{name}-time'].isdigit()
    connection.close()


def test_same_seed_same_text(url:str, loaded) -> None:
    "Alone or three at a time, and equal to the engine's own class"
    ask = lambda s: json.loads(call(url, '/generate', ok(15, seed=s, temperature=1.3))[1])
    want = {s: {'generated_text': alone(loaded, max_new_tokens=15, seed=s, temperature=1.3).text}
            for s in (1, 2, 3)}
    assert {s: ask(s) for s in want} == want
    with ThreadPoolExecutor(3) as pool: assert dict(zip(want, pool.map(ask, want))) == want
    assert len({json.dumps(v) for v in want.values()}) == 3


def test_greedy_is_that_of_transformers(model:Path, url:str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    reference, tok = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tok(PROMPT, return_tensors='pt').input_ids
    want = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30,
                              do_sample=False)[0, ids.shape[1]:].tolist()
    out = json.loads(call(url, '/generate', ok(30, details=True))[1])
    assert [t['id'] for t in out['details']['tokens']] == want
    with torch.no_grad(): logits = reference(torch.tensor([[*ids[0].tolist(), *want]])).logits[0]
    logp = logits.log_softmax(-1)[ids.shape[1] - 1:-1]
    assert [t['logprob'] for t in out['details']['tokens']] == pytest.approx(
        logp.gather(1, torch.tensor(want)[:, None])[:, 0].tolist(), abs=1e-4)


# What it refuses

BAD_BODIES = {
    'cut': (b'{"inputs": "x', 400, 'Failed to parse the request body as JSON'),
    'empty': (b'', 400, 'Failed to parse the request body as JSON'),
    'nan': (b'{"inputs": "x", "parameters": {"temperature": NaN}}', 400, 'NaN'),
    'deep': (b'[' * 50_000, 400, 'Failed to parse the request body as JSON'),
    'not utf-8': (b'{"inputs": "\xff"}', 400, 'Failed to parse'),
    'lone surrogate': (b'{"inputs": "\\ud800"}', 400, 'surrogate'),
    'list': (b'[1]', 422, 'invalid type: sequence, expected a map'),
    'no inputs': (b'{}', 422, 'missing field `inputs`'),
    'number for text': (b'{"inputs": 3}', 422, 'inputs: invalid type: integer `3`, expected a string'),
    'list for text': (b'{"inputs": ["x"]}', 422, 'inputs: invalid type: sequence'),
    'text for number': (b'{"inputs": "x", "parameters": {"max_new_tokens": "9"}}', 422,
                        'parameters.max_new_tokens: invalid type: string "9", expected u32'),
    'negative': (b'{"inputs": "x", "parameters": {"seed": -1}}', 422, 'integer `-1`, expected u64'),
    'fraction': (b'{"inputs": "x", "parameters": {"top_k": 1.5}}', 422, 'floating point `1.5`'),
    'true for number': (b'{"inputs": "x", "parameters": {"top_k": true}}', 422, 'boolean `true`'),
    'parameters': (b'{"inputs": "x", "parameters": []}', 422, 'parameters: invalid type: sequence'),
    'too large': (b'{"inputs": "' + b'x' * 200_000 + b'"}', 413, 'length limit exceeded'),
}


@pytest.mark.parametrize('path', ['/generate', '/generate_stream'])
@pytest.mark.parametrize('name', BAD_BODIES)
def test_bad_bodies(server:tuple[str, subprocess.Popen], path:str, name:str) -> None:
    body, status, words = BAD_BODIES[name]
    got, text = call(server[0], path, body)
    assert got == status and words in text and len(text) < 400


def test_bad_bodies_left_the_server_well(url:str) -> None:
    assert call(url, '/generate', ok(), Content_Type='text/plain')[0] == 415
    assert call(url, '/generate')[0] == 405 and call(url, '/nothing')[0] == 404


LIMITS = {
    '`temperature` must be strictly positive': ok(temperature=0),
    '`repetition_penalty` must be strictly positive': ok(repetition_penalty=-1),
    '`frequency_penalty` must be >= -2.0 and <= 2.0': ok(frequency_penalty=3),
    '`top_p` must be > 0.0 and < 1.0': ok(top_p=1),
    '`typical_p` must be > 0.0 and < 1.0': ok(typical_p=0),
    '`top_k` must be strictly positive': ok(top_k=-1),
    '`max_new_tokens` must be strictly positive': ok(0),
    '`stop` supports up to 4 stop sequences. Given: 5': ok(stop=list('abcde')),
    '`top_n_tokens` must be >= 0 and <= 5. Given: 6': ok(top_n_tokens=6),
    '`best_of` must be > 0 and <= 2. Given: 3': ok(best_of=3),
    'you must use sampling when `best_of` is > 1': ok(best_of=2),
    '`seed` must not be set when `best_of` > 1': ok(best_of=2, do_sample=True, seed=1),
    '`inputs` cannot be empty': {'inputs': ''},
    '`truncate` must be strictly positive and less than 900. Given: 901': ok(truncate=901),
    'grammar is not supported': ok(grammar={'type': 'regex', 'value': 'a'}),
    'watermark is not supported': ok(watermark=True),
    '`inputs` must have less than 900 tokens. Given: 950':
        {'inputs': '9' * 950, 'parameters': {'max_new_tokens': 9}},
    '`inputs` tokens + `max_new_tokens` must be <= 1024. Given: 950 `inputs` tokens and 1024 '
    '`max_new_tokens`': {'inputs': '9' * 950, 'parameters': {'max_new_tokens': 5000}},
}


@pytest.mark.parametrize('words', LIMITS)
def test_requests_beyond_the_limits(server:tuple[str, subprocess.Popen], words:str) -> None:
    want = {'error': f'Input validation error: {words}', 'error_type': 'validation'}
    status, text = call(server[0], '/generate', LIMITS[words])
    assert (status, json.loads(text)) == (422, want)
    if 'best_of' in words: return                            # a stream has words of its own
    status, text = call(server[0], '/generate_stream', LIMITS[words])
    assert (status, events(text)) == (200, [want])


def test_chat_errors(url:str) -> None:
    hello = [{'role': 'user', 'content': 'x'}]
    for data, status, words in [
            ({}, 422, 'missing field `messages`'), ({'messages': 'x'}, 422, 'expected a sequence'),
            ({'messages': []}, 422, 'cannot be empty'), ({'messages': [3]}, 422, 'messages[0]'),
            ({'messages': [{'content': 'x'}]}, 422, 'missing field `role`'),
            ({'messages': hello, 'max_tokens': 0}, 422, '`max_new_tokens` must be strictly'),
            ({'messages': hello, 'tools': [{}]}, 422, 'Tool error'),
            ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 422, 'text only')]:
        got, text = call(url, '/v1/chat/completions', data)
        assert got == status and words in text, (data, got, text)
    got, text = call(url, '/v1/chat/completions', {'messages': hello, 'max_tokens': 0, 'stream': True})
    assert got == 200 and text.endswith('data: [DONE]\n\n')
    assert events(text)[0]['error']['http_status_code'] == 422
    fine = {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'x'}]}],
            'max_completion_tokens': 2, 'top_p': 1, 'stop': 'zz'}
    assert call(url, '/v1/chat/completions', fine)[0] == 200


def test_overload(url:str) -> None:
    "Three at a time; the fourth is told so at once, and served when there is room"
    with open_stream(url), open_stream(url), open_stream(url):
        want = {'error': 'Model is overloaded', 'error_type': 'overloaded'}
        status, text = call(url, '/generate', ok())
        assert (status, json.loads(text)) == (429, want)
        assert events(call(url, '/generate_stream', ok())[1]) == [want]
        assert call(url, '/health')[0] == 200
    idle(url)
    assert call(url, '/generate', ok())[0] == 200


def send(url:str, path:str, body:bytes, length:int|None=None) -> socket.socket:
    "A request whose answer nobody has read yet"
    host, port = url.removeprefix('http://').split(':')
    s = socket.create_connection((host, int(port)), timeout=60)
    s.sendall(b'POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
              b'Content-Length: %d\r\n\r\n' % (path.encode(), length or len(body)) + body)
    return s


@pytest.mark.parametrize('path', ['/generate', '/generate_stream', '/v1/chat/completions'])
def test_a_client_that_hangs_up_stops_its_decoding(model:Path, path:str) -> None:
    "Its 900 tokens would take nine seconds and more; a few are made before it is noticed"
    own = load_model(model)
    forward, steps = own.model.forward, []
    def slow(*args, **kwargs): time.sleep(.01); steps.append(1); return forward(*args, **kwargs)
    own.model.forward = slow
    service = tgi.Service(own, tgi.Limits(max_input_tokens=900, max_total_tokens=1024))
    data = ok(900) | {'messages': [{'role': 'user', 'content': 'x'}], 'max_tokens': 900}
    with tgi.serving(tgi.create_app(service)) as url:
        with send(url, path, json.dumps(data).encode()):
            while len(steps) < 3: time.sleep(.002)
        while service.engine.jobs: time.sleep(.002)
        assert len(steps) < 450 and service.counts['tgi_request_success'] == 0
        with send(url, path, b'{"inp', length=99): pass      # one that leaves half a body
        assert call(url, '/generate', ok())[0] == 200


def test_a_failing_step_fails_one_request(model:Path) -> None:
    own = load_model(model)
    service = tgi.Service(own, tgi.Limits())
    forward, calls = own.model.forward, []
    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1: raise RuntimeError('out of memory')
        return forward(*args, **kwargs)
    own.model.forward = fails_once
    with tgi.serving(tgi.create_app(service)) as url:
        status, text = call(url, '/generate', ok())
        assert (status, json.loads(text)) == (424, {'error_type': 'generation', 'error':
            'Request failed during generation: out of memory'})
        assert call(url, '/generate', ok())[0] == 200 and call(url, '/health')[0] == 200
        service.engine.close()
        assert call(url, '/health')[0] == 503 and call(url, '/generate', ok())[0] == 424


def test_api_key(loaded) -> None:
    app = tgi.create_app(tgi.Service(loaded, tgi.Limits()), api_key='s3cret')
    with tgi.serving(app) as url:
        for key in ({}, {'Authorization': 'Bearer no'}, {'Authorization': 's3cret'}):
            assert call(url, '/generate', ok(), **key) == (401, '')
            assert call(url, '/v1/chat/completions', {}, **key) == (401, '')
        assert call(url, '/generate', ok(), Authorization='bearer s3cret')[0] == 200
        assert call(url, '/health')[0] == call(url, '/info')[0] == 200


# Starting and stopping

def refused(capsys:pytest.CaptureFixture, *args:object) -> str:
    "The one sentence of a server that does not start"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('uvicorn.Server.run', lambda *_, **kw: pytest.fail('it started'))
        assert tgi.serve_command([*map(str, args), '--port', '0']) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith('llmnotes serve: ') and '\n' not in said and 'Traceback' not in said
    return said


def lose_a_layer(folder:Path) -> None:
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config | {'num_hidden_layers': 5}))


def cut(name:str, keep:int):
    return lambda f: (f/name).write_bytes((f/name).read_bytes()[:keep])


DAMAGE = {
    'there is no model folder': shutil.rmtree,
    'it has no config.json': lambda f: (f/'config.json').unlink(),
    'its JSON cannot be read': cut('config.json', 40),
    'has a config.json and no weights': lambda f: (f/'model.safetensors').unlink(),
    'is damaged or was cut short': cut('model.safetensors', 5000),
    'has no tokenizer': lambda f: (f/'tokenizer.json').unlink(),
    'cannot be loaded': cut('tokenizer.json', 500),
    'the weights do not fit config.json': lose_a_layer,
    'lacks its shard': lambda f: (f/'model.safetensors.index.json').write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
}


@pytest.mark.parametrize('words', DAMAGE)
def test_half_a_model_folder(model:Path, tmp_path:Path, words:str,
                             capsys:pytest.CaptureFixture) -> None:
    shutil.copytree(model, tmp_path/'m')
    DAMAGE[words](tmp_path/'m')
    assert words in refused(capsys, tmp_path/'m')


def test_limits_and_ports_that_cannot_be(model:Path, tmp_path:Path, server:tuple,
                                         capsys:pytest.CaptureFixture) -> None:
    assert '1024 positions' in refused(capsys, model, '--max-total-tokens', 5000)
    assert 'must be less than max_total_tokens' in refused(
        capsys, model, '--max-total-tokens', 8, '--max-input-tokens', 8)
    assert 'holds no model yet' in refused(capsys, '--workspace', tmp_path)
    assert 'cannot listen' in refused(capsys, model, '--host', 'no-such-host.invalid')
    for bad in (['--port', '70000'], ['--max-best-of', '0'], ['--nonsense'], ['--dtype', 'int3']):
        with pytest.raises(SystemExit) as stop: tgi.serve_command([str(model), *bad])
        assert stop.value.code == 2
    port = server[0].rsplit(':', 1)[1]
    done = subprocess.run([sys.executable, '-c', SERVE, str(model), '--port', port], timeout=90,
                          capture_output=True, text=True)
    assert done.returncode == 1 and f'port {port} of 127.0.0.1 is in use' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert call(server[0], '/generate', ok())[0] == 200


def test_sigterm_lets_an_answer_end_and_ctrl_c_stops(model:Path) -> None:
    with served(model) as (url, process), open_stream(url, 40) as s:
        process.send_signal(signal.SIGTERM)
        rest = b''
        while chunk := s.recv(4096): rest += chunk
        assert b'"finish_reason": "length"' in rest
        assert process.wait(30) == 0 and 'stopped' in process.stdout.read()
    with served(model) as (url, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert 'Traceback' not in process.stdout.read()


# Parts

def test_streamed_text_is_whole_characters(loaded) -> None:
    "Any text, cut into bytes-like tokens: pieces add up, and none holds half a character"
    letters, draw = 'aé中🚀👩‍👧\n ß', random.Random(1)
    for _ in range(50):
        text = ''.join(draw.choices(letters, k=draw.randint(1, 30)))
        ids = loaded.tokenizer.encode(text).ids
        stream = TextStream(loaded.tokenizer, loaded.tokenizer.encode('x é ').ids)
        pieces = [stream.push(i, last=n == len(ids) - 1) for n, i in enumerate(ids)]
        assert ''.join(pieces) == text and not any('\ufffd' in p for p in pieces)


@pytest.mark.parametrize('bits', [4, 8])
def test_a_quantised_folder(model:Path, tmp_path:Path, bits:int, monkeypatch:pytest.MonkeyPatch,
                            caplog:pytest.LogCaptureFixture) -> None:
    "Loads as it was stored, counts its weights, says nothing a step; or asks for the package"
    pytest.importorskip('bitsandbytes', reason="needs pip install 'llmnotes[train]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    config = BitsAndBytesConfig(**{f'load_in_{bits}bit': True})
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    small = load_model(tmp_path)
    assert small.parameters == load_model(model).parameters
    assert small.model.get_memory_footprint() < load_model(model).model.get_memory_footprint()
    answer = Generation(small, make_prompt(small, PROMPT, Parameters(max_new_tokens=3)))
    assert len(list(answer)) == 3 and 'MatMul8bitLt' not in caplog.text
    def absent(*_:object, **__:object): raise ImportError('bitsandbytes is not installed')
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', absent)
    with pytest.raises(CannotServe, match='bitsandbytes is not installed .*llmnotes.train'):
        load_model(tmp_path)


def test_truncation_left_in_a_tokenizer_is_not_used(model:Path, tmp_path:Path) -> None:
    "Training may save one; a server that kept it would cut prompts in silence"
    shutil.copytree(model, tmp_path/'m')
    spec = json.loads((tmp_path/'m'/'tokenizer.json').read_text())
    spec['truncation'] = dict(direction='Right', max_length=4, strategy='LongestFirst', stride=0)
    (tmp_path/'m'/'tokenizer.json').write_text(json.dumps(spec))
    assert len(load_model(tmp_path/'m').tokenizer.encode('1234567890').ids) == 10


@pytest.mark.parametrize('flags, words', [
    ({'num_shard': 0}, 'num_shard must be at least 1'), ({'sharded': True, 'num_shard': 1}, 'above 1'),
    ({'quantize': 'int3'}, 'is unknown'), ({'dtype': 'float32'}, 'neither float16'),
    ({'dtype': 'float16', 'quantize': 'awq'}, 'exclude'), ({'quantize': 'exl2', 'num_shard': 2}, 'exl2'),
    ({'max_input_tokens': 1, 'max_input_length': 1}, 'give one'), ({'validation_workers': 0}, 'workers'),
    ({'max_input_tokens': 9, 'max_total_tokens': 9}, 'less than'), ({'gpus': 1}, "no flag 'gpus'"),
    ({'max_total_tokens': 9, 'max_batch_total_tokens': 8}, 'must not exceed')])
def test_launcher_rules(flags:dict, words:str) -> None:
    with pytest.raises(ValueError, match=words): tgi.launcher_command('m', **flags)


def test_commands_for_the_real_servers(monkeypatch:pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    flags = dict(num_shard=2, sharded=True, trust_remote_code=True, cuda_graphs=[1, 2], revision=None)
    words = tgi.launcher_command('a/b', **flags)
    assert words == ['text-generation-launcher', '--model-id', 'a/b', '--num-shard', '2', '--sharded',
                     'true', '--trust-remote-code', '--cuda-graphs', '1,2']
    docker = tgi.docker_command('a/b', **flags)
    assert docker[-len(words) + 1:] == words[1:] and 'HF_TOKEN' in docker
    assert not any('hf_secret' in w for w in docker)
    assert tgi.vllm_command('a/b', num_shard=2)[-2:] == ['--tensor-parallel-size', '2']


# The chat

def typed(monkeypatch:pytest.MonkeyPatch, text:str) -> None:
    import io
    monkeypatch.setattr('sys.stdin', io.StringIO(text))


def test_chat_here_and_there(url:str, model:Path, tmp_path:Path, monkeypatch:pytest.MonkeyPatch,
                             capsys:pytest.CaptureFixture) -> None:
    ws = Workspace(tmp_path/'run')
    with ws.writing('base-model', made_by='36_pretraining') as out:
        (out/'config.json').write_text('{}')
    with ws.writing('instruction-model', made_by='42_lora') as out:
        shutil.copytree(model, out, dirs_exist_ok=True)
    rows = [{'id': n, 'messages': [{'role': 'user', 'content': f'What does `{n}` do?'},
                                   {'role': 'assistant', 'content': f'It {n}s.'}]} for n in 'abcde']
    with ws.writing('instructions', made_by='40_instruction_data') as out:
        (out/'held.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    answers = []
    for where in ([], ['--url', url]):
        typed(monkeypatch, 'What does `sum` do?\n?\n\nexit\nnever\n')
        assert chat_command(['--workspace', str(ws.path), '--max-new-tokens', '10', *where]) == 0
        said = capsys.readouterr().out
        assert 'taught' in said or 'documentation of Python' in said
        assert said.count('\n> ') == 3 and said.count('The documentation: It ') == 2
        assert 'never' not in said.split('\n> ', 1)[1]
        answers.append(said.split('\n> ', 1)[1])
    assert answers[0] == answers[1]


def test_chat_without_a_model(tmp_path:Path, monkeypatch:pytest.MonkeyPatch,
                              capsys:pytest.CaptureFixture) -> None:
    typed(monkeypatch, 'x\n')
    assert chat_command(['--workspace', str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith('llmnotes chat: ')
    with tgi.listen() as s: port = s.getsockname()[1]
    assert chat_command(['--url', f'http://127.0.0.1:{port}']) == 1
    said = capsys.readouterr().err
    assert 'no model answers at' in said and said.count('\n') == 1
    with pytest.raises(SystemExit) as stop: chat_command(['--max-new-tokens', '0'])
    assert stop.value.code == 2
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(CannotServe, match='no folder here and could not be had'):
        load_model('no-such-owner/no-such-model-at-all')
