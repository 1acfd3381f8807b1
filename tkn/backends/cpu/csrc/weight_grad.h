// The weight gradient inside ROIs: grad[o][t][c] = sum over pixels and images of grad_z[p, o] * x[p + t, c].
#pragma once

#include "bfloat16.h"

namespace {

// Rows [count][lanes] to columns [lanes][width], width >= count, the rest zero; by blocks of so many lanes.
template <int BLOCK_LANES>
void transpose_blocks(const REAL* const* rows, int count, int lanes, REAL* columns, int width) {
  for (int k0 = 0; k0 < width; k0 += WIDTH)
    for (int b0 = 0; b0 < lanes; b0 += BLOCK_LANES) {
      const int n = std::min(WIDTH, count - k0);
      REAL block[WIDTH][BLOCK_LANES];
      for (int k = 0; k < n; k++) std::memcpy(block[k], rows[k0 + k] + b0, sizeof block[k]);
      for (int k = std::max(0, n); k < WIDTH; k++) std::memset(block[k], 0, sizeof block[k]);
      for (int b = 0; b < BLOCK_LANES; b++) {
        REAL* out = columns + (int64_t)(b0 + b) * width + k0;
        for (int k = 0; k < WIDTH; k++) out[k] = block[k][b];
      }
    }
}

void transpose(const REAL* const* rows, int count, int lanes, REAL* columns, int width) {
  // Half a vector: one vector of images in pairs.
  (lanes % WIDTH == 0 ? transpose_blocks<WIDTH> : transpose_blocks<WIDTH / 2>)(rows, count, lanes, columns, width);
}

// sums + factor * x, of numbers or of pairs of bfloat16 in their place.
template <bool PAIRS, int NV>
INLINE void multiply_add(Vector* sums, const REAL* factor, const Vector* x) {
#if BFLOAT16_PRODUCTS
  if constexpr (PAIRS) {
    const Vector f = broadcast_pair(factor);
    for (int v = 0; v < NV; v++) sums[v] = plus_products(sums[v], f, x[v]);
    return;
  }
#endif
  const Vector f = broadcast(*factor);
  for (int v = 0; v < NV; v++) sums[v] += f * x[v];
}

// Where numbers of a vector of columns belong in a row of the gradient: those in `from` at the places in `to`, counted from
// `first` on.
struct SpreadPart {
  int32_t first;
  uint32_t from, to;
};
constexpr uint32_t ALL_PLACES = (1u << WIDTH) - 1;

// The places of columns, vector by vector, in as few parts as reach over a vector each.
struct Spread {
  std::vector<SpreadPart> places;
  std::vector<int32_t> start{0};  // [vectors + 1]

  void clear() {
    places.clear();
    start.resize(1);
  }

  // Columns, ascending, that begin a vector of their own.
  void add(const int32_t* column, int count) {
    for (int k = 0; k < count; k += WIDTH) {
      for (int i = k, end = std::min(count, k + WIDTH); i < end;) {
        SpreadPart part = {column[i], 0, 0};
        for (; i < end && column[i] - part.first < WIDTH; i++) {
          part.from |= 1u << (i - k);
          part.to |= 1u << (column[i] - part.first);
        }
        places.push_back(part);
      }
      start.push_back(places.size());
    }
  }
};

// Adds numbers of x where they belong.
INLINE void add_at(REAL* row, const SpreadPart& part, Vector x) {
  REAL* to = row + part.first;
  if (part.from == ALL_PLACES && part.to == ALL_PLACES) return store(to, load(to) + x);
#if defined(__AVX512F__)
  if constexpr (sizeof(REAL) == 4) {
    const __m512 spread = _mm512_maskz_expand_ps(part.to, _mm512_maskz_compress_ps(part.from, __builtin_bit_cast(__m512, x)));
    return _mm512_mask_storeu_ps(to, part.to, _mm512_add_ps(_mm512_maskz_loadu_ps(part.to, to), spread));
  } else {
    const __m512d spread = _mm512_maskz_expand_pd(part.to, _mm512_maskz_compress_pd(part.from, __builtin_bit_cast(__m512d, x)));
    return _mm512_mask_storeu_pd(to, part.to, _mm512_add_pd(_mm512_maskz_loadu_pd(part.to, to), spread));
  }
#else
  for (uint32_t from = part.from, places = part.to; from != 0; from &= from - 1, places &= places - 1)
    to[__builtin_ctz(places)] += x[__builtin_ctz(from)];
#endif
}

// sums[N][NV vectors] = over tiles and images of g[i][image] * x[image][columns]; with PAIRS an image is two of bfloat16.
template <int N, int NV, bool PAIRS>
INLINE void outer(const REAL* const* g, int64_t g_tile, const REAL* x, int64_t x_tile, int width, int tiles, int lanes, REAL* const* to,
                  const Spread& spread, int vector) {
  Vector acc[N][NV] = {};
  for (int tile = 0; tile < tiles; tile++) {
    const REAL* row = x + tile * x_tile;
    const REAL* gs[N];
    for (int i = 0; i < N; i++) gs[i] = g[i] + tile * g_tile;
    for (int b = 0; b < lanes; b++, row += width) {
      Vector xs[NV];
      for (int v = 0; v < NV; v++) xs[v] = load(row + v * WIDTH);
      for (int i = 0; i < N; i++) multiply_add<PAIRS, NV>(acc[i], gs[i] + b, xs);
    }
  }
  for (int v = 0; v < NV; v++)
    for (int part = spread.start[vector + v]; part < spread.start[vector + v + 1]; part++)
      for (int i = 0; i < N; i++) add_at(to[i], spread.places[part], acc[i][v]);
}

template <int N, int NV, bool PAIRS>
__attribute__((noinline)) void outer_dispatch(int n, const REAL* const* g, int64_t g_tile, const REAL* x, int64_t x_tile, int width, int tiles,
                                              int lanes, REAL* const* to, const Spread& spread, int vector) {
  if constexpr (N > 1) {
    if (n < N) return outer_dispatch<N - 1, NV, PAIRS>(n, g, g_tile, x, x_tile, width, tiles, lanes, to, spread, vector);
  }
  outer<N, NV, PAIRS>(g, g_tile, x, x_tile, width, tiles, lanes, to, spread, vector);
}

// Outputs [begin, end) of a pixel's entries against all columns of `vectors`, the first of `spread` from `vector` on.
template <bool PAIRS>
void outer_all(const Conv& op, int begin, int end, const REAL* g, int64_t g_tile, const REAL* x, int64_t x_tile, int width, int tiles, int lanes,
               REAL* grad, const Spread& spread, int vector, int vectors) {
  constexpr int MOST = std::min(ACCUMULATORS, 12);  // outputs at once, of one vector of columns
  const int panels = (vectors + 3) / 4;
  const REAL* gs[MOST];
  REAL* to[MOST];
  for (int panel = 0; panel < panels; panel++) {
    const int first = panel * vectors / panels, here = (panel + 1) * vectors / panels - first;
    const int most = std::min(MOST, ACCUMULATORS / here), blocks = (end - begin + most - 1) / most;
    for (int block = 0, entry = begin; block < blocks; block++) {
      const int n = (end - entry) / (blocks - block);
      for (int i = 0; i < n; i++) {
        gs[i] = g + (int64_t)(entry + i - begin) * lanes;
        to[i] = grad + op.dst_channel[entry + i] * op.weight_dst;
      }
#define COLUMNS(vectors) \
  outer_dispatch<std::min(MOST, ACCUMULATORS / vectors), vectors, PAIRS>(n, gs, g_tile, x + first * WIDTH, x_tile, width, tiles, lanes, to, spread, vector + first)
      switch (here) {
        case 1: COLUMNS(1); break;
        case 2: COLUMNS(2); break;
        case 3: COLUMNS(3); break;
        default: COLUMNS(4); break;
      }
#undef COLUMNS
      entry += n;
    }
  }
}

int padded(int count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

}  // namespace
