// Large batches: convolutions inside ROIs, vectorised over the batch.
//
// A tile is the images of one batch that are computed together: `lanes` of them, a multiple of the vector's width.
// An activation of a tile is a set of rows: one row of `lanes` numbers for each (pixel, channel) where the activation
// is not known to be a constant. The rows of a pixel are contiguous and ascend with the channel; lists say which
// channels they are. So a convolution costs exactly the multiplications between live inputs and live outputs.
#pragma once

#include "pair_rows.h"

namespace {

// Calls f.template operator()<V, NV>() for the vectors of a tile.
template <class F>
INLINE void with_vectors(int lanes, const F& f) {
  switch (2 * lanes / WIDTH) {
    case 1: f.template operator()<HalfVector, 1>(); break;
    case 2: f.template operator()<Vector, 1>(); break;
    case 4: f.template operator()<Vector, 2>(); break;
    default: f.template operator()<Vector, 4>(); break;
  }
}

}  // namespace

extern "C" {

enum Pooling { NONE = 0, MAX = 1, SUM = 2, PRODUCT = 3 };

// Combines rows into rows: out[f] = init[f] (max, + or *) function(scale[i] * in[row[i]] + shift[i]) over f's children i.
struct Gather {
  int32_t pixels;              // of the output
  const int32_t* out_start;    // [pixels + 1] first output entry of each pixel
  const int32_t* out_base;     // [pixels] first row of each pixel
  const int32_t* child_start;  // [entries + 1]
  const int32_t* child_row;    // [children]
  const REAL* scale;           // [children] or null: 1
  const REAL* shift;           // [children] or null: 0
  const REAL* init;            // [entries] or null: 0
  double factor;               // of the children's sum
  int32_t pooling;             // MAX, SUM or PRODUCT
  Function function;           // of each child
};

struct Conv {
  int32_t pixels;             // convolved pixels; with pooling those of a window are consecutive
  const int32_t* dst_start;   // [pixels + 1] first entry of each pixel
  const int32_t* dst_channel;  // [entries]
  const int32_t* dst_base;    // [pixels] first row of each pixel (without pooling)
  const int32_t* tap_start;   // [pixels + 1]
  const int32_t* tap_pixel;   // the input pixel that a tap reads
  const int32_t* tap_index;   // which tap of the kernel it is
  const int32_t* src_start;   // [source pixels][chunks + 1] first entry of each chunk of channels
  const int32_t* src_channel;  // [source entries]
  const int32_t* src_base;    // [source pixels] first row
  int32_t chunks, groups, dst_per_group, src_per_group;
  int64_t weight_dst, weight_tap;  // strides of weight[dst channel][tap][src channel in its group]
  const REAL* weight;
  const REAL* scale;  // [entries] or null: 1
  const REAL* shift;  // [entries] or null: 0
  Function function;
  int32_t windows;              // 0: no pooling
  const int32_t* window_start;  // [windows + 1] first convolved pixel of each window
  Gather pool;                  // of the window's entries, as rows counted from the window's first
  const Pairing* pairing;       // of the rows of a pixel, counted from its first, as they are written; or null
};

// Rows of a tile, from or to a dense activation of strides (image, channel, pixel).
struct Dense {
  int32_t channels, height, width;
  int64_t image, channel, row, column;  // strides in elements
  const int32_t* rows;                  // [channels][height * width], -1: no row
  const REAL* outside;                  // [channels] value without a row, or null: 0 (halves: always null)
};

}  // extern "C"

namespace {

// The first of a pixel's entries after `begin`, up to `end`, that is of another group.
INLINE int group_end(const Conv& op, int begin, int end) {
  if (op.groups == 1) return end;
  const int group = op.dst_channel[begin] / op.dst_per_group;
  int e = begin + 1;
  while (e < end && op.dst_channel[e] / op.dst_per_group == group) e++;
  return e;
}

// Rows that several taps read, one after the other, are at most so many.
constexpr int MOST_TOGETHER = 64;
// Pixels of a window whose outputs are combined a few at a time.
constexpr int MOST_ALIKE = 9;
constexpr struct Upwards {
  int32_t numbers[MOST_TOGETHER];
  constexpr Upwards() : numbers() {
    for (int i = 0; i < MOST_TOGETHER; i++) numbers[i] = i;
  }
} UPWARDS;

// Of NV vectors of images. PAIRS: a convolution's inputs and weights are pairs of bfloat16.
template <class V, int NV, bool PAIRS = false>
struct Tile {
  static constexpr int SIZE = sizeof(V) / sizeof(REAL), LANES = NV * SIZE;
  static constexpr int MOST = ACCUMULATORS / NV < 12 ? ACCUMULATORS / NV : 12;  // outputs of a register tile

  // The rows that one tap reads, and its weights.
  struct Segment {
    const REAL* x;
    const int32_t* channel;
    int64_t weight;  // where the tap's begin among those of an output
    int count;
  };

  // What is done to the sums of consecutive entries as they are written.
  struct Finish {
    const REAL *scale, *shift;  // of the first entry, or null
    bool first, last;           // of the chunks of channels: before the last there are only sums
    bool relu;
  };

  template <int N>
  static INLINE void outputs(const Segment* segments, int count, const REAL* const* weight, REAL* out, const Finish& finish) {
    V acc[N][NV];
    for (int i = 0; i < N; i++)
      for (int v = 0; v < NV; v++) acc[i][v] = finish.first ? V{} : load<V>(out + i * LANES + v * SIZE);
    const REAL* w[N];
    for (int i = 0; i < N; i++) w[i] = weight[i];
    for (const Segment* s = segments; s < segments + count; s++) {
      const REAL* x = s->x;
      const int32_t* channel = s->channel;
      for (const int32_t* end = channel + s->count; channel < end; channel++, x += LANES) {
        const int64_t c = s->weight + *channel;
        V xs[NV];
        for (int v = 0; v < NV; v++) xs[v] = load<V>(x + v * SIZE);
        for (int i = 0; i < N; i++) {
#if BFLOAT16_PRODUCTS
          if constexpr (PAIRS) {
            const V weight = broadcast_pair<V>(w[i] + c);
            for (int v = 0; v < NV; v++) acc[i][v] = plus_products(acc[i][v], weight, xs[v]);
            continue;
          }
#endif
          const V weight = broadcast<V>(w[i][c]);
          for (int v = 0; v < NV; v++) acc[i][v] += weight * xs[v];
        }
      }
    }
    for (int i = 0; i < N; i++) {
      const V scale = broadcast<V>(finish.scale ? finish.scale[i] : 1), shift = broadcast<V>(finish.shift ? finish.shift[i] : 0);
      for (int v = 0; v < NV; v++) {
        V y = acc[i][v];
        if (finish.last) {
          if (finish.scale) y = y * scale;
          if (finish.shift) y = y + shift;
          if (finish.relu) y = relu(y);
        }
        store(out + i * LANES + v * SIZE, y);
      }
    }
  }

  template <int N>
  static __attribute__((noinline)) void dispatch(int n, const Segment* segments, int count, const REAL* const* weight, REAL* out, const Finish& finish) {
    if constexpr (N > 1) {
      if (n < N) return dispatch<N - 1>(n, segments, count, weight, out, finish);
    }
    outputs<N>(segments, count, weight, out, finish);
  }

  // Entries [begin, end) of one pixel's outputs, all of one group, into consecutive rows from `out`.
  static void pixel_outputs(const Conv& op, int begin, int end, const Segment* segments, int count, REAL* out, bool first, bool last) {
    const int blocks = (end - begin + MOST - 1) / MOST;
    for (int block = 0, entry = begin; block < blocks; block++) {
      const int n = (end - entry) / (blocks - block);  // as even as can be
      const REAL* weight[MOST];
      for (int i = 0; i < n; i++) weight[i] = op.weight + op.dst_channel[entry + i] * op.weight_dst;
      const Finish finish = {op.scale ? op.scale + entry : nullptr, op.shift ? op.shift + entry : nullptr, first, last, op.function.kind == RELU};
      dispatch<MOST>(n, segments, count, weight, out + (int64_t)(entry - begin) * LANES, finish);
      entry += n;
    }
    if (last && op.function.kind > RELU) apply(op.function, out, (int64_t)(end - begin) * LANES);
  }

  // What the taps of pixel p read of a chunk of channels of `group`.
  static int segments_of(const Conv& op, int p, int group, int chunk, const REAL* src, std::vector<Segment>& segments) {
    const int taps = op.tap_start[p + 1] - op.tap_start[p];
    const int32_t *tap_pixel = op.tap_pixel + op.tap_start[p], *tap_index = op.tap_index + op.tap_start[p];
    segments.resize(std::max(segments.size(), (size_t)taps));
    int count = 0;
    for (int t = 0; t < taps; t++) {
      const int64_t q = tap_pixel[t];
      const int32_t* start = op.src_start + q * (op.chunks + 1);
      const int live = start[chunk + 1] - start[chunk];
      if (live == 0) continue;
      const REAL* x = src + (op.src_base[q] + (int64_t)start[chunk] - start[0]) * LANES;
      const int64_t weight = tap_index[t] * op.weight_tap - (int64_t)group * op.src_per_group;
      if (live == op.src_per_group && op.groups == 1 && count > 0) {  // all of it: the next tap's may follow in memory
        Segment& last = segments[count - 1];
        const bool follows = last.x + (int64_t)last.count * LANES == x && last.weight + last.count == weight;
        if (follows && last.count % live == 0 && last.count + live <= MOST_TOGETHER) {
          last.count += live;
          last.channel = UPWARDS.numbers;
          continue;
        }
      }
      segments[count++] = {x, op.src_channel + start[chunk], weight, live};
    }
    return count;
  }

  // All outputs of pixel p into consecutive rows from `out`.
  static void pixel(const Conv& op, int p, const REAL* src, REAL* out, std::vector<Segment>& segments) {
    const int begin = op.dst_start[p], end = op.dst_start[p + 1];
    const int chunks_per_group = op.chunks / op.groups;
    for (int a = begin; a < end;) {
      const int group = op.dst_channel[a] / op.dst_per_group, b = group_end(op, a, end);
      REAL* rows = out + (int64_t)(a - begin) * LANES;
      for (int j = 0; j < chunks_per_group; j++) {
        const int count = segments_of(op, p, group, group * chunks_per_group + j, src, segments);
        pixel_outputs(op, a, b, segments.data(), count, rows, j == 0, j == chunks_per_group - 1);
      }
      a = b;
    }
  }

  // Whether pixels [begin, end) of a window have the same outputs, and all their inputs are in one chunk.
  static bool alike(const Conv& op, int begin, int end) {
    if (op.chunks > 1 || end - begin > MOST_ALIKE || op.pool.pooling == PRODUCT) return false;
    const int32_t *start = op.dst_start + begin, count = start[1] - start[0];
    for (int p = 1; p < end - begin; p++)
      if (start[p + 1] - start[p] != count || !std::equal(op.dst_channel + start[0], op.dst_channel + start[1], op.dst_channel + start[p])) return false;
    return true;
  }

  // The pooled outputs of such a window, some after the other: then they are combined where they still are in a near cache.
  static void alike_pixels(const Conv& op, int begin, int end, const REAL* src, REAL* out) {
    static thread_local std::vector<Segment> segments[MOST_ALIKE];
    const int pixels = end - begin, first = op.dst_start[begin], outputs = op.dst_start[begin + 1] - first;
    int counts[MOST_ALIKE];
    for (int k = 0; k < pixels; k++) counts[k] = segments_of(op, begin + k, 0, 0, src, segments[k]);
    const V factor = broadcast<V>((REAL)op.pool.factor);
    REAL rows[MOST_ALIKE * MOST * LANES];
    const int blocks = (outputs + MOST - 1) / MOST;
    for (int block = 0, done = 0; block < blocks; block++) {
      const int n = (outputs - done) / (blocks - block);
      for (int k = 0; k < pixels; k++) {
        const int entry = op.dst_start[begin + k] + done;
        pixel_outputs(op, entry, entry + n, segments[k].data(), counts[k], rows + k * n * LANES, true, true);
      }
      for (int i = 0; i < n * LANES; i += SIZE) {
        V result = load<V>(rows + i);
        if (op.pool.pooling == SUM) result = factor * result;
        for (int k = 1; k < pixels; k++) {
          const V x = load<V>(rows + k * n * LANES + i);
          result = op.pool.pooling == MAX ? maximum(result, x) : result + factor * x;
        }
        store(out + (int64_t)done * LANES + i, result);
      }
      done += n;
    }
  }

  // All outputs of a window into consecutive rows from `out`.
  static void window(const Conv& op, int index, const REAL* src, REAL* out, std::vector<Segment>& segments) {
    static thread_local std::vector<REAL> scratch;
    const int begin = op.window_start[index], end = op.window_start[index + 1], first = op.dst_start[begin];
    if (alike(op, begin, end)) return alike_pixels(op, begin, end, src, out);
    scratch.resize(std::max(scratch.size(), (size_t)(op.dst_start[end] - first) * LANES));
    for (int p = begin; p < end; p++) pixel(op, p, src, scratch.data() + (int64_t)(op.dst_start[p] - first) * LANES, segments);
    gather_pixel(op.pool, scratch.data(), out, index);
  }

  // Output pixels [begin, end) of a tile, or windows if the convolution is pooled.
  static void conv(const Conv& op, const REAL* src, REAL* dst, int begin, int end) {
    static thread_local std::vector<Segment> segments;
    static thread_local std::vector<REAL> unpaired;
    const int32_t* start = op.windows ? op.pool.out_start : op.dst_start;
    const int32_t* base = op.windows ? op.pool.out_base : op.dst_base;
    for (int part = begin; part < end; part++) {
      REAL* out = dst + (int64_t)base[part] * LANES;
      if (op.pairing) {
        unpaired.resize(std::max(unpaired.size(), (size_t)(start[part + 1] - start[part]) * LANES));
        out = unpaired.data();
      }
      if (op.windows) window(op, part, src, out, segments);
      else pixel(op, part, src, out, segments);
#if BFLOAT16_PRODUCTS
      if (op.pairing) pair_rows<V, NV>(*op.pairing, out, dst, part, part + 1);
#endif
    }
  }

  static void gather(const Gather& op, const REAL* src, REAL* dst, int begin, int end) {
    for (int p = begin; p < end; p++) gather_pixel(op, src, dst + (int64_t)op.out_base[p] * LANES, p);
  }

  // All entries of pixel p into consecutive rows from `out`.
  static INLINE void gather_pixel(const Gather& op, const REAL* src, REAL* out, int p) {
    const V factor = broadcast<V>((REAL)op.factor);
    for (int f = op.out_start[p]; f < op.out_start[p + 1]; f++, out += LANES) {
      V result[NV];
      for (int v = 0; v < NV; v++) result[v] = broadcast<V>(op.init ? op.init[f] : 0);
      for (int i = op.child_start[f]; i < op.child_start[f + 1]; i++) {
        const REAL* in = src + (int64_t)op.child_row[i] * LANES;
        const V scale = broadcast<V>(op.scale ? op.scale[i] : 1), shift = broadcast<V>(op.shift ? op.shift[i] : 0);
        for (int v = 0; v < NV; v++) {
          V x = load<V>(in + v * SIZE);
          if (op.scale) x = x * scale;
          if (op.shift) x = x + shift;
          x = value_of(op.function, x);
          result[v] = op.pooling == MAX ? maximum(result[v], x) : op.pooling == PRODUCT ? result[v] * x : result[v] + factor * x;
        }
      }
      for (int v = 0; v < NV; v++) store(out + v * SIZE, result[v]);
    }
  }

  // Of a gather whose every input row is the child of one entry: from the gradient of its outputs those of its inputs
  // and, summed over the batch, of `scale`. `first`: add to the sums or set them.
  static void gather_backward(const Gather& op, const REAL* x, const REAL* grad_out, REAL* grad_x, REAL* grad_scale, int begin,
                              int end, bool first) {
    const V factor = broadcast<V>((REAL)op.factor);
    for (int p = begin; p < end; p++) {
      const REAL* g = grad_out + (int64_t)op.out_base[p] * LANES;
      for (int f = op.out_start[p]; f < op.out_start[p + 1]; f++, g += LANES) {
        const int i0 = op.child_start[f], i1 = op.child_start[f + 1];
        V best[NV], left[NV];  // the maximum, and the gradient not yet given to the first child that has it
        for (int v = 0; v < NV; v++) {
          best[v] = broadcast<V>(op.init ? op.init[f] : 0);
          left[v] = load<V>(g + v * SIZE);
          if (op.pooling == MAX)
            for (int i = i0; i < i1; i++) best[v] = maximum(best[v], value(op, i, x, v));
        }
        for (int i = i0; i < i1; i++) {
          const int64_t row = (int64_t)op.child_row[i] * LANES;
          V total = {};
          for (int v = 0; v < NV; v++) {
            const V y = value(op, i, x, v);
            V grad = op.pooling == MAX ? (y == best[v] ? left[v] : V{}) : factor * left[v];
            if (op.pooling == MAX) left[v] = y == best[v] ? V{} : left[v];
            if (op.function.kind == RELU) grad = y > V{} ? grad : V{};
            total += grad * load<V>(x + row + v * SIZE);
            store(grad_x + row + v * SIZE, op.scale ? grad * broadcast<V>(op.scale[i]) : grad);
          }
          if (grad_scale) grad_scale[i] = (first ? 0 : grad_scale[i]) + sum(total);
        }
      }
    }
  }

  static INLINE V value(const Gather& op, int i, const REAL* x, int v) {
    V y = load<V>(x + (int64_t)op.child_row[i] * LANES + v * SIZE);
    if (op.scale) y = y * broadcast<V>(op.scale[i]);
    if (op.shift) y = y + broadcast<V>(op.shift[i]);
    return op.function.kind == RELU ? relu(y) : y;
  }
};

// Blocks of a dense activation along its contiguous axis, so that every cache line is read once.
constexpr int BLOCK = 16;

template <class Move>
void for_dense_blocks(const Dense& d, int begin, int end, const Move& move) {
  const int pixels = d.height * d.width;
  if (d.channel < d.column) {  // channels last: begin, end are pixels
    for (int q = begin; q < end; q++)
      for (int c = 0; c < d.channels; c += BLOCK) {
        const int64_t offset = q / d.width * d.row + q % d.width * d.column + c * d.channel;
        move(offset, d.channel, d.rows + (int64_t)c * pixels + q, pixels, c, 1, std::min(BLOCK, d.channels - c));
      }
    return;
  }
  for (int line = begin; line < end; line++) {  // begin, end are lines of a channel
    const int c = line / d.height, y = line % d.height;
    for (int x = 0; x < d.width; x += BLOCK) {
      const int64_t offset = c * d.channel + y * d.row + x * d.column;
      move(offset, d.column, d.rows + (int64_t)c * pixels + y * d.width + x, 1, c, 0, std::min(BLOCK, d.width - x));
    }
  }
}

int dense_parts(const Dense& d) { return d.channel < d.column ? d.height * d.width : d.channels * d.height; }

// T: of the numbers that are moved. Lanes beyond `images` become zero.
template <class T>
void pack(const Dense& d, const T* x, int images, T* rows, int lanes, int begin, int end) {
  for_dense_blocks(d, begin, end, [&](int64_t offset, int64_t step, const int32_t* row, int row_step, int, int, int n) {
    T block[BLOCK][BLOCK];
    for (int b = 0; b < lanes; b += BLOCK) {
      const int count = std::min(BLOCK, lanes - b), filled = std::max(0, std::min(count, images - b));
      for (int i = 0; i < filled; i++) {
        const T* from = x + (b + i) * d.image + offset;
        for (int k = 0; k < n; k++) block[k][i] = from[k * step];
      }
      for (int k = 0; k < n; k++) {
        for (int i = filled; i < count; i++) block[k][i] = 0;
        if (row[k * row_step] >= 0) std::memcpy(rows + (int64_t)row[k * row_step] * lanes + b, block[k], count * sizeof(T));
      }
    }
  });
}

template <class T>
void unpack(const Dense& d, const T* rows, int lanes, int images, T* x, int begin, int end) {
  for_dense_blocks(d, begin, end, [&](int64_t offset, int64_t step, const int32_t* row, int row_step, int c, int c_step, int n) {
    T block[BLOCK][BLOCK];
    for (int b = 0; b < images; b += BLOCK) {
      const int count = std::min(BLOCK, images - b);
      for (int k = 0; k < n; k++) {
        const int r = row[k * row_step];
        T outside = 0;
        if constexpr (std::is_same_v<T, REAL>) outside = d.outside ? d.outside[c + k * c_step] : 0;
        if (r >= 0) std::memcpy(block[k], rows + (int64_t)r * lanes + b, count * sizeof(T));
        else for (int i = 0; i < count; i++) block[k][i] = outside;
      }
      for (int i = 0; i < count; i++) {
        T* to = x + (b + i) * d.image + offset;
        for (int k = 0; k < n; k++) to[k * step] = block[k][i];
      }
    }
  });
}

}  // namespace
