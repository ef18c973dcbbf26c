"""RMS norm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * w, parallel over rows."""

from __future__ import annotations

from . import simd as s
from .rows import inverse_rms, share


def build_rms_norm():
    """By row of n float32; without weights where the address `w` is 0."""

    def rms_norm(x, w, out, live, n, x_stride, out_stride, eps, thread, n_threads):
        rows = s.load_i64(live)
        first, last = share(rows, thread, n_threads)
        whole = n // 16 * 16
        for row in range(first, last):
            source = x + row * x_stride * 4
            target = out + row * out_stride * 4
            factor = s.splat(inverse_rms(source, n, s.float_of(eps)))
            for i in range(0, whole, 16):
                value = s.load(source + i * 4) * factor
                if w != 0:
                    value = value * s.load(w + i * 4)
                s.store(target + i * 4, value)
            if whole < n:
                value = s.load_part(source + whole * 4, n - whole, s.f32(0)) * factor
                if w != 0:
                    value = value * s.load_part(w + whole * 4, n - whole, s.f32(0))
                s.store_part(target + whole * 4, value, n - whole)

    return rms_norm
