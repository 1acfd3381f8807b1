// Small batches of narrow maps: maps of one image, the channels of a pixel side by side, vectorised over the channels.
//
// A map's pixels are a multiple of the vector's width apart, unless its channels are few; the numbers beyond the channels
// are zero, and so is a border of as many pixels as the convolutions that read it pad. Outside of the ROIs a map holds
// what it is there, written once. Results may go to maps in any order: see planes.h.
#pragma once

#include "nonlinear.h"
#include "pairs.h"

extern "C" {

// Combines convolved pixels into one of the output; without pooling it has one child.
struct MapPool {
  int32_t kind;        // MAP_MAX or MAP_SUM
  Function function;   // of each child
  double factor;       // of the sum
};
enum MapPooling { MAP_MAX = 1, MAP_SUM = 2, MAP_PRODUCT = 3 };

// Outputs that share their pixels make a set. Sums in vectors over the input's channels.
struct MapConv {
  int32_t sets;
  const int32_t* set_start;    // [sets + 1] into channel
  const int32_t* channel;      // output channels
  const int32_t* pixel_start;  // [sets + 1] into source
  const int32_t* source;       // where in the source map each convolved pixel's taps begin
  const int64_t* value_start;  // [sets] into scale and shift
  const REAL *scale, *shift;   // of a set: [channels][pixels]
  const int32_t* out_start;    // [sets + 1] into out
  const int32_t* out;          // where in the output map each pixel begins
  int64_t out_channel;         // numbers between its channels
  const int32_t* child_start;  // [outs + 1]
  const int32_t* child;        // which of the set's pixels an output pixel combines
  const int32_t* missing;      // [outs] how many pixels of its window lie outside of the ROI
  const REAL* outside;         // [output channels] the value there
  const int32_t *run_first, *runs;  // [sets] what their pixels' taps read: the first run, and how many
  const int32_t *run_offset, *run_length, *run_weight;  // [all runs] in the map, in whole vectors, among an output's weights
  const REAL* weight;          // [output channels][weights]
  int64_t weight_dst;
  MapPool pool;
};

// A convolution of few input channels: sums in vectors over the output channels; those that lie in no ROI at a pixel are
// skipped.
struct MapFirst {
  int32_t pixels;              // of the output
  const int32_t* out;          // [pixels] where each begins
  int32_t channels;            // of the output
  int64_t out_channel;         // numbers between them
  const int32_t* child_start;  // [pixels + 1] convolved pixels that it combines
  const int32_t* source;       // [children] where in the source map each child's taps begin
  const int32_t* chunk_start;  // [pixels + 1]
  const int32_t* chunk;        // vectors of channels that live there
  const REAL *scale, *shift;   // [children][width]; scale 0: outside of the ROI
  int32_t width;               // output channels, rounded up to vectors
  int32_t taps;
  const int32_t* tap_offset;   // [taps]
  const REAL* weight;          // [width / vector][taps][vector]
  MapPool pool;
};

// Channels of several maps side by side, or their sum or product; scaled, shifted and pooled.
struct MapGather {
  int32_t pixels;
  const int32_t* out;          // [pixels] where each begins
  int32_t parts;
  const int32_t *channels, *step, *first;  // [parts] how many channels, numbers between them, and the first of the output
  int64_t out_channel;         // numbers between the output's channels
  const int32_t* child_start;  // [pixels + 1]
  const int32_t* child;        // [parts][children] where in the part's map a child begins
  int32_t children;
  const REAL* weight;          // [children] or null: 1
  const REAL *scale, *shift;   // [channels of all parts] or null
  int32_t combined;            // MAP_SUM or MAP_PRODUCT of the parts; 0: they lie side by side
  MapPool pool;
};

// Single numbers of a map, side by side.
struct MapPick {
  int32_t count;
  const int32_t* source;
};

// A map as pairs of bfloat16 of neighbouring channels: each takes the place of a number.
struct MapPairing {
  int32_t columns;
  int64_t line, pixel;            // of the map: numbers between lines and pixels
  int64_t pair_line, pair_pixel;  // of the pairs
};

// Between a map and a dense [C, H, W].
struct MapDense {
  int32_t channels, height, width;
  int64_t channel, line, pixel;  // of the map: numbers between channels, lines and pixels
};

}  // extern "C"

namespace {

template <bool PAIRS, int N, int P>
INLINE void map_tile(const MapConv& op, int set, const REAL* src, const int32_t* pixel, const int32_t* channel, REAL* result, int stride) {
  Vector acc[N][P] = {};
  const REAL* w[N];
  const REAL* x[P];
  for (int i = 0; i < N; i++) w[i] = op.weight + channel[i] * op.weight_dst;
  for (int j = 0; j < P; j++) x[j] = src + pixel[j];
  for (int r = op.run_first[set]; r < op.run_first[set] + op.runs[set]; r++) {
    const int64_t offset = op.run_offset[r], length = op.run_length[r], done = op.run_weight[r];
    for (int64_t k = 0; k < length; k += WIDTH) {
      Vector ws[N];
      for (int i = 0; i < N; i++) ws[i] = load(w[i] + done + k);
      for (int j = 0; j < P; j++) {
        Vector xs = load(x[j] + offset + k);
        if (N > 1) keep(xs);
        for (int i = 0; i < N; i++) {
#if BFLOAT16_PRODUCTS
          if constexpr (PAIRS) acc[i][j] = plus_products(acc[i][j], ws[i], xs);
          else
#endif
            acc[i][j] += ws[i] * xs;
        }
      }
    }
  }
  for (int i = 0; i < N; i++)
    for (int j = 0; j < P; j++) result[i * stride + j] = sum(acc[i][j]);
}

template <bool PAIRS, int N, int P>
__attribute__((noinline)) void map_dispatch(int p, const MapConv& op, int set, const REAL* src, const int32_t* pixel, const int32_t* channel, REAL* result,
                                            int stride) {
  if constexpr (P > 1) {
    if (p < P) return map_dispatch<PAIRS, N, P - 1>(p, op, set, src, pixel, channel, result, stride);
  }
  map_tile<PAIRS, N, P>(op, set, src, pixel, channel, result, stride);
}

// N outputs at all pixels of a set: results [N][pixels].
template <bool PAIRS, int N>
void map_outputs(const MapConv& op, int set, const REAL* src, const int32_t* pixel, int pixels, const int32_t* channel, REAL* result) {
  constexpr int MOST = ACCUMULATORS / N < 12 ? ACCUMULATORS / N : 12;
  const int blocks = (pixels + MOST - 1) / MOST;
  for (int block = 0, done = 0; block < blocks; block++) {
    const int n = (pixels - done) / (blocks - block);
    map_dispatch<PAIRS, N, MOST>(n, op, set, src, pixel + done, channel, result + done, pixels);
    done += n;
  }
}

// PAIRS: of bfloat16, the map's and the weights.
template <bool PAIRS>
void map_conv(const MapConv& op, const REAL* src, REAL* dst, int begin, int end) {
  static thread_local std::vector<REAL> scratch;
  for (int set = begin; set < end; set++) {
    const int channels = op.set_start[set + 1] - op.set_start[set], pixels = op.pixel_start[set + 1] - op.pixel_start[set];
    const int32_t *channel = op.channel + op.set_start[set], *pixel = op.source + op.pixel_start[set];
    scratch.resize(std::max(scratch.size(), (size_t)channels * pixels));
    REAL* y = scratch.data();
    // All pixels at once rather than many outputs: then each weight is read once.
    const int most = pixels > ACCUMULATORS / 4 ? 2 : pixels > ACCUMULATORS / 8 ? 4 : 8;
    for (int i = 0; i < channels;) {
      const int left = std::min(channels - i, most);
      if (left >= 8) map_outputs<PAIRS, 8>(op, set, src, pixel, pixels, channel + i, y + (int64_t)i * pixels), i += 8;
      else if (left >= 4) map_outputs<PAIRS, 4>(op, set, src, pixel, pixels, channel + i, y + (int64_t)i * pixels), i += 4;
      else if (left >= 2) map_outputs<PAIRS, 2>(op, set, src, pixel, pixels, channel + i, y + (int64_t)i * pixels), i += 2;
      else map_outputs<PAIRS, 1>(op, set, src, pixel, pixels, channel + i, y + (int64_t)i * pixels), i += 1;
    }
    const REAL *scale = op.scale + op.value_start[set], *shift = op.shift + op.value_start[set];
    const bool rectified = op.pool.function.kind == RELU;
    for (int64_t k = 0; k < (int64_t)channels * pixels; k++) {
      const REAL value = y[k] * scale[k] + shift[k];
      y[k] = rectified && value < 0 ? 0 : value;
    }
    if (op.pool.function.kind > RELU) apply(op.pool.function, y, (int64_t)channels * pixels);
    for (int f = op.out_start[set]; f < op.out_start[set + 1]; f++) {
      REAL* out = dst + op.out[f];
      const int c0 = op.child_start[f], c1 = op.child_start[f + 1];
      for (int i = 0; i < channels; i++) {
        REAL& to = out[channel[i] * op.out_channel];
        const REAL *row = y + (int64_t)i * pixels, outside = op.outside[channel[i]];
        if (op.pool.kind == MAP_MAX) {
          REAL best = op.missing[f] ? outside : row[op.child[c0]];
          for (int c = c0; c < c1; c++) {
            const REAL value = row[op.child[c]];
            best = value > best || value != value ? value : best;
          }
          to = best;
        } else {
          REAL total = op.missing[f] * outside;
          for (int c = c0; c < c1; c++) total += row[op.child[c]];
          to = total * (REAL)op.pool.factor;
        }
      }
    }
  }
}

#if BFLOAT16_PRODUCTS

// Lines [begin, end).
void map_pairs(const MapPairing& op, const REAL* src, REAL* dst, int begin, int end) {
  for (int y = begin; y < end; y++)
    for (int x = 0; x < op.columns; x++) {
      const REAL* from = src + y * op.line + x * op.pixel;
      REAL* to = dst + y * op.pair_line + x * op.pair_pixel;
      for (int k = 0; k < op.pair_pixel; k += WIDTH) {
        const Vector second = 2 * k + WIDTH < op.pixel ? load(from + 2 * k + WIDTH) : Vector{};
        store(to + k, rounded(load(from + 2 * k), second));
      }
    }
}

#endif

// N vectors of channels of C convolved pixels from `child` on: combined with `result` unless they are the first.
template <int N, int C>
INLINE void map_first_children(const MapFirst& op, const REAL* src, int child, const int32_t* chunk, const REAL* const* w, Vector* result, bool first) {
  Vector acc[N][C] = {};
  const REAL* x[C];
  for (int c = 0; c < C; c++) x[c] = src + op.source[child + c];
  for (int t = 0; t < op.taps; t++) {
    Vector ws[N];
    for (int i = 0; i < N; i++) ws[i] = load(w[i] + t * WIDTH);
    for (int c = 0; c < C; c++) {
      const Vector value = broadcast(x[c][op.tap_offset[t]]);
      for (int i = 0; i < N; i++) acc[i][c] += value * ws[i];
    }
  }
  for (int c = 0; c < C; c++)
    for (int i = 0; i < N; i++) {
      const int64_t at = (int64_t)(child + c) * op.width + chunk[i] * WIDTH;
      const Vector scale = load(op.scale + at), shift = load(op.shift + at);
      Vector y = acc[i][c] * scale + shift;
      y = scale == Vector{} ? shift : y;
      y = value_of(op.pool.function, y);
      if (first && c == 0) result[i] = y;
      else result[i] = op.pool.kind == MAP_MAX ? maximum(result[i], y) : result[i] + y;
    }
}

template <int N>
void map_first_chunks(const MapFirst& op, const REAL* src, REAL* out, int pixel, const int32_t* chunk) {
  Vector result[N] = {};
  const REAL* w[N];
  for (int i = 0; i < N; i++) w[i] = op.weight + (int64_t)chunk[i] * op.taps * WIDTH;
  const int begin = op.child_start[pixel], end = op.child_start[pixel + 1];
  int c = begin;
  for (; c + 2 <= end; c += 2) map_first_children<N, 2>(op, src, c, chunk, w, result, c == begin);
  for (; c < end; c++) map_first_children<N, 1>(op, src, c, chunk, w, result, c == begin);
  const Vector factor = broadcast((REAL)op.pool.factor);
  for (int i = 0; i < N; i++) {
    const Vector y = op.pool.kind == MAP_MAX ? result[i] : result[i] * factor;
    const int first = chunk[i] * WIDTH, count = std::min(WIDTH, op.channels - first);
    store_strided(out + first * op.out_channel, op.out_channel, y, count);
  }
}

void map_first(const MapFirst& op, const REAL* src, REAL* dst, int begin, int end) {
  for (int p = begin; p < end; p++) {
    REAL* out = dst + op.out[p];
    const int32_t *chunk = op.chunk + op.chunk_start[p], *last = op.chunk + op.chunk_start[p + 1];
    while (last - chunk >= 4) map_first_chunks<4>(op, src, out, p, chunk), chunk += 4;
    while (last - chunk >= 1) map_first_chunks<1>(op, src, out, p, chunk), chunk += 1;
  }
}

// `count` channels from the k-th on, which are `step` numbers apart.
INLINE void map_gather_channels(const MapGather& op, const REAL* src, REAL* out, const int32_t* child, int p, int k, int step, int count,
                                const REAL* scale, const REAL* shift, int combined) {
  Vector result = {};
  for (int c = op.child_start[p]; c < op.child_start[p + 1]; c++) {
    Vector x = load_strided(src + child[c] + (int64_t)k * step, step, count);
    if (scale) x = x * load(scale + k) + load(shift + k);
    x = value_of(op.pool.function, x);
    if (op.weight) x = x * op.weight[c];
    if (c == op.child_start[p]) result = x;
    else if (op.pool.kind == MAP_SUM) result = result + x;
    else result = maximum(result, x);
  }
  if (op.pool.kind == MAP_SUM) result = result * (REAL)op.pool.factor;
  if (op.out_channel == 1) {
    if (combined == MAP_SUM) result += load(out + k);
    if (combined == MAP_PRODUCT) result *= load(out + k);
    store_first(out + k, result, count);
    return;
  }
  for (int i = 0; i < count; i++) {
    REAL& to = out[(k + i) * op.out_channel];
    to = combined == MAP_SUM ? to + result[i] : combined == MAP_PRODUCT ? to * result[i] : result[i];
  }
}

void map_gather(const MapGather& op, const REAL* src, REAL* dst, int begin, int end) {
  for (int p = begin; p < end; p++) {
    int before = 0;  // channels of the parts so far
    for (int part = 0; part < op.parts; part++) {
      const int channels = op.channels[part];
      const int32_t* child = op.child + (int64_t)part * op.children;
      REAL* out = dst + op.out[p] + op.first[part] * op.out_channel;
      const REAL *scale = op.scale ? op.scale + before : nullptr, *shift = op.scale ? op.shift + before : nullptr;
      for (int k = 0; k < channels; k += WIDTH)
        map_gather_channels(op, src, out, child, p, k, op.step[part], std::min(WIDTH, channels - k), scale, shift, part > 0 ? op.combined : 0);
      before += channels;
    }
  }
}

void map_pick(const MapPick& op, const REAL* src, REAL* dst, int begin, int end) {
  for (int i = begin; i < end; i++) dst[i] = src[op.source[i]];
}

// Lines [begin, end) of all channels.
void map_pack(const MapDense& d, const REAL* x, REAL* map, int begin, int end) {
  for (int c = 0; c < d.channels; c++)
    for (int y = begin; y < end; y++) {
      const REAL* from = x + ((int64_t)c * d.height + y) * d.width;
      REAL* to = map + c * d.channel + y * d.line;
      if (d.pixel == 1) std::memcpy(to, from, d.width * sizeof(REAL));
      else
        for (int i = 0; i < d.width; i++) to[i * d.pixel] = from[i];
    }
}

void map_unpack(const MapDense& d, const REAL* map, REAL* x, int begin, int end) {
  for (int c = 0; c < d.channels; c++)
    for (int y = begin; y < end; y++) {
      const REAL* from = map + c * d.channel + y * d.line;
      REAL* to = x + ((int64_t)c * d.height + y) * d.width;
      if (d.pixel == 1) std::memcpy(to, from, d.width * sizeof(REAL));
      else
        for (int i = 0; i < d.width; i++) to[i] = from[i * d.pixel];
    }
}

}  // namespace
