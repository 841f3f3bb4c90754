"""NF4 beside bitsandbytes on one CPU thread: both directions, three float types, two sizes.

    python benchmarks/nf4.py [--repeats 15] [--quick]

Every repeat lets both libraries take their turn. Seconds are those of the process (CPU time), so
that other programs on the machine count less. The first call, which compiles or reads the compiled
code back, is stated apart.
"""
import argparse
import tempfile
import time
from collections.abc import Callable

import torch
from _table import alternate, markdown, spread, write


def first_call(fresh: bool) -> float:
    "Seconds until a tiny weight has gone both ways, in a new process; the import is not counted"
    import os
    import subprocess
    import sys
    code = ('import time, torch; from llmnotes.finetune.qlora import dequantize_nf4, quantize_nf4; '
            's = time.perf_counter(); dequantize_nf4(quantize_nf4(torch.randn(64))); '
            'print(time.perf_counter() - s)')
    with tempfile.TemporaryDirectory() as tmp:
        env = os.environ | ({'NUMBA_CACHE_DIR': tmp} if fresh else {})
        out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True,
                             check=True)
    return float(out.stdout)


def jobs(w: torch.Tensor) -> dict[str, Callable[[], object]]:
    "Both libraries, both directions; what they give must be equal bit for bit"
    import bitsandbytes.functional as bnb

    from llmnotes.finetune.qlora import dequantize_nf4, quantize_nf4
    packed, (codes, state) = quantize_nf4(w), bnb.quantize_4bit(w, blocksize=64, quant_type='nf4')
    double = quantize_nf4(w, double=True)
    back, out = bnb.dequantize_4bit(codes, state), torch.empty_like(w)
    if not (torch.equal(packed.codes, codes.flatten()) and torch.equal(packed.absmax, state.absmax)
            and torch.equal(dequantize_nf4(packed, w.dtype), back)):
        raise SystemExit(f'{w.dtype} differs from bitsandbytes')
    nested = dict(blocksize=64, quant_type='nf4', compress_statistics=True)
    codes2, state2 = bnb.quantize_4bit(w, **nested)
    return {
        'quantise': lambda: quantize_nf4(w),
        'quantise, bitsandbytes': lambda: bnb.quantize_4bit(w, blocksize=64, quant_type='nf4'),
        'quantise, double': lambda: quantize_nf4(w, double=True),
        'quantise, double, bitsandbytes': lambda: bnb.quantize_4bit(w, **nested),
        'dequantise': lambda: dequantize_nf4(packed, w.dtype),
        'dequantise, bitsandbytes': lambda: bnb.dequantize_4bit(codes, state),
        'dequantise, double': lambda: dequantize_nf4(double, w.dtype),
        'dequantise, double, bitsandbytes': lambda: bnb.dequantize_4bit(codes2, state2),
        'dequantise, out=': lambda: dequantize_nf4(packed, w.dtype, out=out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--quick', action='store_true', help='one small size, one repeat: does it run?')
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(256, 512)] if args.quick else [(4096, 4096), (11_008, 4096)]
    generator, rows, data = torch.Generator().manual_seed(0), [], {}
    for shape in sizes:
        w = torch.randn(shape, generator=generator) / 64
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            todo = jobs(w.to(dtype))
            for job in todo.values(): job()
            slow = 1 if args.quick else max(3, args.repeats // 5)
            repeats = {k: slow if k.startswith('quantise') else args.repeats for k in todo}
            took = {k: spread(t) for k, t in alternate(todo, 1 if args.quick else repeats,
                                                       time.process_time).items()}
            name = f'{shape[0]} x {shape[1]}, {str(dtype).removeprefix("torch.")}'
            data[name] = took
            for what in ('quantise', 'quantise, double', 'dequantise', 'dequantise, double', 'dequantise, out='):
                peer = what.replace(', out=', '') + ', bitsandbytes'
                ours, theirs = took[what], took[peer]
                ms = [f'{1e3 * s[k]:.1f}' for s in (ours, theirs) for k in ('least', 'median')]
                rows.append([name, what, *ms, f"{theirs['least'] / ours['least']:.1f}",
                             f"{theirs['median'] / ours['median']:.1f}"])
    cold, warm = first_call(True), first_call(False)
    data['first_call_s'] = dict(compiled=cold, from_cache=warm)
    head = ['weight', 'job', 'ours, least (ms)', 'median', 'bitsandbytes, least (ms)', 'median',
            'times as fast, least', 'median']
    notes = ('CPU milliseconds of one thread, blocks of 64, in turns. Codes, scales and weights are equal bit for '
             'bit on all of them. `double` quantises the scales too; `out=` fills a matrix that is there already, '
             'against bitsandbytes without it, which refuses `out` on a CPU. The first call takes '
             f'{cold:.1f} s where nothing is compiled yet, and {warm:.2f} s from the cache on disk. Goals: 8 times '
             'for quantising, 3 times for dequantising, float32.')
    write('nf4', 'NF4', [markdown(head, rows)], notes, data, 'bitsandbytes', 'numba', 'torch')


if __name__ == '__main__': main()
