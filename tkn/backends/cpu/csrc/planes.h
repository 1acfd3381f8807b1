// Small batches of wide maps: maps of one image, a channel's pixels side by side, vectorised along the rows.
//
// A channel's plane has a border of as many pixels as the convolutions that read it pad, which are zero. Outside of the
// ROIs a map holds what it is there, written once. Loads may go beyond what is used of a line.
#pragma once

#include "maps.h"

extern "C" {

// Convolutions in tasks: some rows of a rectangle of a few outputs, which share it.
struct PlaneConv {
  int32_t tasks;
  const struct PlaneTask* task;  // [tasks]
  const int32_t* input;         // of each task, which of its kernels' inputs are not zero everywhere
  const REAL *scale, *shift;    // of a task: [outputs] if `uniform`, else [outputs][numbers of a row block]
  int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
  int32_t outputs_per_group, inputs_per_group;
  int64_t plane, line;          // of the source: numbers between channels and between lines
  int64_t out_channel, out_line, out_pixel;
  int32_t flat;                 // the rows of a task follow each other in the source without a border: one long row
  int32_t pool_height, pool_width;  // of the windows that are combined, or 1, 1
  const REAL* weight;           // [outputs][inputs per group][height][width]
  MapPool pool;
};

struct PlaneTask {
  int32_t output, outputs;             // the first, and how many
  int32_t row, column, rows, columns;  // of convolved pixels, in whole windows
  int32_t first_input, inputs;
  int32_t uniform;
  int64_t value_start;                 // into scale and shift
};

// Channels of several maps side by side, or sums or products of them; scaled, shifted and pooled.
struct PlaneGather {
  int32_t channels, operands;
  int32_t combined;              // MAP_SUM or MAP_PRODUCT of the operands
  int32_t one_pixel;             // the second operand is one number for all of a plane
  int32_t band;                  // lines of a part: one channel's
  const int32_t *source, *line;  // [channels][operands] where each plane begins, and the numbers between its lines
  const REAL *scale, *shift;     // [channels] or null
  int32_t height, width;         // of the planes
  int32_t out_height, out_width;
  int64_t out_plane, out_line;
  int32_t kernel_height, kernel_width, stride_height, stride_width, top, left, dilation_height, dilation_width;
  MapPool pool;
};

// Planes of another size: each number is a weighted sum of a window's, with weights of its lines and of its columns. A tap
// of weight 0 reads nothing.
struct PlaneResample {
  int32_t channels;
  int32_t band;                         // lines of a part: one channel's
  const int32_t *source, *line;         // [channels] where each plane begins, and the numbers between its lines
  const REAL *scale, *shift;            // [channels] or null
  Function function;                    // of each number that is read
  int32_t width;                        // of the planes
  int32_t out_height, out_width;
  int64_t out_plane, out_line;
  const int32_t* first_line;            // [out_height]
  const REAL* line_weight;              // [out_height][line_taps]
  int32_t line_taps;
  const int32_t* first_column;          // [out_width, and a vector more]
  const REAL* column_weight;            // [column_taps], `column_pitch` apart
  int32_t column_taps, column_pitch;
};

}  // extern "C"

namespace {

INLINE int vectors_of(int numbers) { return (numbers + WIDTH - 1) / WIDTH; }

// R lines of V vectors of N outputs, of a kernel of HEIGHT lines, without stride or dilation: a line that is loaded
// serves all lines of the kernel. Sums into `y`: [N][R][V vectors], `output` and `pitch` numbers apart.
template <int HEIGHT, int N, int R, int V>
INLINE void plane_block(const PlaneConv& op, const PlaneTask& task, const REAL* src, const REAL* weight, REAL* y, int64_t output, int pitch) {
  const int32_t* input = op.input + task.first_input;
  const int64_t taps = (int64_t)HEIGHT * op.kernel_width, per_output = taps * op.inputs_per_group, line = op.line;
  const int width = op.kernel_width;
  Vector acc[N][R][V] = {};
  for (int i = 0; i < task.inputs; i++) {
    const REAL *x = src + input[i] * op.plane, *w = weight + input[i] * taps;
    for (int kx = 0; kx < width; kx++, x++, w++) {
      Vector ws[N][HEIGHT];
      for (int n = 0; n < N; n++)
        for (int ky = 0; ky < HEIGHT; ky++) ws[n][ky] = broadcast(w[n * per_output + ky * width]);
#pragma GCC unroll 16
      for (int r = 0; r < R + HEIGHT - 1; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          Vector xs = load(x + r * line + v * WIDTH);
          keep(xs);
#pragma GCC unroll 8
          for (int ky = 0; ky < HEIGHT; ky++)
            if (r - ky >= 0 && r - ky < R)
              for (int n = 0; n < N; n++) acc[n][r - ky][v] += ws[n][ky] * xs;
        }
    }
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(y + n * output + r * pitch + v * WIDTH, acc[n][r][v]);
}

template <int HEIGHT, int N, int R, int V>
__attribute__((noinline)) void plane_dispatch(int rows, const PlaneConv& op, const PlaneTask& task, const REAL* src, const REAL* weight, REAL* y,
                                              int64_t output, int pitch) {
  if constexpr (R > 1) {
    if (rows < R) return plane_dispatch<HEIGHT, N, R - 1, V>(rows, op, task, src, weight, y, output, pitch);
  }
  plane_block<HEIGHT, N, R, V>(op, task, src, weight, y, output, pitch);
}

// All of a task's lines in blocks as even as can be.
template <int HEIGHT, int N>
void plane_lines(const PlaneConv& op, const PlaneTask& task, const REAL* src, const REAL* weight, REAL* y, int64_t output, int pitch) {
  // Besides the sums, registers hold the weights of N kernels and one input.
  constexpr int SPARE = ACCUMULATORS == 24 ? 30 : 15, LEFT = (SPARE - N * HEIGHT) / (2 * N), MOST = LEFT < 1 ? 1 : LEFT < 8 ? LEFT : 8;
  const int vectors = vectors_of(task.columns), blocks = (task.rows + MOST - 1) / MOST;
  for (int v = 0; v < vectors; v += 2)
    for (int block = 0, row = 0; block < blocks; block++) {
      const int rows = (task.rows - row) / (blocks - block);
      const REAL* x = src + row * op.line + v * WIDTH;
      REAL* to = y + row * pitch + v * WIDTH;
      if (vectors - v > 1) plane_dispatch<HEIGHT, N, MOST, 2>(rows, op, task, x, weight, to, output, pitch);
      else plane_dispatch<HEIGHT, N, MOST, 1>(rows, op, task, x, weight, to, output, pitch);
      row += rows;
    }
}

// P vectors of N outputs, of any kernel: where they begin in the source and in `y`.
template <int N, int P>
INLINE void plane_pieces(const PlaneConv& op, const PlaneTask& task, const REAL* src, const int64_t* from, const REAL* weight, REAL* y, const int64_t* to,
                         int64_t output) {
  const int32_t* input = op.input + task.first_input;
  const int64_t taps = (int64_t)op.kernel_height * op.kernel_width, per_output = taps * op.inputs_per_group;
  Vector acc[N][P] = {};
  const REAL* x[P];
  const auto sums = [&](const auto& read) {
    for (int i = 0; i < task.inputs; i++) {
      const REAL* w = weight + input[i] * taps;
      for (int p = 0; p < P; p++) x[p] = src + from[p] + input[i] * op.plane;
      for (int ky = 0; ky < op.kernel_height; ky++)
        for (int kx = 0; kx < op.kernel_width; kx++, w++) {
          const int64_t tap = ky * op.dilation_height * op.line + kx * op.dilation_width;
          Vector ws[N];
          for (int n = 0; n < N; n++) ws[n] = broadcast(w[n * per_output]);
          for (int p = 0; p < P; p++) {
            Vector xs = read(x[p] + tap);
            if (N > 1) keep(xs);
            for (int n = 0; n < N; n++) acc[n][p] += ws[n] * xs;
          }
        }
    }
  };
  if (op.stride_width == 1) sums([](const REAL* at) { return load(at); });
  else sums([&](const REAL* at) { return load_strided(at, op.stride_width, WIDTH); });
  for (int n = 0; n < N; n++)
    for (int p = 0; p < P; p++) store(y + n * output + to[p], acc[n][p]);
}

template <int N, int P>
__attribute__((noinline)) void plane_pieces_dispatch(int pieces, const PlaneConv& op, const PlaneTask& task, const REAL* src, const int64_t* from,
                                                     const REAL* weight, REAL* y, const int64_t* to, int64_t output) {
  if constexpr (P > 1) {
    if (pieces < P) return plane_pieces_dispatch<N, P - 1>(pieces, op, task, src, from, weight, y, to, output);
  }
  plane_pieces<N, P>(op, task, src, from, weight, y, to, output);
}

template <int N>
void plane_taps(const PlaneConv& op, const PlaneTask& task, const REAL* src, const REAL* weight, REAL* y, int64_t output, int rows, int columns,
                int pitch) {
  constexpr int MOST = ACCUMULATORS / N < 6 ? ACCUMULATORS / N : 6;
  const int vectors = vectors_of(columns), pieces = rows * vectors, blocks = (pieces + MOST - 1) / MOST;
  for (int block = 0, piece = 0; block < blocks; block++) {
    const int count = (pieces - piece) / (blocks - block);
    int64_t from[MOST], to[MOST];
    for (int p = 0; p < count; p++) {
      const int64_t row = (piece + p) / vectors, column = (piece + p) % vectors * WIDTH;
      from[p] = row * op.stride_height * op.line + column * op.stride_width;
      to[p] = row * pitch + column;
    }
    plane_pieces_dispatch<N, MOST>(count, op, task, src, from, weight, y, to, output);
    piece += count;
  }
}

template <int N>
void plane_sums(const PlaneConv& op, const PlaneTask& task, const REAL* src, const REAL* weight, REAL* y, int64_t output, int rows, int columns, int pitch) {
  if constexpr (N <= 2) {
    if (op.stride_height == 1 && op.stride_width == 1 && op.dilation_height == 1 && op.dilation_width == 1) {
      if (op.kernel_height == 3) return plane_lines<3, N>(op, task, src, weight, y, output, pitch);
      if (op.kernel_height == 5) return plane_lines<5, N>(op, task, src, weight, y, output, pitch);
    }
  }
  plane_taps<N>(op, task, src, weight, y, output, rows, columns, pitch);
}

// Numbers of one output of a task, combined in windows, to where they belong.
INLINE void plane_write(const PlaneConv& op, const PlaneTask& task, REAL* y, int pitch, REAL* out) {
  const int height = op.pool_height, width = op.pool_width;
  for (int row = 0; row < task.rows; row += height) {
    REAL *line = y + row * pitch, *to = out + row / height * op.out_line;
    if (height * width > 1) {
      const bool sum = op.pool.kind == MAP_SUM;
      for (int k = 1; k < height; k++)
        for (int x = 0; x < task.columns; x += WIDTH) {
          const Vector a = load(line + x), b = load(line + k * pitch + x);
          store(line + x, sum ? a + b : maximum(a, b));
        }
      if (width == 2) {  // forwards, in place
        for (int x = 0; x < task.columns; x += 2 * WIDTH) {
          const Vector a = load(line + x), b = load(line + x + WIDTH), even = every_second<0>(a, b), odd = every_second<1>(a, b);
          store(line + x / 2, sum ? (even + odd) * (REAL)op.pool.factor : maximum(even, odd));
        }
      } else for (int x = 0; x < task.columns; x += width) {
        REAL value = line[x];
        for (int k = 1; k < width; k++) {
          const REAL other = line[x + k];
          value = sum ? value + other : other > value || other != other ? other : value;
        }
        line[x / width] = sum ? value * (REAL)op.pool.factor : value;
      }
    }
    const int columns = task.columns / width;
    if (op.out_pixel == 1)
      for (int x = 0; x < columns; x += WIDTH) store_first(to + x, load(line + x), std::min(WIDTH, columns - x));
    else
      for (int x = 0; x < columns; x++) to[x * op.out_pixel] = line[x];
  }
}

void plane_conv(const PlaneConv& op, const REAL* src, REAL* dst, int begin, int end) {
  static thread_local std::vector<REAL> scratch;
  for (int index = begin; index < end; index++) {
    const PlaneTask& task = op.task[index];
    const int rows = op.flat ? 1 : task.rows, columns = op.flat ? task.rows * task.columns : task.columns;
    const int pitch = op.flat ? task.columns : vectors_of(columns) * WIDTH;
    const int64_t numbers = (int64_t)rows * vectors_of(columns) * WIDTH;
    scratch.resize(std::max(scratch.size(), (size_t)(task.outputs * numbers + 2 * WIDTH)));
    REAL* y = scratch.data();
    const int64_t group = task.output / op.outputs_per_group;
    const REAL* x = src + group * op.inputs_per_group * op.plane + (int64_t)task.row * op.stride_height * op.line + task.column * op.stride_width;
    const REAL* weight = op.weight + (int64_t)task.output * op.inputs_per_group * op.kernel_height * op.kernel_width;
    switch (task.outputs) {
      case 1: plane_sums<1>(op, task, x, weight, y, numbers, rows, columns, pitch); break;
      case 2: plane_sums<2>(op, task, x, weight, y, numbers, rows, columns, pitch); break;
      default: plane_sums<4>(op, task, x, weight, y, numbers, rows, columns, pitch); break;
    }
    const bool rectified = op.pool.function.kind == RELU;
    // Only for whole windows a rectangle reaches beyond its ROI: there the scale is 0.
    const bool beyond = !task.uniform && op.pool_height * op.pool_width > 1;
    const REAL *scale = op.scale + task.value_start, *shift = op.shift + task.value_start;
    for (int n = 0; n < task.outputs; n++) {
      const Vector one_scale = broadcast(scale[n]), one_shift = broadcast(shift[n]);
      for (int64_t k = n * numbers; k < (n + 1) * numbers; k += WIDTH) {
        const Vector a = task.uniform ? one_scale : load(scale + k), b = task.uniform ? one_shift : load(shift + k);
        Vector v = load(y + k) * a + b;
        if (beyond) v = a == Vector{} ? b : v;
        store(y + k, rectified ? relu(v) : v);
      }
    }
    if (op.pool.function.kind > RELU) apply(op.pool.function, y, task.outputs * numbers);
    for (int n = 0; n < task.outputs; n++)
      plane_write(op, task, y + n * numbers, pitch,
                  dst + (task.output + n) * op.out_channel + task.row / op.pool_height * op.out_line + task.column / op.pool_width * op.out_pixel);
  }
}

// What is done to the numbers of one plane. Its own copies: what is stored could be anything else's.
struct PlaneWindow {
  const bool scaled, summed, rectified;
  const Vector scale, shift;
  const Function function;

  PlaneWindow(const PlaneGather& op, int c)
      : scaled(op.scale), summed(op.pool.kind == MAP_SUM), rectified(op.pool.function.kind == RELU), scale(broadcast(op.scale ? op.scale[c] : 1)),
        shift(broadcast(op.scale ? op.shift[c] : 0)), function(op.pool.function) {}
  INLINE Vector of(Vector x) const {
    if (scaled) x = x * scale + shift;
    if (rectified) return relu(x);
    return function.kind > RELU ? value_of(function, x) : x;
  }
  INLINE Vector combined(Vector a, Vector b) const { return summed ? a + b : maximum(a, b); }
};

// Line y of a pooled plane, whose source begins at `x`.
void plane_pooled_line(const PlaneGather& op, const PlaneWindow& window, const REAL* x, int line, int y, REAL* out) {
  const int stride = op.stride_width, dilation = op.dilation_width, kernel = op.kernel_width, width = op.width, outputs = op.out_width;
  const Vector factor = broadcast(window.summed ? (REAL)op.pool.factor : 1);
  // The outputs whose windows lie inside the plane's columns: [inner, outer).
  const int reach = (kernel - 1) * dilation, room = width - 1 - reach + op.left;
  const int inner = std::min(outputs, (op.left + stride - 1) / stride), outer = room < 0 ? inner : std::max(inner, std::min(outputs, room / stride + 1));
  for (int o = 0; o < outputs;) {
    const int count = o >= inner && o < outer ? std::min(WIDTH, outer - o) : 1, first = o * stride - op.left;
    Vector result = {};
    bool begun = false;
    for (int ky = 0; ky < op.kernel_height; ky++) {
      const int row = y * op.stride_height - op.top + ky * op.dilation_height;
      if (row < 0 || row >= op.height) continue;
      for (int kx = 0; kx < kernel; kx++) {
        const int column = first + kx * dilation;
        if (column < 0 || column >= width) continue;
        const REAL* at = x + (int64_t)row * line + column;
        const Vector value = window.of(count == 1 ? broadcast(*at) : load_strided(at, stride, count));
        result = begun ? window.combined(result, value) : value;
        begun = true;
      }
    }
    store_first(out + o, result * factor, count);
    o += count;
  }
}

// The same of windows of two columns side by side: lines are combined first.
void plane_halved_line(const PlaneGather& op, const PlaneWindow& window, const REAL* x, int line, int y, REAL* out) {
  const Vector factor = broadcast(window.summed ? (REAL)op.pool.factor : 1);
  const int outputs = op.out_width, height = op.kernel_height;
  x += (int64_t)y * op.stride_height * line;
  for (int o = 0; o < outputs; o += WIDTH) {
    Vector a = window.of(load(x + 2 * o)), b = window.of(load(x + 2 * o + WIDTH));
    for (int ky = 1; ky < height; ky++) {
      const REAL* at = x + (int64_t)ky * op.dilation_height * line + 2 * o;
      a = window.combined(a, window.of(load(at)));
      b = window.combined(b, window.of(load(at + WIDTH)));
    }
    store_first(out + o, window.combined(every_second<0>(a, b), every_second<1>(a, b)) * factor, std::min(WIDTH, outputs - o));
  }
}

void plane_gather(const PlaneGather& op, const REAL* memory, REAL* dst, int begin, int end) {
  const bool pooled = op.kernel_height * op.kernel_width > 1 || op.stride_height > 1 || op.stride_width > 1;
  const bool whole = op.out_width == 1 && op.out_height == 1 && op.kernel_width == op.width && op.kernel_height == op.height && op.top == 0 && op.left == 0;
  const bool inside = op.top == 0 && (op.out_height - 1) * op.stride_height + (op.kernel_height - 1) * op.dilation_height < op.height;
  const bool halved = inside && op.left == 0 && op.kernel_width == 2 && op.stride_width == 2 && op.dilation_width == 1 && 2 * op.out_width <= op.width;
  const int width = op.out_width, operands = op.operands;
  for (int part = begin; part < end; part++) {
    const int c = part % op.channels, top = part / op.channels * op.band, bottom = std::min(op.out_height, top + op.band);
    const PlaneWindow window(op, c);
    const int32_t *source = op.source + (int64_t)c * operands, *line = op.line + (int64_t)c * operands;
    REAL* out = dst + c * op.out_plane + top * op.out_line;
    if (whole && window.summed) {
      Vector total = {};
      for (int y = 0; y < op.height; y++)
        for (int x = 0; x < op.width; x += WIDTH)
          total += first_of(window.of(load(memory + source[0] + y * line[0] + x)), std::min(WIDTH, op.width - x));
      *out = sum(total) * (REAL)op.pool.factor;
      continue;
    }
    for (int y = top; y < bottom; y++, out += op.out_line) {
      const REAL* x = memory + source[0] + (int64_t)y * line[0];
      if (halved) {
        plane_halved_line(op, window, memory + source[0], line[0], y, out);
      } else if (pooled) {
        plane_pooled_line(op, window, memory + source[0], line[0], y, out);
      } else if (operands == 1) {
        int i = 0;
        for (; i + WIDTH <= width; i += WIDTH) store(out + i, window.of(load(x + i)));
        if (i < width) store_first(out + i, window.of(load(x + i)), width - i);
      } else {
        for (int i = 0; i < width; i += WIDTH) {
          Vector value = load(x + i);
          for (int k = 1; k < operands; k++) {
            const REAL* other = memory + source[k] + (int64_t)y * line[k];
            const Vector factor = op.one_pixel ? broadcast(memory[source[k]]) : load(other + i);
            value = op.combined == MAP_PRODUCT ? value * factor : value + factor;
          }
          store_first(out + i, value, std::min(WIDTH, width - i));
        }
      }
    }
  }
}

// Parts [begin, end): bands of lines of a channel, the channels of the first band first.
void plane_resample(const PlaneResample& op, const REAL* memory, REAL* dst, int begin, int end) {
  static thread_local std::vector<REAL> scratch;
  scratch.resize(std::max(scratch.size(), (size_t)op.width + 2 * WIDTH));
  REAL* sums = scratch.data();  // of a line's columns
  const int taps = op.line_taps, pitch = op.column_pitch;
  for (int part = begin; part < end; part++) {
    const int c = part % op.channels, top = part / op.channels * op.band, bottom = std::min(op.out_height, top + op.band);
    const Vector scale = broadcast(op.scale ? op.scale[c] : 1), shift = broadcast(op.shift ? op.shift[c] : 0);
    for (int y = top; y < bottom; y++) {
      const REAL *x = memory + op.source[c] + (int64_t)op.first_line[y] * op.line[c], *weight = op.line_weight + (int64_t)y * taps;
      for (int i = 0; i < op.width; i += WIDTH) {
        Vector total = {};
        for (int k = 0; k < taps; k++) {
          if (weight[k] == 0) continue;
          Vector value = load(x + (int64_t)k * op.line[c] + i);
          if (op.scale) value = value * scale + shift;
          total += value_of(op.function, value) * weight[k];
        }
        store(sums + i, total);
      }
      REAL* out = dst + c * op.out_plane + y * op.out_line;
      for (int i = 0; i < op.out_width; i += WIDTH) {
        const Places first = load_places(op.first_column + i);
        Vector total = {};
        for (int k = 0; k < op.column_taps; k++) {
          const Vector factor = load(op.column_weight + (int64_t)k * pitch + i), product = gathered(sums, first + k) * factor;
          total += factor == Vector{} ? Vector{} : product;
        }
        store_first(out + i, total, std::min(WIDTH, op.out_width - i));
      }
    }
  }
}

}  // namespace
