"""Which calls the Apple bench checks, and which it times."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from apple_cases import ALL, TEMPERATURE, Case, Conv, ConvStep, Nce, Scan, ScanStep, Ssd


def grid() -> list[Case]:
    """Short and long, narrow and wide, ragged, packed, every layout, every dtype."""
    lengths = (1, 2, 5, 8, 9, 16, 17, 33, 100, 257, 1030)
    found: list[Case] = [Scan(length=n) for n in lengths]
    found += [Scan(length=n, options=ALL[:-1]) for n in (1, 5, 17, 257)]
    found += [Scan(length=n, state=s, channels=5) for s in (1, 3, 64, 128, 256, 300) for n in (5, 40)]
    found += [Scan(length=n, rows=True, channels=9) for n in (5, 70)]
    found += [Scan(length=n, B=b, C=c) for n in (5, 40) for b, c in (("dn", "dn"), ("dn", 4), (2, "bnl"))]
    found += [Scan(options=o, length=n) for o in ((), ("D",), ("z",), ("delta_softplus",)) for n in (6, 20)]
    found += [Scan(batch=b, channels=d, length=n) for b, d in ((1, 1), (35, 7), (3, 97)) for n in (5, 19)]
    packed = ((6,), (0, 3, 0, 5), (2, 5, 1, 9), (40, 0, 257), (300, 270))
    found += [Scan(batch=1, length=sum(n), lengths=n, channels=3) for n in packed]
    found += [Scan(step=25.0, decay=1e-3), Scan(decay=200.0), Scan(decay=1e-7, length=64)]
    found += [Scan(length=n, compiled=True) for n in (5, 40)]
    found += [Conv(length=n) for n in (1, 2, 3, 4, 5, 31, 32, 257, 1030)]
    found += [Conv(width=w, length=n) for w in (1, 2, 3, 9) for n in (2, 33)]
    found += [Conv(batch=b, channels=d, length=9) for b, d in ((1, 1), (19, 7), (3, 270))]
    found += [Conv(options=(), length=40), Conv(rows=True, channels=40, length=70), Conv(length=40, compiled=True)]
    found += [Conv(batch=1, length=sum(n), lengths=n) for n in packed[:4]]
    found += [Ssd(length=n) for n in (1, 5, 16, 17, 64, 129, 257)]
    found += [Ssd(length=9, state=n, dim=p) for n, p in ((64, 64), (128, 16), (256, 5))]
    found += [Ssd(length=20, heads=6, groups=1), Ssd(length=20, options=()), Ssd(length=20, compiled=True)]
    found += [Ssd(batch=1, length=sum(n), lengths=n) for n in packed[1:4]]
    found += [ScanStep(state=n, channels=6) for n in (1, 3, 16, 128, 256)]
    found += [ScanStep(B=2, C="bn"), ScanStep(batch=19, channels=130), ScanStep(batch=4, pool=9)]
    found += [ConvStep(), ConvStep(width=2, extra=3), ConvStep(batch=19, channels=270), ConvStep(batch=4, pool=9)]
    sizes = ((1, 1, 1), (5, 5, 3), (33, 70, 65), (130, 517, 31), (600, 600, 64))
    found += [Nce(batch=b, keys=m, dim=d, reduction=r) for b, m, d in sizes for r in ("mean", "none")]
    found += [Nce(batch=70, keys=70, dim=16, symmetric=True, mask=m) for m in (None, "dense", 2)]
    found += [Nce(batch=70, keys=90, dim=16, mask=m) for m in ("dense", 2)]
    found += [Nce(batch=64, keys=64, dim=32, temperature=TEMPERATURE, unit=True, compiled=True)]
    for dtype in ("float16", "bfloat16"):
        for weights in ("float32", dtype):
            halves: list[Case] = [Scan(length=n, B=2) for n in (5, 33, 300)] + [Conv(length=33), Ssd(length=70)]
            halves += [Scan(length=5, state=128), ScanStep(), ConvStep()]
            found += [replace(case, dtype=dtype, weights=weights) for case in halves]
        found += [Nce(batch=70, keys=70, dim=16, mask=2, symmetric=True, dtype=dtype)]
    return list(dict.fromkeys(found))


def shapes(tiny: bool) -> list[Case]:
    """The shapes of docs/apple.md, or small ones that go the same ways."""
    model = functools.partial(Scan, rows=True, options=ALL[:-1])
    found: list[Case] = [model(batch=256, channels=1536, length=5, state=128, gradient=g) for g in (False, True)]
    found += [model(batch=8, channels=1536, length=1024, state=16, gradient=g) for g in (False, True)]
    found += [model(batch=1, channels=1536, length=16384, state=16, gradient=g) for g in (False, True)]
    found += [replace(found[i], dtype="bfloat16") for i in (0, 2)]
    found += [ScanStep(batch=256, channels=1536, state=128)]
    conv = functools.partial(Conv, rows=True, options=("bias", "activation"), channels=1536)
    found += [conv(batch=256, length=5), *(conv(batch=8, length=1024, gradient=g) for g in (False, True))]
    found += [ConvStep(batch=256, channels=1536)]
    found += [Nce(batch=4096, keys=4096, dim=768, temperature=TEMPERATURE, unit=True)]
    return [_small(case) for case in found] if tiny else found


def _small(case: Any) -> Case:
    limits = {"batch": 4, "channels": 16, "length": 24, "state": 16, "keys": 4, "dim": 16}
    return replace(case, **{name: min(getattr(case, name), n) for name, n in limits.items() if hasattr(case, name)})
