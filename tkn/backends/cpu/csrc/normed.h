// A batch normalisation by the batch's own statistics, a ReLU and a 3x3 target convolution (stride 1, one zero around the
// map) of bfloat16 maps [B, C, H, W], in one: forward and backward.
//
// Vectors go along the rows of a map. Each image is normalised anew into planes with a border of zeros, small enough for
// the second-level cache, which all kernels then read: neither the normalised map nor its gradient is ever whole in memory.
// The convolution and its input's gradient multiply pairs of channels, the weight's gradient pairs of neighbouring pixels.
#pragma once

#include <omp.h>

#include "bfloat16.h"

extern "C" {

struct NormedConv {
  int32_t batch, channels, outputs, height, width;
  const uint16_t* x;                    // [batch][channels][height][width]
  const float *mean, *rstd;             // [channels]: of the batch
  const float *factor, *shift;          // [channels]: factor * x + shift is the normalised x
  const int32_t* roi;                   // [outputs][4]: top, bottom, left, right, half-open
  const float* window;                  // [outputs][height][width]
  const uint32_t* weight;               // pairs of channels: [outputs][(channels + 1) / 2][9]
  const uint32_t* turned;               // pairs of outputs: [channels][(outputs + 1) / 2][9], the taps in reverse
  uint16_t* y;                          // [batch][outputs][height][width]
  const uint16_t* grad_y;
  uint16_t* grad_x;
  float *grad_factor, *grad_shift;      // [channels]: of the normalisation's weight and bias
  float *grad_weight, *grad_window;     // [outputs][channels][9], [outputs][height][width]
};

}  // extern "C"

#if BFLOAT16_PRODUCTS

namespace {

namespace normed {

typedef __m512 Floats;
constexpr int LANES = 16, TAPS = 9;
// Rows whose sums stay in registers.
constexpr int MOST_ROWS = 12;

INLINE __mmask16 first(int count) { return count >= LANES ? 0xffff : (1 << count) - 1; }
INLINE Floats load(const uint16_t* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
INLINE __m256i rounded(Floats x) { return __builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(x)); }
INLINE void store(uint16_t* x, __mmask16 mask, __m256i v) { _mm256_mask_storeu_epi16(x, mask, v); }
// a in the low halves, b in the high ones.
INLINE __m512i pairs_of(__m256i a, __m256i b) { return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)); }
INLINE Floats plus_products(Floats sums, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sums, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
}

// Where the pixels of a map lie in a plane: one row and column of zeros around it, and what a vector that begins at its last
// column reaches.
struct Plane {
  int stride, size;
  Plane(const NormedConv& op, int lanes) : stride((op.width + 1 + lanes + 15) / 16 * 16), size((op.height + 2) * stride) {}
  int at(int row, int column) const { return (row + 1) * stride + column + 1; }
};

struct Roi {
  int top, bottom, left, right;
  Roi(const NormedConv& op, int output)
      : top(op.roi[4 * output]), bottom(op.roi[4 * output + 1]), left(op.roi[4 * output + 2]), right(op.roi[4 * output + 3]) {}
  bool empty() const { return top >= bottom || left >= right; }
};

INLINE const uint16_t* map_of(const NormedConv& op, int image, int channel) {
  return op.x + ((int64_t)image * op.channels + channel) * op.height * op.width;
}

// f(row, column, mask) for each vector of a map.
template <class F>
INLINE void each_vector(const NormedConv& op, const F& f) {
  for (int row = 0; row < op.height; row++)
    for (int column = 0; column < op.width; column += LANES) f(row, column, first(op.width - column));
}

// As torch's ReLU: NaN stays NaN.
INLINE __m256i normalised(const NormedConv& op, int channel, const uint16_t* x, __mmask16 mask) {
  const Floats v = _mm512_fmadd_ps(load(x, mask), _mm512_set1_ps(op.factor[channel]), _mm512_set1_ps(op.shift[channel]));
  return rounded(_mm512_max_ps(_mm512_setzero_ps(), v));
}

// An image, normalised and rectified, as planes of pairs of channels; an odd channel with zeros.
void normalise_pairs(const NormedConv& op, int image, const Plane& plane, uint32_t* to) {
  for (int c = 0; c < op.channels; c += 2, to += plane.size) {
    const bool two = c + 1 < op.channels;
    const uint16_t *x0 = map_of(op, image, c), *x1 = map_of(op, image, c + two);
    each_vector(op, [&](int row, int column, __mmask16 mask) {
      const int at = row * op.width + column;
      const __m256i second = two ? normalised(op, c + 1, x1 + at, mask) : _mm256_setzero_si256();
      _mm512_mask_storeu_epi32(to + plane.at(row, column), mask, pairs_of(normalised(op, c, x0 + at, mask), second));
    });
  }
}

// The same as a plane for each channel.
void normalise(const NormedConv& op, int image, const Plane& plane, uint16_t* to) {
  for (int c = 0; c < op.channels; c++, to += plane.size) {
    const uint16_t* x = map_of(op, image, c);
    each_vector(op, [&](int row, int column, __mmask16 mask) {
      store(to + plane.at(row, column), mask, normalised(op, c, x + row * op.width + column, mask));
    });
  }
}

// A vector of each of ROWS rows below each other: sums over the listed planes of pairs, of which `source` is where the vector
// above the first row and left of it begins in the first.
template <int ROWS>
INLINE void convolve_rows(const uint32_t* source, const Plane& plane, const int* list, int count, const uint32_t* weight, Floats* out) {
  Floats sums[ROWS];
  for (int r = 0; r < ROWS; r++) sums[r] = _mm512_setzero_ps();
  for (int j = 0; j < count; j++) {
    const uint32_t *x = source + (int64_t)list[j] * plane.size, *w = weight + list[j] * TAPS;
    for (int kx = 0; kx < 3; kx++) {
      const __m512i w0 = _mm512_set1_epi32(w[kx]), w1 = _mm512_set1_epi32(w[3 + kx]), w2 = _mm512_set1_epi32(w[6 + kx]);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS + 2; r++) {
        const __m512i v = _mm512_loadu_si512(x + r * plane.stride + kx);
        if (r < ROWS) sums[r] = plus_products(sums[r], w0, v);
        if (r >= 1 && r < ROWS + 1) sums[r - 1] = plus_products(sums[r - 1], w1, v);
        if (r >= 2) sums[r - 2] = plus_products(sums[r - 2], w2, v);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) out[r] = sums[r];
}
template <int ROWS>
__attribute__((noinline)) void convolve(int rows, const uint32_t* source, const Plane& plane, const int* list, int count, const uint32_t* weight, Floats* out) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return convolve<ROWS - 1>(rows, source, plane, list, count, weight, out);
  }
  convolve_rows<ROWS>(source, plane, list, count, weight, out);
}

// f(first row, rows) for blocks of rows as even as can be.
template <class F>
INLINE void each_block(int top, int bottom, const F& f) {
  const int total = bottom - top, blocks = (total + MOST_ROWS - 1) / MOST_ROWS;
  for (int j = 0; j < blocks; j++) f(top + j * total / blocks, (j + 1) * total / blocks - j * total / blocks);
}

// The mean of a map and the sum of squared distances from it.
void moments(const uint16_t* x, int pixels, double* to) {
  Floats sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int i = 0; i < pixels; i += LANES) sum = _mm512_add_ps(sum, load(x + i, first(pixels - i)));
  const float mean = _mm512_reduce_add_ps(sum) / pixels;
  for (int i = 0; i < pixels; i += LANES) {
    const __mmask16 mask = first(pixels - i);
    const Floats distance = _mm512_maskz_sub_ps(mask, load(x + i, mask), _mm512_set1_ps(mean));
    squares = _mm512_fmadd_ps(distance, distance, squares);
  }
  to[0] = mean;
  to[1] = _mm512_reduce_add_ps(squares);
}

void statistics(const NormedConv& op, float* mean, float* variance, int threads) {
  const int pixels = op.height * op.width;
  std::vector<double> of_maps((size_t)op.batch * op.channels * 2);
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads) if (threads > 1)
  for (int b = 0; b < op.batch; b++)
    for (int c = 0; c < op.channels; c++) moments(map_of(op, b, c), pixels, of_maps.data() + ((size_t)c * op.batch + b) * 2);
  for (int c = 0; c < op.channels; c++) {
    const double* maps = of_maps.data() + (size_t)c * op.batch * 2;
    double m = 0, v = 0;
    for (int b = 0; b < op.batch; b++) m += maps[2 * b] / op.batch;
    for (int b = 0; b < op.batch; b++) v += maps[2 * b + 1] + pixels * (maps[2 * b] - m) * (maps[2 * b] - m);
    mean[c] = m;
    variance[c] = v / ((double)pixels * op.batch);
  }
}

void forward(const NormedConv& op, int threads) {
  const int pairs = (op.channels + 1) / 2, map = op.height * op.width;
  const Plane plane(op, LANES);
  std::vector<int> all(pairs);
  for (int i = 0; i < pairs; i++) all[i] = i;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint32_t> planes((size_t)pairs * plane.size);
#pragma omp for schedule(static)
    for (int b = 0; b < op.batch; b++) {
      normalise_pairs(op, b, plane, planes.data());
      uint16_t* y = op.y + (int64_t)b * op.outputs * map;
      std::memset(y, 0, sizeof *y * op.outputs * map);
      for (int k = 0; k < op.outputs; k++) {
        const Roi roi(op, k);
        for (int column = roi.left; column < roi.right; column += LANES)
          each_block(roi.top, roi.bottom, [&](int row, int rows) {
            Floats sums[MOST_ROWS];
            convolve<MOST_ROWS>(rows, planes.data() + plane.at(row - 1, column - 1), plane, all.data(), pairs, op.weight + (int64_t)k * pairs * TAPS, sums);
            const __mmask16 mask = first(roi.right - column);
            for (int r = 0; r < rows; r++) {
              const int64_t at = (int64_t)k * map + (row + r) * op.width + column;
              store(y + at, mask, rounded(_mm512_mul_ps(sums[r], _mm512_maskz_loadu_ps(mask, op.window + at))));
            }
          });
      }
    }
  }
}

// What a thread adds up, each sum that is not a window's in the lanes of a vector.
struct Sums {
  size_t weight, window, norm;
  explicit Sums(const NormedConv& op)
      : weight((size_t)op.outputs * op.channels * TAPS * LANES), window((size_t)op.outputs * op.height * op.width), norm((size_t)op.channels * 2 * LANES) {}
  size_t size() const { return weight + window + norm; }
};

// An image's gradient of the convolution, in planes, and of the window, added to `sums`. As y is the convolution times the
// window, this is the sum of grad_y * y, yet to be divided by the window.
void weigh_gradient(const NormedConv& op, int image, const Plane& plane, uint16_t* planes, float* sums) {
  const int map = op.height * op.width;
  const int64_t first_map = (int64_t)image * op.outputs * map;
  for (int k = 0; k < op.outputs; k++, planes += plane.size) {
    const Roi roi(op, k);
    for (int row = roi.top; row < roi.bottom; row++)
      for (int column = roi.left; column < roi.right; column += LANES) {
        const __mmask16 mask = first(roi.right - column);
        const int64_t at = (int64_t)k * map + row * op.width + column;
        const Floats grad = load(op.grad_y + first_map + at, mask), y = load(op.y + first_map + at, mask);
        _mm512_mask_storeu_ps(sums + at, mask, _mm512_fmadd_ps(grad, y, _mm512_maskz_loadu_ps(mask, sums + at)));
        store(planes + plane.at(row, column), mask, rounded(_mm512_mul_ps(grad, _mm512_maskz_loadu_ps(mask, op.window + at))));
      }
  }
}

// Planes of single channels as planes of pairs; an odd one with zeros.
void to_pairs(const NormedConv& op, int channels, const Plane& single, const uint16_t* from, const Plane& paired, uint32_t* to) {
  for (int c = 0; c < channels; c += 2, from += 2 * single.size, to += paired.size)
    each_vector(op, [&](int row, int column, __mmask16 mask) {
      const uint16_t* x = from + single.at(row, column);
      const __m256i second = c + 1 < channels ? _mm256_maskz_loadu_epi16(mask, x + single.size) : _mm256_setzero_si256();
      _mm512_mask_storeu_epi32(to + paired.at(row, column), mask, pairs_of(_mm256_maskz_loadu_epi16(mask, x), second));
    });
}

// The products of `rows` rows of a gradient with those of N channels that each tap reaches, added to the channels' sums.
template <int N>
INLINE void outer(const uint16_t* grad, const uint16_t* x, const Plane& plane, int rows, float* sums) {
  Floats added[N][TAPS];
  for (int c = 0; c < N; c++)
    for (int t = 0; t < TAPS; t++) added[c][t] = _mm512_loadu_ps(sums + (c * TAPS + t) * LANES);
  __m512i meets[3] = {};  // the gradient's rows that a row of x meets as its upper, middle, lower one
  for (int r = 0; r < rows + 2; r++) {
    meets[2] = meets[1];
    meets[1] = meets[0];
    meets[0] = r < rows ? _mm512_loadu_si512(grad + r * plane.stride) : _mm512_setzero_si512();
    for (int c = 0; c < N; c++)
      for (int kx = 0; kx < 3; kx++) {
        const __m512i v = _mm512_loadu_si512(x + c * plane.size + r * plane.stride + kx);
        for (int ky = 0; ky < 3; ky++) added[c][3 * ky + kx] = plus_products(added[c][3 * ky + kx], meets[ky], v);
      }
  }
  for (int c = 0; c < N; c++)
    for (int t = 0; t < TAPS; t++) _mm512_storeu_ps(sums + (c * TAPS + t) * LANES, added[c][t]);
}

void weight_gradient(const NormedConv& op, const Plane& plane, const uint16_t* grad, const uint16_t* x, float* sums) {
  for (int k = 0; k < op.outputs; k++) {
    const Roi roi(op, k);
    if (roi.empty()) continue;
    for (int column = roi.left; column < roi.right; column += 2 * LANES)
      for (int c = 0; c < op.channels; c += 2) {
        const uint16_t *g = grad + (int64_t)k * plane.size + plane.at(roi.top, column), *from = x + (int64_t)c * plane.size + plane.at(roi.top - 1, column - 1);
        float* to = sums + ((int64_t)k * op.channels + c) * TAPS * LANES;
        if (c + 1 < op.channels) outer<2>(g, from, plane, roi.bottom - roi.top, to);
        else outer<1>(g, from, plane, roi.bottom - roi.top, to);
      }
  }
}

// The pairs of outputs of which one reaches into a block of rows and a vector of columns.
void reaching(const NormedConv& op, int row, int rows, int column, std::vector<int>& list) {
  list.clear();
  for (int k = 0; k < op.outputs; k++) {
    const Roi roi(op, k);
    const bool reaches = !roi.empty() && roi.top - 1 < row + rows && roi.bottom + 1 > row && roi.left - 1 < column + LANES && roi.right + 1 > column;
    if (reaches && (list.empty() || list.back() != k / 2)) list.push_back(k / 2);
  }
}

// An image's gradient of the normalised map, where the ReLU lets it through, into grad_x; its sums, alone and times the x of
// mean 0 and deviation 1, are added to `sums`.
void rectified_gradient(const NormedConv& op, int image, const Plane& plane, const uint32_t* grad, std::vector<int>& list, float* sums) {
  const int pairs = (op.outputs + 1) / 2;
  each_block(0, op.height, [&](int row, int rows) {
    for (int column = 0; column < op.width; column += LANES) {
      reaching(op, row, rows, column, list);
      const __mmask16 mask = first(op.width - column);
      for (int c = 0; c < op.channels; c++) {
        const uint16_t* x = map_of(op, image, c) + row * op.width + column;
        uint16_t* to = op.grad_x + (x - op.x);
        if (list.empty()) {
          for (int r = 0; r < rows; r++) store(to + r * op.width, mask, _mm256_setzero_si256());
          continue;
        }
        Floats out[MOST_ROWS];
        convolve<MOST_ROWS>(rows, grad + plane.at(row - 1, column - 1), plane, list.data(), list.size(), op.turned + (int64_t)c * pairs * TAPS, out);
        const Floats mean = _mm512_set1_ps(op.mean[c]), rstd = _mm512_set1_ps(op.rstd[c]);
        const Floats factor = _mm512_set1_ps(op.factor[c]), shift = _mm512_set1_ps(op.shift[c]);
        float* sum = sums + c * 2 * LANES;
        Floats alone = _mm512_loadu_ps(sum), times = _mm512_loadu_ps(sum + LANES);
        for (int r = 0; r < rows; r++) {
          const Floats v = load(x + r * op.width, mask);
          // As torch's ReLU: a gradient goes through NaN.
          const __mmask16 on = _mm512_mask_cmp_ps_mask(mask, _mm512_fmadd_ps(v, factor, shift), _mm512_setzero_ps(), _CMP_NLE_UQ);
          const Floats g = _mm512_maskz_mov_ps(on, out[r]);
          alone = _mm512_add_ps(alone, g);
          times = _mm512_fmadd_ps(g, _mm512_mul_ps(_mm512_sub_ps(v, mean), rstd), times);
          store(to + r * op.width, mask, rounded(g));
        }
        _mm512_storeu_ps(sum, alone);
        _mm512_storeu_ps(sum + LANES, times);
      }
    }
  });
}

// From the gradient of a normalised map, in grad_x, that of x: less its mean, and less what it has in common with x.
void input_gradient(const NormedConv& op, int image, int channel) {
  const int pixels = op.height * op.width;
  const uint16_t* x = map_of(op, image, channel);
  uint16_t* to = op.grad_x + (x - op.x);
  const float each = 1.0f / ((float)op.batch * pixels), factor = op.factor[channel];
  const float slope = -factor * op.rstd[channel] * op.grad_factor[channel] * each;
  const float constant = -factor * op.grad_shift[channel] * each - slope * op.mean[channel];
  for (int i = 0; i < pixels; i += LANES) {
    const __mmask16 mask = first(pixels - i);
    const Floats taken = _mm512_fmadd_ps(_mm512_set1_ps(slope), load(x + i, mask), _mm512_set1_ps(constant));
    store(to + i, mask, rounded(_mm512_fmadd_ps(_mm512_set1_ps(factor), load(to + i, mask), taken)));
  }
}

// Each thread adds up its own images, always the same ones; then all add up the threads' sums in their order.
void backward(const NormedConv& op, int threads) {
  const Plane paired(op, LANES), single(op, 2 * LANES);
  const Sums size(op);
  std::vector<float> sums(size.size() * threads);
  const auto sum_of = [&](size_t at) {
    float total = 0;
    for (int t = 0; t < threads; t++) total += _mm512_reduce_add_ps(_mm512_loadu_ps(sums.data() + t * size.size() + at));
    return total;
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* weight = sums.data() + size.size() * omp_get_thread_num();
    float *window = weight + size.weight, *norm = window + size.window;
    std::vector<uint16_t> planes((size_t)op.channels * single.size), grads((size_t)op.outputs * single.size);
    std::vector<uint32_t> grad_pairs((size_t)(op.outputs + 1) / 2 * paired.size);
    std::vector<int> list;
#pragma omp for schedule(static)
    for (int b = 0; b < op.batch; b++) {
      normalise(op, b, single, planes.data());
      weigh_gradient(op, b, single, grads.data(), window);
      to_pairs(op, op.outputs, single, grads.data(), paired, grad_pairs.data());
      weight_gradient(op, single, grads.data(), planes.data(), weight);
      rectified_gradient(op, b, paired, grad_pairs.data(), list, norm);
    }
#pragma omp for schedule(static)
    for (int i = 0; i < op.outputs * op.channels * TAPS; i++) op.grad_weight[i] = sum_of((size_t)i * LANES);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < (int64_t)size.window; i++) {
      float total = 0;
      for (int t = 0; t < threads; t++) total += sums[t * size.size() + size.weight + i];
      // A window that is zero as a float has a slope that is zero too.
      op.grad_window[i] = op.window[i] == 0 ? 0 : total / op.window[i];
    }
#pragma omp for schedule(static)
    for (int c = 0; c < op.channels; c++) {
      const size_t at = size.weight + size.window + (size_t)c * 2 * LANES;
      op.grad_shift[c] = sum_of(at);
      op.grad_factor[c] = sum_of(at + LANES);
    }
#pragma omp for schedule(static) collapse(2)
    for (int b = 0; b < op.batch; b++)
      for (int c = 0; c < op.channels; c++) input_gradient(op, b, c);
  }
}

}  // namespace normed

}  // namespace

#endif
