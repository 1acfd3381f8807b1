// What a plan does among the channels of a pixel: selecting some of them, and normalising them.
#pragma once

#include "planes.h"

extern "C" {

// Some channels of maps in any order of their numbers, scaled and shifted, side by side.
struct MapSelect {
  int32_t width;                        // of the maps
  const int32_t* out;                   // [pixels] where each begins
  int64_t out_channel;                  // numbers between the output's channels
  int32_t channels;
  const int32_t *first, *line, *pixel;  // [channels, and a vector more] where each begins, numbers between lines and pixels
  const REAL *scale, *shift;            // [channels] or null
  Function function;
};

// (x - mean) / sqrt(variance + eps) * scale + shift of each pixel's channels, in maps that are both planar or both not.
struct MapNorm {
  int32_t channels, width;
  int64_t channel, line, pixel;              // of the source: numbers between channels, lines and pixels
  int64_t out_channel, out_line, out_pixel;
  const REAL *scale, *shift;                 // [channels, and a vector more]
  double eps;
};

// The same of rows. A pixel's channels without a row are known: how many they are, their mean, and the sum of the squares of
// their differences from it.
struct RowNorm {
  int32_t channels;
  const int32_t* row;       // [pixels][channels], -1: none
  const int32_t* out_base;  // [pixels] the first of a pixel's rows, of which there are as many as channels
  const REAL *known, *known_mean, *known_square;  // [pixels]
  const REAL* outside;      // [channels] where they have no row
  const REAL *scale, *shift;  // [channels]
  double eps;
};

}  // extern "C"

namespace {

// Pixels [begin, end).
void map_select(const MapSelect& op, const REAL* src, REAL* dst, int begin, int end) {
  for (int p = begin; p < end; p++) {
    const int y = p / op.width, x = p % op.width;
    for (int k = 0; k < op.channels; k += WIDTH) {
      Vector value = gathered(src, load_places(op.first + k) + load_places(op.line + k) * y + load_places(op.pixel + k) * x);
      if (op.scale) value = value * load(op.scale + k) + load(op.shift + k);
      value = value_of(op.function, value);
      store_strided(dst + op.out[p] + k * op.out_channel, op.out_channel, value, std::min(WIDTH, op.channels - k));
    }
  }
}

// 1 / sqrt(x)
template <class V>
INLINE V inverse_root(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(REAL); i++) x[i] = 1 / std::sqrt(x[i]);
  return x;
}

// A pixel's channels side by side.
INLINE void map_norm_pixel(const MapNorm& op, const REAL* x, REAL* out) {
  const int channels = op.channels, whole = channels / WIDTH * WIDTH;
  Vector total = {}, square = {};
  for (int k = 0; k < channels; k += WIDTH) total += k == whole ? first_of(load(x + k), channels - k) : load(x + k);
  const Vector mean = broadcast(sum(total) / channels);
  for (int k = 0; k < channels; k += WIDTH) {
    Vector difference = load(x + k) - mean;
    if (k == whole) difference = first_of(difference, channels - k);
    square += difference * difference;
  }
  const Vector factor = broadcast(1 / std::sqrt(sum(square) / channels + (REAL)op.eps));
  for (int k = 0; k < channels; k += WIDTH) {
    const Vector y = (load(x + k) - mean) * factor * load(op.scale + k) + load(op.shift + k);
    store_strided(out + k * op.out_channel, op.out_channel, y, std::min(WIDTH, channels - k));
  }
}

// `count` pixels of a line, of which each channel's lie side by side.
INLINE void map_norm_columns(const MapNorm& op, const REAL* x, REAL* out, int count) {
  const int channels = op.channels;
  Vector mean = {}, square = {};
  for (int c = 0; c < channels; c++) mean += load(x + c * op.channel);
  mean = mean / (REAL)channels;
  for (int c = 0; c < channels; c++) {
    const Vector difference = load(x + c * op.channel) - mean;
    square += difference * difference;
  }
  const Vector factor = inverse_root(square / (REAL)channels + (REAL)op.eps);
  for (int c = 0; c < channels; c++)
    store_first(out + c * op.out_channel, (load(x + c * op.channel) - mean) * factor * op.scale[c] + op.shift[c], count);
}

// Lines [begin, end).
void map_norm(const MapNorm& op, const REAL* src, REAL* dst, int begin, int end) {
  for (int y = begin; y < end; y++)
    if (op.channel == 1)
      for (int x = 0; x < op.width; x++) map_norm_pixel(op, src + y * op.line + x * op.pixel, dst + y * op.out_line + x * op.out_pixel);
    else
      for (int x = 0; x < op.width; x += WIDTH) map_norm_columns(op, src + y * op.line + x, dst + y * op.out_line + x, std::min(WIDTH, op.width - x));
}

// Pixels [begin, end).
template <class V, int NV>
void row_norm(const RowNorm& op, const REAL* src, REAL* dst, int begin, int end) {
  constexpr int SIZE = sizeof(V) / sizeof(REAL), LANES = NV * SIZE;
  const int channels = op.channels;
  for (int p = begin; p < end; p++) {
    const int32_t* row = op.row + (int64_t)p * channels;
    const REAL known = op.known[p];
    V mean[NV], factor[NV];
    for (int v = 0; v < NV; v++) mean[v] = broadcast<V>(known * op.known_mean[p]);
    for (int c = 0; c < channels; c++)
      if (row[c] >= 0)
        for (int v = 0; v < NV; v++) mean[v] += load<V>(src + (int64_t)row[c] * LANES + v * SIZE);
    for (int v = 0; v < NV; v++) {
      mean[v] = mean[v] / (REAL)channels;
      const V difference = op.known_mean[p] - mean[v];
      factor[v] = known * difference * difference + op.known_square[p];
    }
    for (int c = 0; c < channels; c++)
      if (row[c] >= 0)
        for (int v = 0; v < NV; v++) {
          const V difference = load<V>(src + (int64_t)row[c] * LANES + v * SIZE) - mean[v];
          factor[v] += difference * difference;
        }
    for (int v = 0; v < NV; v++) factor[v] = inverse_root(factor[v] / (REAL)channels + (REAL)op.eps);
    REAL* out = dst + (int64_t)op.out_base[p] * LANES;
    for (int c = 0; c < channels; c++, out += LANES)
      for (int v = 0; v < NV; v++) {
        const V x = row[c] >= 0 ? load<V>(src + (int64_t)row[c] * LANES + v * SIZE) : broadcast<V>(op.outside[c]);
        store(out + v * SIZE, (x - mean[v]) * factor[v] * op.scale[c] + op.shift[c]);
      }
  }
}

}  // namespace
