// Convolutions with products of bfloat16 and sums of float: two channels an instruction.
//
// A pair row holds, where a row has a float of an image, the bfloat16 numbers of two channels of it; the weights of an
// output lie in the same pairs. Pairs are of consecutive live channels, so the weights are brought together anew for
// every pixel, from masks of its live channels, and then serve all images.
#pragma once

#include "pairs.h"
#include "rows.h"

namespace {

#if BFLOAT16_PRODUCTS

constexpr int MASK_BITS = 32;  // weights of a vector of bfloat16

// Rounded to nearest, in the low half of each number.
INLINE __m512i rounded(Vector x) {
  return _mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(__builtin_bit_cast(__m512, x))));
}

// For each source pixel and chunk of channels: a bit for every channel of the group that is live in the chunk.
struct ChannelMasks {
  int words;  // of a group
  std::vector<uint32_t> bits;

  ChannelMasks(const Conv& op, int source_pixels) : words((op.src_per_group + MASK_BITS - 1) / MASK_BITS) {
    bits.assign((size_t)source_pixels * op.chunks * words, 0);
    for (int q = 0; q < source_pixels; q++) {
      const int32_t* start = op.src_start + (int64_t)q * (op.chunks + 1);
      for (int chunk = 0; chunk < op.chunks; chunk++)
        for (int e = start[chunk]; e < start[chunk + 1]; e++) {
          const int channel = op.src_channel[e] % op.src_per_group;
          bits[((size_t)q * op.chunks + chunk) * words + channel / MASK_BITS] |= 1u << channel % MASK_BITS;
        }
    }
  }
};

// The rows of source pixels [begin, end) as pair rows, from the first row of each chunk on; an odd channel with zero.
void to_pairs(const Conv& op, const REAL* rows, REAL* pairs, int lanes, int begin, int end) {
  for (int q = begin; q < end; q++) {
    const int32_t* start = op.src_start + (int64_t)q * (op.chunks + 1);
    for (int chunk = 0; chunk < op.chunks; chunk++) {
      const int64_t first = ((int64_t)op.src_base[q] + start[chunk] - start[0]) * lanes;
      const int count = start[chunk + 1] - start[chunk];
      for (int k = 0; k < count; k += 2) {
        const REAL* from = rows + first + (int64_t)k * lanes;
        REAL* to = pairs + first + (int64_t)k / 2 * lanes;
        for (int v = 0; v < lanes; v += WIDTH) {
          const __m512i second = k + 1 < count ? rounded(load(from + lanes + v)) : __m512i{};
          store(to + v, __builtin_bit_cast(Vector, _mm512_or_si512(rounded(load(from + v)), _mm512_slli_epi32(second, 16))));
        }
      }
    }
  }
}

template <int NV>
struct PairTile {
  static constexpr int LANES = NV * WIDTH, MOST = Tile<Vector, NV>::MOST;

  // The pair rows that one tap reads, and its weights.
  struct Segment {
    const REAL* x;
    const uint32_t* masks;
    const uint16_t* weight;
    int pairs;
    bool odd;
  };

  // The weights of one output for all segments, in pairs; room for a vector more.
  static void bring_together(const std::vector<Segment>& segments, int words, int64_t offset, uint16_t* to) {
    for (const Segment& s : segments) {
      for (int word = 0; word < words; word++) {
        const uint32_t mask = s.masks[word];
        if (mask == 0) continue;
        const __m512i all = _mm512_maskz_loadu_epi16(mask, s.weight + offset + word * MASK_BITS);
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(mask, all));
        to += __builtin_popcount(mask);
      }
      if (s.odd) std::memset(to++, 0, sizeof *to);
    }
  }

  // `weights`: of the first output, `stride` pairs before those of the next. `shift`: of the first output, or null.
  template <int N>
  static INLINE void outputs(const std::vector<Segment>& segments, int64_t x_offset, const REAL* weights, int stride, REAL* out, const REAL* shift,
                             bool first) {
    Vector acc[N][NV];
    for (int i = 0; i < N; i++)
      for (int v = 0; v < NV; v++) acc[i][v] = first ? broadcast(shift ? shift[i] : 0) : load(out + i * LANES + v * WIDTH);
    for (const Segment& s : segments) {
      const REAL* x = s.x + x_offset;
      for (int pair = 0; pair < s.pairs; pair++, x += LANES, weights++) {
        Vector xs[NV];
        for (int v = 0; v < NV; v++) xs[v] = load(x + v * WIDTH);
        for (int i = 0; i < N; i++) {
          const Vector weight = broadcast_pair(weights + i * stride);
          for (int v = 0; v < NV; v++) acc[i][v] = plus_products(acc[i][v], weight, xs[v]);
        }
      }
    }
    for (int i = 0; i < N; i++)
      for (int v = 0; v < NV; v++) store(out + i * LANES + v * WIDTH, acc[i][v]);
  }

  template <int N>
  static __attribute__((noinline)) void dispatch(int n, const std::vector<Segment>& segments, int64_t x_offset, const REAL* weights, int stride,
                                                 REAL* out, const REAL* shift, bool first) {
    if constexpr (N > 1) {
      if (n < N) return dispatch<N - 1>(n, segments, x_offset, weights, stride, out, shift, first);
    }
    outputs<N>(segments, x_offset, weights, stride, out, shift, first);
  }

  // Output pixels [begin, end) of all tiles. `op`: neither scaled nor rectified nor pooled; its weights are bfloat16.
  static void conv(const Conv& op, const ChannelMasks& masks, const REAL* pairs, int64_t src_tile, REAL* dst, int64_t dst_tile, int tiles, int begin,
                   int end) {
    const auto* weight = reinterpret_cast<const uint16_t*>(op.weight);
    const int chunks_per_group = op.chunks / op.groups;
    std::vector<Segment> segments;
    std::vector<REAL> weights;
    for (int p = begin; p < end; p++)
      for (int a = op.dst_start[p]; a < op.dst_start[p + 1];) {
        const int group = op.dst_channel[a] / op.dst_per_group, b = group_end(op, a, op.dst_start[p + 1]);
        for (int j = 0; j < chunks_per_group; j++) {
          const int chunk = group * chunks_per_group + j;
          int stride = 0;
          segments.clear();
          for (int t = op.tap_start[p]; t < op.tap_start[p + 1]; t++) {
            const int64_t q = op.tap_pixel[t];
            const int32_t* start = op.src_start + q * (op.chunks + 1);
            const int live = start[chunk + 1] - start[chunk];
            if (live == 0) continue;
            segments.push_back({pairs + (op.src_base[q] + (int64_t)start[chunk] - start[0]) * LANES, masks.bits.data() + (q * op.chunks + chunk) * masks.words,
                                weight + op.tap_index[t] * op.weight_tap, (live + 1) / 2, live % 2 != 0});
            stride += (live + 1) / 2;
          }
          weights.resize(std::max(weights.size(), (size_t)MOST * stride + WIDTH));
          const int blocks = (b - a + MOST - 1) / MOST;
          for (int block = 0, entry = a; block < blocks; block++) {
            const int n = (b - entry) / (blocks - block);  // as even as can be
            for (int i = 0; i < n; i++)
              bring_together(segments, masks.words, op.dst_channel[entry + i] * op.weight_dst, reinterpret_cast<uint16_t*>(weights.data() + (int64_t)i * stride));
            for (int tile = 0; tile < tiles; tile++)
              dispatch<MOST>(n, segments, tile * src_tile, weights.data(), stride,
                             dst + tile * dst_tile + ((int64_t)op.dst_base[p] + entry - op.dst_start[p]) * LANES, op.shift ? op.shift + entry : nullptr, j == 0);
            entry += n;
          }
        }
        a = b;
      }
  }
};

#endif

}  // namespace
