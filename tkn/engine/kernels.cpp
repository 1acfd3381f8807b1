// Convolutions evaluated inside each kernel's ROI only, vectorised over the batch.
//
// A tile is the images of one batch that are computed together: `lanes` of them, a multiple of the vector's width.
// An activation of a tile is a set of rows: one row of `lanes` numbers for each (pixel, channel) where the activation
// is not known to be a constant. The rows of a pixel are contiguous and ascend with the channel; lists say which
// channels they are. So a convolution costs exactly the multiplications between live inputs and live outputs.
//
// All offsets are checked by the Python side, which makes the lists; see rows.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>

#ifndef REAL
#define REAL float
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ACCUMULATORS = 24;  // of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VECTOR_BYTES = 32, ACCUMULATORS = 12;  // of 16
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 24;  // of 32
#else
#error "the ROI engine knows AVX-512, AVX2 with FMA, and NEON"
#endif

constexpr int WIDTH = VECTOR_BYTES / sizeof(REAL);
typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

#define INLINE inline __attribute__((always_inline))

namespace {

// x - 0 is x for every x, so this is a broadcast and nothing else.
INLINE Vector broadcast(REAL x) { return x - Vector{}; }
INLINE Vector load(const REAL* x) { return *reinterpret_cast<const Vector*>(x); }
INLINE void store(REAL* x, Vector v) { *reinterpret_cast<Vector*>(x) = v; }
// As torch's: NaN stays NaN.
INLINE Vector relu(Vector v) { return v < Vector{} ? Vector{} : v; }
INLINE Vector maximum(Vector a, Vector b) { return (b > a) | (b != b) ? b : a; }
INLINE REAL sum(Vector v) {
  REAL total = 0;
  for (int i = 0; i < WIDTH; i++) total += v[i];
  return total;
}

// Calls f.template operator()<NV>() for the number of vectors in a tile.
template <class F>
INLINE void with_vectors(int lanes, const F& f) {
  switch (lanes / WIDTH) {
    case 1: f.template operator()<1>(); break;
    case 2: f.template operator()<2>(); break;
    default: f.template operator()<4>(); break;
  }
}

}  // namespace

extern "C" {

enum Pooling { NONE = 0, MAX = 1, SUM = 2 };

// Combines rows into rows: out[f] = post(init[f] (max or +) act(scale[i] * in[row[i]] + shift[i]) over f's children i).
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
  int32_t pooling;             // MAX or SUM
  int32_t relu;                // of each child
  int32_t post_relu;           // of the result
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
  int32_t relu;
  int32_t windows;              // 0: no pooling
  const int32_t* window_start;  // [windows + 1] first convolved pixel of each window
  Gather pool;                  // of the window's entries, as rows counted from the window's first
};

// Rows of a tile, from or to a dense activation of strides (image, channel, pixel).
struct Dense {
  int32_t channels, height, width;
  int64_t image, channel, row, column;  // strides in elements
  const int32_t* rows;                  // [channels][height * width], -1: no row
  const REAL* outside;                  // [channels] value without a row, or null: 0
};

enum Kind { GATHER = 0, CONV = 1, PACK = 2, UNPACK = 3 };

// One operation of a plan, from rows to rows of a tile's memory; of a dense activation: which one.
struct Operation {
  int32_t kind;
  int32_t dense;
  const void* spec;
  int64_t src, dst;  // first rows
};

// A part of an operation: pixels or windows [begin, end).
struct Step {
  int32_t operation, begin, end;
};

}  // extern "C"

namespace {

template <int NV>
struct Tile {
  static constexpr int LANES = NV * WIDTH;
  static constexpr int MOST = ACCUMULATORS / NV < 12 ? ACCUMULATORS / NV : 12;  // outputs of a register tile

  // The rows that one tap reads, and its weights.
  struct Segment {
    const REAL* x;
    const int32_t* channel;
    const REAL* weight;
    int count;
  };

  template <int N>
  static INLINE void outputs(const Segment* segments, int count, const int64_t* weight_offset, REAL* out, bool first) {
    Vector acc[N][NV];
    for (int i = 0; i < N; i++)
      for (int v = 0; v < NV; v++) acc[i][v] = first ? Vector{} : load(out + i * LANES + v * WIDTH);
    for (const Segment* s = segments; s < segments + count; s++) {
      const REAL* w[N];
      for (int i = 0; i < N; i++) w[i] = s->weight + weight_offset[i];
      const REAL* x = s->x;
      const int32_t* channel = s->channel;
      for (const int32_t* end = channel + s->count; channel < end; channel++, x += LANES) {
        const int64_t c = *channel;
        Vector xs[NV];
        for (int v = 0; v < NV; v++) xs[v] = load(x + v * WIDTH);
        for (int i = 0; i < N; i++) {
          const Vector weight = broadcast(w[i][c]);
          for (int v = 0; v < NV; v++) acc[i][v] += weight * xs[v];
        }
      }
    }
    for (int i = 0; i < N; i++)
      for (int v = 0; v < NV; v++) store(out + i * LANES + v * WIDTH, acc[i][v]);
  }

  template <int N>
  static __attribute__((noinline)) void dispatch(int n, const Segment* segments, int count, const int64_t* offset, REAL* out, bool first) {
    if constexpr (N > 1) {
      if (n < N) return dispatch<N - 1>(n, segments, count, offset, out, first);
    }
    outputs<N>(segments, count, offset, out, first);
  }

  // Entries [begin, end) of one pixel's outputs, all of one group, into consecutive rows from `out`.
  static void pixel_outputs(const Conv& op, int begin, int end, const Segment* segments, int count, REAL* out, bool first) {
    const int blocks = (end - begin + MOST - 1) / MOST;
    for (int block = 0, entry = begin; block < blocks; block++) {
      const int n = (end - entry) / (blocks - block);  // as even as can be
      int64_t offset[MOST];
      for (int i = 0; i < n; i++) offset[i] = op.dst_channel[entry + i] * op.weight_dst;
      dispatch<MOST>(n, segments, count, offset, out + (int64_t)(entry - begin) * LANES, first);
      entry += n;
    }
  }

  // All outputs of pixel p into consecutive rows from `out`.
  static void pixel(const Conv& op, int p, const REAL* src, REAL* out, std::vector<Segment>& segments) {
    const int begin = op.dst_start[p], end = op.dst_start[p + 1], taps = op.tap_start[p + 1] - op.tap_start[p];
    const int32_t *tap_pixel = op.tap_pixel + op.tap_start[p], *tap_index = op.tap_index + op.tap_start[p];
    const int chunks_per_group = op.chunks / op.groups;
    segments.resize(taps);
    for (int a = begin; a < end;) {
      const int group = op.dst_channel[a] / op.dst_per_group;
      int b = end;
      if (op.groups > 1)
        for (b = a + 1; b < end && op.dst_channel[b] / op.dst_per_group == group;) b++;
      REAL* rows = out + (int64_t)(a - begin) * LANES;
      for (int j = 0; j < chunks_per_group; j++) {
        const int chunk = group * chunks_per_group + j;
        int count = 0;
        for (int t = 0; t < taps; t++) {
          const int64_t q = tap_pixel[t];
          const int32_t* start = op.src_start + q * (op.chunks + 1);
          const int live = start[chunk + 1] - start[chunk];
          if (live == 0) continue;
          segments[count++] = {src + (op.src_base[q] + (int64_t)start[chunk] - start[0]) * LANES, op.src_channel + start[chunk],
                               op.weight + tap_index[t] * op.weight_tap - (int64_t)group * op.src_per_group, live};
        }
        pixel_outputs(op, a, b, segments.data(), count, rows, j == 0);
      }
      a = b;
    }
    for (int e = begin; e < end; e++) {
      REAL* row = out + (int64_t)(e - begin) * LANES;
      const Vector scale = broadcast(op.scale ? op.scale[e] : 1), shift = broadcast(op.shift ? op.shift[e] : 0);
      for (int v = 0; v < NV; v++) {
        Vector y = load(row + v * WIDTH);
        if (op.scale) y = y * scale;
        if (op.shift) y = y + shift;
        store(row + v * WIDTH, op.relu ? relu(y) : y);
      }
    }
  }

  // Output pixels [begin, end) of a tile, or windows if the convolution is pooled.
  static void conv(const Conv& op, const REAL* src, REAL* dst, int begin, int end) {
    static thread_local std::vector<Segment> segments;
    static thread_local std::vector<REAL> scratch;
    if (op.windows == 0) {
      for (int p = begin; p < end; p++) pixel(op, p, src, dst + (int64_t)op.dst_base[p] * LANES, segments);
      return;
    }
    for (int window = begin; window < end; window++) {
      const int p0 = op.window_start[window], p1 = op.window_start[window + 1], first = op.dst_start[p0];
      scratch.resize(std::max(scratch.size(), (size_t)(op.dst_start[p1] - first) * LANES));
      for (int p = p0; p < p1; p++) pixel(op, p, src, scratch.data() + (int64_t)(op.dst_start[p] - first) * LANES, segments);
      gather(op.pool, scratch.data(), dst, window, window + 1);
    }
  }

  static void gather(const Gather& op, const REAL* src, REAL* dst, int begin, int end) {
    const Vector factor = broadcast((REAL)op.factor);
    for (int p = begin; p < end; p++) {
      REAL* out = dst + (int64_t)op.out_base[p] * LANES;
      for (int f = op.out_start[p]; f < op.out_start[p + 1]; f++, out += LANES) {
        Vector result[NV];
        for (int v = 0; v < NV; v++) result[v] = broadcast(op.init ? op.init[f] : 0);
        for (int i = op.child_start[f]; i < op.child_start[f + 1]; i++) {
          const REAL* in = src + (int64_t)op.child_row[i] * LANES;
          const Vector scale = broadcast(op.scale ? op.scale[i] : 1), shift = broadcast(op.shift ? op.shift[i] : 0);
          for (int v = 0; v < NV; v++) {
            Vector x = load(in + v * WIDTH);
            if (op.scale) x = x * scale;
            if (op.shift) x = x + shift;
            if (op.relu) x = relu(x);
            result[v] = op.pooling == MAX ? maximum(result[v], x) : result[v] + factor * x;
          }
        }
        for (int v = 0; v < NV; v++) store(out + v * WIDTH, op.post_relu ? relu(result[v]) : result[v]);
      }
    }
  }

  // Of a gather whose every input row is the child of one entry: from the gradient of its outputs those of its inputs
  // and, summed over the batch, of `scale`. `first`: add to the sums or set them.
  static void gather_backward(const Gather& op, const REAL* x, const REAL* grad_out, REAL* grad_x, REAL* grad_scale, int begin,
                              int end, bool first) {
    const Vector factor = broadcast((REAL)op.factor);
    for (int p = begin; p < end; p++) {
      const REAL* g = grad_out + (int64_t)op.out_base[p] * LANES;
      for (int f = op.out_start[p]; f < op.out_start[p + 1]; f++, g += LANES) {
        const int i0 = op.child_start[f], i1 = op.child_start[f + 1];
        Vector best[NV], left[NV];  // the maximum, and the gradient not yet given to the first child that has it
        for (int v = 0; v < NV; v++) {
          best[v] = broadcast(op.init ? op.init[f] : 0);
          left[v] = load(g + v * WIDTH);
          if (op.pooling == MAX)
            for (int i = i0; i < i1; i++) best[v] = maximum(best[v], value(op, i, x, v));
        }
        for (int i = i0; i < i1; i++) {
          const int64_t row = (int64_t)op.child_row[i] * LANES;
          Vector total = {};
          for (int v = 0; v < NV; v++) {
            const Vector y = value(op, i, x, v);
            Vector grad = op.pooling == MAX ? (y == best[v] ? left[v] : Vector{}) : factor * left[v];
            if (op.pooling == MAX) left[v] = y == best[v] ? Vector{} : left[v];
            if (op.relu) grad = y > Vector{} ? grad : Vector{};
            total += grad * load(x + row + v * WIDTH);
            store(grad_x + row + v * WIDTH, op.scale ? grad * broadcast(op.scale[i]) : grad);
          }
          if (grad_scale) grad_scale[i] = (first ? 0 : grad_scale[i]) + sum(total);
        }
      }
    }
  }

  static INLINE Vector value(const Gather& op, int i, const REAL* x, int v) {
    Vector y = load(x + (int64_t)op.child_row[i] * LANES + v * WIDTH);
    if (op.scale) y = y * broadcast(op.scale[i]);
    if (op.shift) y = y + broadcast(op.shift[i]);
    return op.relu ? relu(y) : y;
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

// Lanes beyond `images` become zero.
void pack(const Dense& d, const REAL* x, int images, REAL* rows, int lanes, int begin, int end) {
  for_dense_blocks(d, begin, end, [&](int64_t offset, int64_t step, const int32_t* row, int row_step, int, int, int n) {
    REAL block[BLOCK][BLOCK];
    for (int b = 0; b < lanes; b += BLOCK) {
      const int count = std::min(BLOCK, lanes - b), filled = std::max(0, std::min(count, images - b));
      for (int i = 0; i < filled; i++) {
        const REAL* from = x + (b + i) * d.image + offset;
        for (int k = 0; k < n; k++) block[k][i] = from[k * step];
      }
      for (int k = 0; k < n; k++) {
        for (int i = filled; i < count; i++) block[k][i] = 0;
        if (row[k * row_step] >= 0) std::memcpy(rows + (int64_t)row[k * row_step] * lanes + b, block[k], count * sizeof(REAL));
      }
    }
  });
}

void unpack(const Dense& d, const REAL* rows, int lanes, int images, REAL* x, int begin, int end) {
  for_dense_blocks(d, begin, end, [&](int64_t offset, int64_t step, const int32_t* row, int row_step, int c, int c_step, int n) {
    REAL block[BLOCK][BLOCK];
    for (int b = 0; b < images; b += BLOCK) {
      const int count = std::min(BLOCK, images - b);
      for (int k = 0; k < n; k++) {
        const int r = row[k * row_step];
        const REAL outside = d.outside ? d.outside[c + k * c_step] : 0;
        if (r >= 0) std::memcpy(block[k], rows + (int64_t)r * lanes + b, count * sizeof(REAL));
        else for (int i = 0; i < count; i++) block[k][i] = outside;
      }
      for (int i = 0; i < count; i++) {
        REAL* to = x + (b + i) * d.image + offset;
        for (int k = 0; k < n; k++) to[k * step] = block[k][i];
      }
    }
  });
}

// f(tile, begin, end) over all parts of all tiles, divided among the threads.
template <class F>
void parallel(int tiles, int parts, int threads, const F& f) {
  const int blocks = std::min(parts, std::max(1, (threads * 8 + tiles - 1) / tiles));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < (int64_t)tiles * blocks; task++) {
    const int64_t tile = task / blocks, block = task % blocks;
    f((int)tile, (int)(block * parts / blocks), (int)((block + 1) * parts / blocks));
  }
}

// ---- the weight gradient: grad[o][t][c] = sum over pixels and images of grad_z[p, o] * x[p + t, c] ----

// Rows [count][lanes] to columns [lanes][width], width >= count, the rest zero.
void transpose(const REAL* const* rows, int count, int lanes, REAL* columns, int width) {
  for (int k0 = 0; k0 < width; k0 += WIDTH)
    for (int b0 = 0; b0 < lanes; b0 += WIDTH) {
      const int n = std::min(WIDTH, count - k0);
      REAL block[WIDTH][WIDTH];
      for (int k = 0; k < n; k++) std::memcpy(block[k], rows[k0 + k] + b0, sizeof block[k]);
      for (int k = std::max(0, n); k < WIDTH; k++) std::memset(block[k], 0, sizeof block[k]);
      for (int b = 0; b < WIDTH; b++) {
        REAL* out = columns + (int64_t)(b0 + b) * width + k0;
        for (int k = 0; k < WIDTH; k++) out[k] = block[k][b];
      }
    }
}

// sums[N][NV vectors] = over tiles and images of g[i][image] * x[image][columns].
template <int N, int NV>
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
      for (int i = 0; i < N; i++) {
        const Vector s = broadcast(gs[i][b]);
        for (int v = 0; v < NV; v++) acc[i][v] += s * xs[v];
      }
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

template <int N, int NV>
__attribute__((noinline)) void outer_dispatch(int n, const REAL* const* g, int64_t g_tile, const REAL* x, int64_t x_tile, int width, int tiles,
                                              int lanes, REAL* const* to, const int32_t* column, int count) {
  if constexpr (N > 1) {
    if (n < N) return outer_dispatch<N - 1, NV>(n, g, g_tile, x, x_tile, width, tiles, lanes, to, column, count);
  }
  outer<N, NV>(g, g_tile, x, x_tile, width, tiles, lanes, to, column, count);
}

// Outputs [begin, end) of a pixel's entries against all `count` columns.
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
#define COLUMNS(vectors) outer_dispatch<MOST, vectors>(n, gs, g_tile, x + k, x_tile, width, tiles, lanes, to, column + k, left)
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

extern "C" {

int tkn_width() { return WIDTH; }

void tkn_conv(const Conv* op, const REAL* src, int64_t src_tile, REAL* dst, int64_t dst_tile, int tiles, int lanes, int threads) {
  with_vectors(lanes, [&]<int NV>() {
    parallel(tiles, op->windows ? op->windows : op->pixels, threads,
             [&](int tile, int begin, int end) { Tile<NV>::conv(*op, src + tile * src_tile, dst + tile * dst_tile, begin, end); });
  });
}

void tkn_gather(const Gather* op, const REAL* src, int64_t src_tile, REAL* dst, int64_t dst_tile, int tiles, int lanes, int threads) {
  with_vectors(lanes, [&]<int NV>() {
    parallel(tiles, op->pixels, threads,
             [&](int tile, int begin, int end) { Tile<NV>::gather(*op, src + tile * src_tile, dst + tile * dst_tile, begin, end); });
  });
}

// grad_scale: [children] or null.
void tkn_gather_backward(const Gather* op, const REAL* x, const REAL* grad_out, REAL* grad_x, REAL* grad_scale, int64_t x_tile, int64_t out_tile,
                         int tiles, int lanes, int threads) {
  with_vectors(lanes, [&]<int NV>() {
    parallel(1, op->pixels, threads, [&](int, int begin, int end) {
      for (int tile = 0; tile < tiles; tile++)
        Tile<NV>::gather_backward(*op, x + tile * x_tile, grad_out + tile * out_tile, grad_x + tile * x_tile, grad_scale, begin, end, tile == 0);
    });
  });
}

void tkn_pack(const Dense* d, const REAL* x, int images, REAL* rows, int64_t tile_size, int tiles, int lanes, int threads) {
  parallel(tiles, dense_parts(*d), threads, [&](int tile, int begin, int end) {
    pack(*d, x + tile * lanes * d->image, std::min(lanes, images - tile * lanes), rows + tile * tile_size, lanes, begin, end);
  });
}

void tkn_unpack(const Dense* d, const REAL* rows, int64_t tile_size, REAL* x, int images, int tiles, int lanes, int threads) {
  parallel(tiles, dense_parts(*d), threads, [&](int tile, int begin, int end) {
    unpack(*d, rows + tile * tile_size, lanes, std::min(lanes, images - tile * lanes), x + tile * lanes * d->image, begin, end);
  });
}

// Runs a plan. With tiles enough for the threads each thread takes whole tiles through all `steps`, in memory of its own;
// else the threads divide each operation. `dense`: where the dense activations begin; `memory`: of `memory_tiles` tiles.
void tkn_run(const Operation* operations, int operation_count, const Step* steps, int step_count, REAL* const* dense, REAL* memory,
             int64_t memory_tile, int memory_tiles, int images, int lanes, int threads) {
  with_vectors(lanes, [&]<int NV>() {
    const int tiles = (images + lanes - 1) / lanes;
    const auto run = [&](int index, REAL* rows, int tile, int begin, int end) {
      const Operation& op = operations[index];
      const REAL* src = rows + op.src * lanes;
      REAL* dst = rows + op.dst * lanes;
      const int filled = std::min(lanes, images - tile * lanes);
      if (op.kind == GATHER) Tile<NV>::gather(*static_cast<const Gather*>(op.spec), src, dst, begin, end);
      if (op.kind == CONV) Tile<NV>::conv(*static_cast<const Conv*>(op.spec), src, dst, begin, end);
      if (op.kind == PACK || op.kind == UNPACK) {
        const Dense& d = *static_cast<const Dense*>(op.spec);
        REAL* images_begin = dense[op.dense] + (int64_t)tile * lanes * d.image;
        if (op.kind == PACK) pack(d, images_begin, filled, dst, lanes, begin, end);
        else unpack(d, src, lanes, filled, images_begin, begin, end);
      }
    };
    const auto parts = [&](const Operation& op) {
      if (op.kind == GATHER) return static_cast<const Gather*>(op.spec)->pixels;
      if (op.kind == PACK || op.kind == UNPACK) return dense_parts(*static_cast<const Dense*>(op.spec));
      const Conv& conv = *static_cast<const Conv*>(op.spec);
      return conv.windows ? conv.windows : conv.pixels;
    };
    if (tiles >= threads && memory_tiles >= threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
      for (int tile = 0; tile < tiles; tile++)
        for (int s = 0; s < step_count; s++)
          run(steps[s].operation, memory + memory_tile * omp_get_thread_num(), tile, steps[s].begin, steps[s].end);
      return;
    }
    for (int tile = 0; tile < tiles; tile++)
      for (int index = 0; index < operation_count; index++)
        parallel(1, parts(operations[index]), threads, [&](int, int begin, int end) { run(index, memory, tile, begin, end); });
  });
}

// The weight's gradient of an unpooled convolution: `grad` as `weight`, set to zero before. `columns`: room for
// tiles * lanes * sum over source pixels of their channels rounded up to vectors; `column_start` [source pixels]: where in
// one tile's share (of `columns_tile` numbers) a pixel's begin; unused if the taps are many and the channels few.
void tkn_weight_grad(const Conv* op, const REAL* x, int64_t x_tile, const REAL* grad_z, int64_t z_tile, REAL* grad, int taps, int source_pixels,
                     const int64_t* column_start, REAL* columns, int64_t columns_tile, int tiles, int lanes, int threads) {
  const int chunks = op->chunks, dst_channels = op->groups * op->dst_per_group;
  const auto live = [&](int q, int chunk) { return op->src_start[(int64_t)q * (chunks + 1) + chunk]; };
  const bool together = op->src_per_group < WIDTH && op->groups == 1;  // the columns of all taps of a pixel in one
  if (!together) {
    parallel(tiles, source_pixels, threads, [&](int tile, int begin, int end) {
      std::vector<const REAL*> rows;
      for (int q = begin; q < end; q++) {
        const int count = live(q, chunks) - live(q, 0);
        rows.resize(count);
        for (int k = 0; k < count; k++) rows[k] = x + tile * x_tile + ((int64_t)op->src_base[q] + k) * lanes;
        transpose(rows.data(), count, lanes, columns + tile * columns_tile + column_start[q], padded(count));
      }
    });
  }
  // Every task owns a range of outputs, and a tap: sums are made in one order whatever the number of threads.
  const int tap_tasks = together ? 1 : taps;
  const int ranges = std::max(1, std::min(dst_channels / 32, (32 + tap_tasks - 1) / tap_tasks));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int task = 0; task < tap_tasks * ranges; task++) {
    const int tap = task / ranges, range = task % ranges;
    const int low = range * dst_channels / ranges, high = (range + 1) * dst_channels / ranges;
    std::vector<REAL> scratch;
    std::vector<const REAL*> rows;
    std::vector<int32_t> column;
    for (int p = 0; p < op->pixels; p++) {
      const int32_t *first = op->dst_channel + op->dst_start[p], *last = op->dst_channel + op->dst_start[p + 1];
      const int begin = std::lower_bound(first, last, low) - op->dst_channel, end = std::lower_bound(first, last, high) - op->dst_channel;
      if (begin == end) continue;
      const REAL* g = grad_z + ((int64_t)op->dst_base[p] + begin - op->dst_start[p]) * lanes;
      if (together) {
        column.clear();
        for (int t = op->tap_start[p]; t < op->tap_start[p + 1]; t++)
          for (int q = op->tap_pixel[t], e = live(q, 0); e < live(q, chunks); e++)
            column.push_back(op->tap_index[t] * op->weight_tap + op->src_channel[e]);
        const int count = column.size(), width = padded(count);
        if (count == 0) continue;
        scratch.resize((size_t)width * lanes * tiles);
        rows.resize(count);
        for (int tile = 0; tile < tiles; tile++) {
          int k = 0;
          for (int t = op->tap_start[p]; t < op->tap_start[p + 1]; t++) {
            const int q = op->tap_pixel[t];
            for (int e = live(q, 0); e < live(q, chunks); e++)
              rows[k++] = x + tile * x_tile + ((int64_t)op->src_base[q] + e - live(q, 0)) * lanes;
          }
          transpose(rows.data(), count, lanes, scratch.data() + (int64_t)tile * width * lanes, width);
        }
        outer_all(*op, begin, end, g, z_tile, scratch.data(), (int64_t)width * lanes, width, tiles, lanes, grad, column.data(), count);
        continue;
      }
      for (int t = op->tap_start[p]; t < op->tap_start[p + 1]; t++) {
        if (op->tap_index[t] != tap) continue;
        const int q = op->tap_pixel[t], width = padded(live(q, chunks) - live(q, 0));
        for (int a = begin; a < end;) {
          const int group = op->dst_channel[a] / op->dst_per_group;
          int b = end;
          if (op->groups > 1)
            for (b = a + 1; b < end && op->dst_channel[b] / op->dst_per_group == group;) b++;
          const int per_group = chunks / op->groups, from = live(q, group * per_group), to = live(q, (group + 1) * per_group);
          if (from < to)
            outer_all(*op, a, b, g + (int64_t)(a - begin) * lanes, z_tile, columns + column_start[q] + from - live(q, 0), columns_tile, width, tiles, lanes,
                      grad + tap * op->weight_tap - (int64_t)group * op->src_per_group, op->src_channel + from, to - from);
          a = b;
        }
      }
    }
  }
}

}  // extern "C"
