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

// sums[N][NV vectors] = over tiles and images of g[i][image] * x[image][columns]; with PAIRS an image is two of bfloat16.
template <int N, int NV, bool PAIRS>
INLINE void outer(const REAL* const* g, int64_t g_tile, const REAL* x, int64_t x_tile, int width, int tiles, int lanes, REAL* const* to,
                  const int32_t* column, int count) {
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
  const bool consecutive = column[count - 1] - column[0] == count - 1;
  for (int i = 0; i < N; i++)
    for (int v = 0; v < NV && v * WIDTH < count; v++) {
      const int n = std::min(WIDTH, count - v * WIDTH);
      const int32_t* col = column + v * WIDTH;
      if (consecutive && n == WIDTH) store(to[i] + col[0], load(to[i] + col[0]) + acc[i][v]);
      else for (int k = 0; k < n; k++) to[i][col[k]] += acc[i][v][k];
    }
}

template <int N, int NV, bool PAIRS>
__attribute__((noinline)) void outer_dispatch(int n, const REAL* const* g, int64_t g_tile, const REAL* x, int64_t x_tile, int width, int tiles,
                                              int lanes, REAL* const* to, const int32_t* column, int count) {
  if constexpr (N > 1) {
    if (n < N) return outer_dispatch<N - 1, NV, PAIRS>(n, g, g_tile, x, x_tile, width, tiles, lanes, to, column, count);
  }
  outer<N, NV, PAIRS>(g, g_tile, x, x_tile, width, tiles, lanes, to, column, count);
}

// Outputs [begin, end) of a pixel's entries against all `count` columns.
template <bool PAIRS>
void outer_all(const Conv& op, int begin, int end, const REAL* g, int64_t g_tile, const REAL* x, int64_t x_tile, int width, int tiles, int lanes,
               REAL* grad, const int32_t* column, int count) {
  constexpr int NV = 4, MOST = ACCUMULATORS / NV;
  const int blocks = (end - begin + MOST - 1) / MOST;
  for (int block = 0, entry = begin; block < blocks; block++) {
    const int n = (end - entry) / (blocks - block);
    const REAL* gs[MOST];
    REAL* to[MOST];
    for (int i = 0; i < n; i++) {
      gs[i] = g + (int64_t)(entry + i - begin) * lanes;
      to[i] = grad + op.dst_channel[entry + i] * op.weight_dst;
    }
    for (int k = 0; k < count; k += NV * WIDTH) {
      const int left = std::min(NV * WIDTH, count - k);
#define COLUMNS(vectors) outer_dispatch<MOST, vectors, PAIRS>(n, gs, g_tile, x + k, x_tile, width, tiles, lanes, to, column + k, left)
      switch ((left + WIDTH - 1) / WIDTH) {
        case 1: COLUMNS(1); break;
        case 2: COLUMNS(2); break;
        case 3: COLUMNS(3); break;
        default: COLUMNS(4); break;
      }
#undef COLUMNS
    }
    entry += n;
  }
}

int padded(int count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

}  // namespace
