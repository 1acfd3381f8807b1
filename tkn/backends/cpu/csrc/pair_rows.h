// Rows of pairs for a plan's convolutions: two channels, or two neighbouring pixels, that its weights are paired for too.
#pragma once

#include "nonlinear.h"
#include "pairs.h"

extern "C" {

// Rows into rows of pairs of bfloat16: function(scale[i] * in[row[i]] + shift[i]) of an entry's two children i, rounded to bfloat16.
struct Pairing {
  int32_t pixels;            // of the output
  const int32_t* out_start;  // [pixels + 1] first output entry of each pixel
  const int32_t* out_base;   // [pixels] first row of each pixel
  const int32_t* row;        // [entries][2], -1: zero
  const REAL *scale, *shift;  // [entries][2] or null: 1, 0
  Function function;
};

}  // extern "C"

#if BFLOAT16_PRODUCTS

namespace {

template <class V, int NV>
void pair_rows(const Pairing& op, const REAL* src, REAL* dst, int begin, int end) {
  constexpr int SIZE = sizeof(V) / sizeof(REAL), LANES = NV * SIZE;
  for (int p = begin; p < end; p++) {
    REAL* out = dst + (int64_t)op.out_base[p] * LANES;
    for (int f = op.out_start[p]; f < op.out_start[p + 1]; f++, out += LANES)
      for (int v = 0; v < NV; v++) {
        V pair[2];
        for (int k = 0; k < 2; k++) {
          const int i = 2 * f + k;
          if (op.row[i] < 0) {
            pair[k] = V{};
            continue;
          }
          V x = load<V>(src + (int64_t)op.row[i] * LANES + v * SIZE);
          if (op.scale) x = x * broadcast<V>(op.scale[i]) + broadcast<V>(op.shift[i]);
          pair[k] = value_of(op.function, x);
        }
        store(out + v * SIZE, paired(pair[0], pair[1]));
      }
  }
}

}  // namespace

#endif
