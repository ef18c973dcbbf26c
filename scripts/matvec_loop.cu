// The inner loop of kernels/matvec.py in CUDA C: what nvcc makes of it is the measure of ours.
// See scripts/gate_nvcc.py. FORMAT and COLUMNS are given on the command line.
#include <cuda_fp16.h>
#include <stdint.h>
typedef uint32_t u32;
typedef int32_t i32;

__device__ float low(u32 w) { return __half2float(__ushort_as_half(w & 0xffff)); }
__device__ float high(u32 w) { return __half2float(__ushort_as_half(w >> 16)); }
__device__ i32 dp(u32 a, u32 b, i32 c) { return __dp4a((int)a, (int)b, c); }
__device__ i32 dpu(u32 a, u32 b, i32 c) {
  i32 d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ i32 dp2(u32 a, u32 b, i32 c) { return __dp2a_lo((int)a, (int)b, c); }
__device__ u32 word(const u32* w, u32 i) { return __ldg(w + i); }
__device__ void four(u32* raw, const u32* w, u32 piece) {
  uint4 v = __ldg((const uint4*)w + piece);
  raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
}
__device__ void pieces(u32* raw, const u32* w, u32 piece, u32 pair) {
  u32 p = piece + 2 * pair;
  four(raw, w, p);
  four(raw + 4, w, p + 1);
}
__device__ void two(u32* raw, const u32* w, u32 at) {
  uint2 v = __ldg((const uint2*)w + (at >> 1));
  raw[0] = v.x, raw[1] = v.y;
}
__device__ u32 half_word(const u32* w, u32 at, u32 i) {
  return word(w, at + (i >> 1)) >> (16 * (i & 1));
}
__device__ u32 byte_of(u32 w, int i) { return (w >> (8 * i)) & 0xff; }
__device__ i32 signed_byte(u32 w, int i) { return (int8_t)(w >> (8 * i)); }
__device__ float half_of(u32 w, int odd) { return odd ? high(w) : low(w); }

__device__ i32 words(const u32* a, const u32* v, i32 n) {
  for (int i = 0; i < 4; i++) n = dp(a[i], v[i], n);
  return n;
}
__device__ i32 codes(u32 a, u32 b, u32 c, u32 d, const u32* v, i32 n) {
  n = dpu(a, v[0], n);
  n = dpu(b, v[1], n);
  n = dpu(c, v[2], n);
  return dpu(d, v[3], n);
}
__device__ i32 nibbles(const u32* a, const u32* v, const u32* w, i32 n) {
  i32 h = 0;
  for (int i = 0; i < 4; i++) {
    n = dpu(a[i] & 0x0f0f0f0f, v[i], n);
    h = dpu(a[i] & 0xf0f0f0f0, w[i], h);
  }
  return n + (h >> 4);
}
__device__ i32 fifths(const u32* a, u32 f, const u32* v, const u32* w, i32 n) {
  const u32 L = 0x0f0f0f0f, H = 0x10101010;
  n = codes((a[0] & L) | (f << 4 & H), (a[1] & L) | (f << 3 & H), (a[2] & L) | (f << 2 & H),
            (a[3] & L) | (f << 1 & H), v, n);
  return codes((a[0] >> 4 & L) | (f & H), (a[1] >> 4 & L) | (f >> 1 & H),
               (a[2] >> 4 & L) | (f >> 2 & H), (a[3] >> 4 & L) | (f >> 3 & H), w, n);
}
__device__ i32 halves(i32 t, i32 h, u32 s, int odd) {
  return t * signed_byte(s, 2 * odd) + h * signed_byte(s, 2 * odd + 1);
}
__device__ u32 six(u32 a, u32 p, int w) {
  u32 h = w == 0 ? p << 4 : w == 1 ? p << 2 : w == 2 ? p : p >> 2;
  return (a & 0x0f0f0f0f) | (h & 0x30303030);
}
__device__ u32 pairs_of(u32 p, int w) { return (p >> (2 * w)) & 0x03030303; }
template <u32 A, u32 B, u32 C, u32 D>
__device__ i32 levels(const u32* a, const u32* v, const u32* w) {
  i32 t = 0, h = 0;
  for (int i = 0; i < 4; i++) {
    u32 seven = a[i] & 0x77777777, side = (a[i] >> 1 & 0x44444444) | 0x32103210;
    u32 x = __byte_perm(__byte_perm(A, B, seven), __byte_perm(C, D, seven), side);
    u32 s = seven >> 16;
    u32 y = __byte_perm(__byte_perm(A, B, s), __byte_perm(C, D, s), side >> 16);
    t = dp(x, v[i], t);
    h = dp(y, w[i], h);
  }
  return t + h;
}

struct At { const u32* w; u32 row, high, scales, supers, places, pair, block; };
#define FETCH __device__ static void fetch(u32* r, const At& a)
#define TOTAL __device__ static i32 total(const u32* r, int o, const u32* v, const u32* w, u32 s)
#define SCALE __device__ static float scale(const u32* r, int o)
#define MINIMUM __device__ static float minimum(const u32* r, int o, int h)
#define NONE MINIMUM { return 0; }

struct Q8_0 {
  enum { WORDS = 17, MINIMA = 0 };
  FETCH { pieces(r, a.w, a.row, a.pair); pieces(r + 8, a.w, a.row + a.places, a.pair);
          r[16] = word(a.w, 4 * a.row + a.scales + a.pair); }
  TOTAL { return words(r + 8 + 4 * o, w, words(r + 4 * o, v, 0)); }
  SCALE { return half_of(r[16], o); }
  NONE
};
struct Q4_0 {
  enum { WORDS = 9, MINIMA = 0 };
  FETCH { pieces(r, a.w, a.row, a.pair); r[8] = word(a.w, 4 * a.row + a.scales + a.pair); }
  TOTAL { return nibbles(r + 4 * o, v, w, dp2(s, 0x0808, 0)); }
  SCALE { return half_of(r[8], o); }
  NONE
};
struct Q4_1 {
  enum { WORDS = 10, MINIMA = 1 };
  FETCH { pieces(r, a.w, a.row, a.pair); two(r + 8, a.w, 4 * a.row + a.scales + 2 * a.pair); }
  TOTAL { return nibbles(r + 4 * o, v, w, 0); }
  SCALE { return low(r[8 + o]); }
  MINIMUM { return -high(r[8 + o]); }
};
struct Q5_0 {
  enum { WORDS = 11, MINIMA = 0 };
  FETCH { pieces(r, a.w, a.row, a.pair); two(r + 8, a.w, 4 * a.row + a.high + 2 * a.pair);
          r[10] = word(a.w, 4 * a.row + a.scales + a.pair); }
  TOTAL { return fifths(r + 4 * o, r[8 + o], v, w, dp2(s, 0x1010, 0)); }
  SCALE { return half_of(r[10], o); }
  NONE
};
struct Q5_1 {
  enum { WORDS = 12, MINIMA = 1 };
  FETCH { pieces(r, a.w, a.row, a.pair); two(r + 8, a.w, 4 * a.row + a.high + 2 * a.pair);
          two(r + 10, a.w, 4 * a.row + a.scales + 2 * a.pair); }
  TOTAL { return fifths(r + 4 * o, r[8 + o], v, w, 0); }
  SCALE { return low(r[10 + o]); }
  MINIMUM { return -high(r[10 + o]); }
};
struct Q4_K {
  enum { WORDS = 10, MINIMA = 1 };
  FETCH { pieces(r, a.w, a.row, a.pair); r[8] = word(a.w, 4 * a.row + a.scales + a.pair);
          r[9] = word(a.w, 4 * a.row + a.supers + (a.block >> 3)); }
  TOTAL { return nibbles(r + 4 * o, v, w, 0) * (i32)byte_of(r[8], 2 * o); }
  SCALE { return low(r[9]); }
  MINIMUM { return high(r[9]) * (i32)byte_of(r[8], 2 * o + 1); }
};
struct Q5_K {
  enum { WORDS = 12, MINIMA = 1 };
  FETCH { pieces(r, a.w, a.row, a.pair); two(r + 8, a.w, 4 * a.row + a.high + 2 * a.pair);
          r[10] = word(a.w, 4 * a.row + a.scales + a.pair);
          r[11] = word(a.w, 4 * a.row + a.supers + (a.block >> 3)); }
  TOTAL { return fifths(r + 4 * o, r[8 + o], v, w, 0) * (i32)byte_of(r[10], 2 * o); }
  SCALE { return low(r[11]); }
  MINIMUM { return high(r[11]) * (i32)byte_of(r[10], 2 * o + 1); }
};
struct Q6_K {
  enum { WORDS = 14, MINIMA = 0 };
  FETCH { pieces(r, a.w, a.row, a.pair); four(r + 8, a.w, a.row + (a.high >> 2) + a.pair);
          r[12] = word(a.w, 4 * a.row + a.scales + a.pair);
          r[13] = half_word(a.w, 4 * a.row + a.supers, a.block >> 3); }
  TOTAL {
    const u32* c = r + 4 * o;
    u32 f = r[8 + 2 * o], g = r[9 + 2 * o];
    i32 t = codes(six(c[0], f, 0), six(c[1], f, 1), six(c[2], f, 2), six(c[3], f, 3), v,
                  dp2(s, 0x0020, 0));
    i32 h = codes(six(c[0] >> 4, g, 0), six(c[1] >> 4, g, 1), six(c[2] >> 4, g, 2),
                  six(c[3] >> 4, g, 3), w, dp2(s, 0x2000, 0));
    return halves(t, h, r[12], o);
  }
  SCALE { return low(r[13]); }
  NONE
};
struct Q3_K {
  enum { WORDS = 8, MINIMA = 0 };
  FETCH { four(r, a.w, a.row + a.pair); two(r + 4, a.w, 4 * a.row + a.high + 2 * a.pair);
          r[6] = word(a.w, 4 * a.row + a.scales + a.pair);
          r[7] = half_word(a.w, 4 * a.row + a.supers, a.block >> 3); }
  TOTAL {
    const u32 M = 0x04040404;
    u32 f = r[2 * o], g = r[2 * o + 1], b = r[4 + o];
    i32 t = codes(pairs_of(f, 0) | (b << 2 & M), pairs_of(f, 1) | (b << 1 & M),
                  pairs_of(f, 2) | (b & M), pairs_of(f, 3) | (b >> 1 & M), v, dp2(s, 0x0004, 0));
    i32 h = codes(pairs_of(g, 0) | (b >> 2 & M), pairs_of(g, 1) | (b >> 3 & M),
                  pairs_of(g, 2) | (b >> 4 & M), pairs_of(g, 3) | (b >> 5 & M), w,
                  dp2(s, 0x0400, 0));
    return halves(t, h, r[6], o);
  }
  SCALE { return low(r[7]); }
  NONE
};
struct Q2_K {
  enum { WORDS = 6, MINIMA = 2 };
  FETCH { four(r, a.w, a.row + a.pair); r[4] = word(a.w, 4 * a.row + a.scales + a.pair);
          r[5] = word(a.w, 4 * a.row + a.supers + (a.block >> 3)); }
  TOTAL {
    u32 f = r[2 * o], g = r[2 * o + 1];
    i32 t = codes(pairs_of(f, 0), pairs_of(f, 1), pairs_of(f, 2), pairs_of(f, 3), v, 0);
    i32 h = codes(pairs_of(g, 0), pairs_of(g, 1), pairs_of(g, 2), pairs_of(g, 3), w, 0);
    return t * (i32)(byte_of(r[4], 2 * o) & 15) + h * (i32)(byte_of(r[4], 2 * o + 1) & 15);
  }
  SCALE { return low(r[5]); }
  MINIMUM { return high(r[5]) * (i32)(byte_of(r[4], 2 * o + h) >> 4); }
};
#define IQ4 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u
#define E2M1 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu
struct IQ4_NL : Q4_0 {
  TOTAL { return levels<IQ4>(r + 4 * o, v, w); }
};
struct IQ4_XS {
  enum { WORDS = 10, MINIMA = 0 };
  FETCH { pieces(r, a.w, a.row, a.pair);
          r[8] = half_word(a.w, 4 * a.row + a.scales, a.pair);
          r[9] = half_word(a.w, 4 * a.row + a.supers, a.block >> 3); }
  TOTAL { return levels<IQ4>(r + 4 * o, v, w) * signed_byte(r[8], o); }
  SCALE { return low(r[9]); }
  NONE
};
struct MXFP4 {
  enum { WORDS = 9, MINIMA = 0 };
  FETCH { pieces(r, a.w, a.row, a.pair); r[8] = half_word(a.w, 4 * a.row + a.scales, a.pair); }
  TOTAL { return levels<E2M1>(r + 4 * o, v, w); }
  SCALE { u32 e = byte_of(r[8], o); return __uint_as_float(e > 1 ? (e - 1) << 23 : 0x200000u << e); }
  NONE
};

template <class F>
__device__ float add(const u32* r, int o, const u32* v, const u32* w, float xs, u32 s, float acc) {
  acc = __fmaf_rn(F::scale(r, o) * F::total(r, o, v, w, s), xs, acc);
  if (F::MINIMA == 1) acc = __fmaf_rn(F::minimum(r, o, 0), xs * dp2(s, 0x0101, 0), acc);
  if (F::MINIMA == 2) {
    acc = __fmaf_rn(F::minimum(r, o, 0), xs * dp2(s, 0x0001, 0), acc);
    acc = __fmaf_rn(F::minimum(r, o, 1), xs * dp2(s, 0x0100, 0), acc);
  }
  return acc;
}

typedef FORMAT Form;
#define ROWS (COLUMNS > 1 || Form::WORDS > 12 ? 2 : 4)

extern "C" __global__ void __launch_bounds__(128, COLUMNS == 8 ? 3 : 4)
matvec(const u32* even, const u32* odd, const u32* x, float* out, u32 row_pieces, u32 high,
       u32 scales, u32 supers, u32 stretches, u32 pairs, u32 shift) {
  float acc[ROWS * COLUMNS];
  u32 row[ROWS], base[COLUMNS], raw[ROWS * Form::WORDS];
  u32 lane = threadIdx.x & 31, stretch = lane & ((1u << shift) - 1);
  u32 places = 2 * stretches * pairs, first = blockIdx.x * 128 + threadIdx.x;
  for (int c = 0; c < COLUMNS; c++) base[c] = c * (places >> 1) * 5;
  for (int r = 0; r < ROWS; r++) row[r] = (first + r) * row_pieces;
  for (int n = 0; n < ROWS * COLUMNS; n++) acc[n] = 0;
  u32 pair = stretch, block = 2 * pairs * stretch, end = stretch < stretches ? stretches * pairs : 0;
#pragma unroll 1
  while (pair < end) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      Form::fetch(raw + r * Form::WORDS,
                  At{r & 1 ? odd : even, row[r], high, scales, supers, places, pair, block});
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const uint4* at = (const uint4*)x;
      u32 p = base[c] + 2 * pair;
      uint4 a4 = at[p], b4 = at[p + 1], v4 = at[p + places], w4 = at[p + places + 1];
      uint4 m = at[base[c] + 2 * places + pair];
      u32 a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
      u32 v[4] = {v4.x, v4.y, v4.z, v4.w}, w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int n = r * COLUMNS + c;
        acc[n] = add<Form>(raw + r * Form::WORDS, 0, a, v, __uint_as_float(m.x), m.y, acc[n]);
        acc[n] = add<Form>(raw + r * Form::WORDS, 1, b, w, __uint_as_float(m.z), m.w, acc[n]);
      }
    }
    pair += stretches;
    block += 2;
  }
  for (int n = 0; n < ROWS * COLUMNS; n++) out[n * 4096 + first] = acc[n];
}
