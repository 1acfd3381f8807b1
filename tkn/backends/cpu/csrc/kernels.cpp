// The ROI engine's kernels as C functions. All offsets come from the Python side, which makes the lists; see rows.py.
#include <omp.h>

#include <cmath>

#include "bfloat16.h"
#include "channels.h"
#include "normed.h"
#include "rows.h"
#include "weight_grad.h"

extern "C" {

enum Kind {
  GATHER, CONV, PACK, UNPACK,  // of rows
  MAP_GATHER, MAP_CONV, MAP_FIRST, MAP_PICK, MAP_PACK, MAP_UNPACK,
  PLANE_GATHER, PLANE_CONV,
  MAP_SELECT, MAP_NORM, PLANE_RESAMPLE,
  ROW_NORM,
  PAIR, CONV_PAIRS, MAP_PAIR, MAP_CONV_PAIRS,  // with pairs of bfloat16
};

// One step of a plan's program, from rows to rows of a tile's memory; of a dense activation: which one.
struct Instruction {
  int32_t kind;
  int32_t dense;
  const void* spec;
  int64_t src, dst;  // first rows, or numbers of a map
  int32_t parts;     // pixels, windows, lines, sets or tasks that threads may divide
  const int64_t* work;  // [parts + 1] of all parts before; null: each is as much
};

// A part of an instruction: pixels or windows [begin, end).
struct Step {
  int32_t instruction, begin, end;
};

}  // extern "C"

namespace {

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

// The first part of a thread's share of an instruction.
int first_part(const Instruction& op, int thread, int threads) {
  if (!op.work) return (int64_t)op.parts * thread / threads;
  const int64_t target = op.work[op.parts] * thread / threads;
  return std::lower_bound(op.work, op.work + op.parts, target) - op.work;
}

// Parts [begin, end) of an instruction of maps, of one image.
void run_map_parts(const Instruction& op, REAL* const* dense, REAL* map, int image, int begin, int end) {
  const REAL* src = map + op.src;
  REAL* dst = map + op.dst;
  switch (op.kind) {
    case MAP_GATHER: map_gather(*static_cast<const MapGather*>(op.spec), map, dst, begin, end); break;
    case MAP_CONV: map_conv<false>(*static_cast<const MapConv*>(op.spec), src, dst, begin, end); break;
#if BFLOAT16_PRODUCTS
    case MAP_PAIR: map_pairs(*static_cast<const MapPairing*>(op.spec), src, dst, begin, end); break;
    case MAP_CONV_PAIRS: map_conv<true>(*static_cast<const MapConv*>(op.spec), src, dst, begin, end); break;
#endif
    case MAP_FIRST: map_first(*static_cast<const MapFirst*>(op.spec), src, dst, begin, end); break;
    case PLANE_GATHER: plane_gather(*static_cast<const PlaneGather*>(op.spec), map, dst, begin, end); break;
    case PLANE_CONV: plane_conv(*static_cast<const PlaneConv*>(op.spec), src, dst, begin, end); break;
    case MAP_SELECT: map_select(*static_cast<const MapSelect*>(op.spec), map, dst, begin, end); break;
    case MAP_NORM: map_norm(*static_cast<const MapNorm*>(op.spec), src, dst, begin, end); break;
    case PLANE_RESAMPLE: plane_resample(*static_cast<const PlaneResample*>(op.spec), map, dst, begin, end); break;
    case MAP_PICK: map_pick(*static_cast<const MapPick*>(op.spec), src, dst, begin, end); break;
    default: {
      const MapDense& d = *static_cast<const MapDense*>(op.spec);
      REAL* x = dense[op.dense] + (int64_t)image * d.channels * d.height * d.width;
      if (op.kind == MAP_PACK) map_pack(d, x, dst, begin, end);
      else map_unpack(d, src, x, begin, end);
    }
  }
}

// f<T>() for the type of the numbers that are moved.
template <class F>
void with_numbers(bool halves, const F& f) {
  if (halves) f.template operator()<uint16_t>();
  else f.template operator()<REAL>();
}

}  // namespace

extern "C" {

int tkn_width() { return WIDTH; }

// Writes the sizes of the structures that Python fills, in the order of STRUCTURES in structs.py, to `sizes`, if it has
// room for all of them; returns how many they are.
int tkn_struct_sizes(int64_t* sizes, int room) {
  const int64_t all[] = {
      sizeof(Gather), sizeof(Conv), sizeof(Dense), sizeof(Instruction), sizeof(Step), sizeof(MapPool),
      sizeof(MapConv), sizeof(MapFirst), sizeof(MapGather), sizeof(MapPick), sizeof(MapDense),
      sizeof(Function), sizeof(PlaneConv), sizeof(PlaneTask), sizeof(PlaneGather),
      sizeof(MapSelect), sizeof(MapNorm), sizeof(RowNorm), sizeof(PlaneResample),
      sizeof(Pairing), sizeof(MapPairing),
      sizeof(NormedConv),
  };
  const int count = sizeof all / sizeof *all;
  if (room >= count) std::copy(all, all + count, sizes);
  return count;
}

void tkn_conv(const Conv* op, const REAL* src, int64_t src_tile, REAL* dst, int64_t dst_tile, int tiles, int lanes, int threads) {
  with_vectors(lanes, [&]<class V, int NV>() {
    parallel(tiles, op->windows ? op->windows : op->pixels, threads,
             [&](int tile, int begin, int end) { Tile<V, NV>::conv(*op, src + tile * src_tile, dst + tile * dst_tile, begin, end); });
  });
}

// Whether there are products of bfloat16.
int tkn_bfloat16() { return BFLOAT16_PRODUCTS && sizeof(REAL) == sizeof(float); }

// As tkn_conv, of products of bfloat16: neither scaled nor rectified nor pooled, `weight` in bfloat16. `pairs`: room for as
// much as `src`.
void tkn_conv_bfloat16(const Conv* op, const REAL* src, int64_t src_tile, REAL* dst, int64_t dst_tile, int source_pixels, REAL* pairs, int tiles,
                       int lanes, int threads) {
#if BFLOAT16_PRODUCTS
  parallel(tiles, source_pixels, threads,
           [&](int tile, int begin, int end) { to_pairs(*op, src + tile * src_tile, pairs + tile * src_tile, lanes, begin, end); });
  const ChannelMasks masks(*op, source_pixels);
  with_vectors(lanes, [&]<class V, int NV>() {
    parallel(1, op->pixels, threads,
             [&](int, int begin, int end) { PairTile<NV>::conv(*op, masks, pairs, src_tile, dst, dst_tile, tiles, begin, end); });
  });
#endif
}

void tkn_gather(const Gather* op, const REAL* src, int64_t src_tile, REAL* dst, int64_t dst_tile, int tiles, int lanes, int threads) {
  with_vectors(lanes, [&]<class V, int NV>() {
    parallel(tiles, op->pixels, threads,
             [&](int tile, int begin, int end) { Tile<V, NV>::gather(*op, src + tile * src_tile, dst + tile * dst_tile, begin, end); });
  });
}

// grad_scale: [children] or null.
void tkn_gather_backward(const Gather* op, const REAL* x, const REAL* grad_out, REAL* grad_x, REAL* grad_scale, int64_t x_tile, int64_t out_tile,
                         int tiles, int lanes, int threads) {
  with_vectors(lanes, [&]<class V, int NV>() {
    parallel(1, op->pixels, threads, [&](int, int begin, int end) {
      for (int tile = 0; tile < tiles; tile++)
        Tile<V, NV>::gather_backward(*op, x + tile * x_tile, grad_out + tile * out_tile, grad_x + tile * x_tile, grad_scale, begin, end, tile == 0);
    });
  });
}

// `halves`: x and rows are of numbers of two bytes.
void tkn_pack(const Dense* d, const void* x, int images, void* rows, int64_t tile_size, int tiles, int lanes, int halves, int threads) {
  with_numbers(halves, [&]<class T>() {
    parallel(tiles, dense_parts(*d), threads, [&](int tile, int begin, int end) {
      pack(*d, (const T*)x + tile * lanes * d->image, std::min(lanes, images - tile * lanes), (T*)rows + tile * tile_size, lanes, begin, end);
    });
  });
}

void tkn_unpack(const Dense* d, const void* rows, int64_t tile_size, void* x, int images, int tiles, int lanes, int halves, int threads) {
  with_numbers(halves, [&]<class T>() {
    parallel(tiles, dense_parts(*d), threads, [&](int tile, int begin, int end) {
      unpack(*d, (const T*)rows + tile * tile_size, lanes, std::min(lanes, images - tile * lanes), (T*)x + tile * lanes * d->image, begin, end);
    });
  });
}

// Where there are no products of bfloat16 the next three do nothing.

// mean, variance: [channels], of the batch and all pixels.
void tkn_normed_statistics(const NormedConv* op, float* mean, float* variance, int threads) {
#if BFLOAT16_PRODUCTS
  normed::statistics(*op, mean, variance, threads);
#endif
}

void tkn_normed_forward(const NormedConv* op, int threads) {
#if BFLOAT16_PRODUCTS
  normed::forward(*op, threads);
#endif
}

void tkn_normed_backward(const NormedConv* op, int threads) {
#if BFLOAT16_PRODUCTS
  normed::backward(*op, threads);
#endif
}

// Runs a plan. With tiles enough for the threads each thread takes whole tiles through all `steps`, in memory of its own;
// else the threads divide each instruction. `dense`: where the dense activations begin; `memory`: of `memory_tiles` tiles.
void tkn_run(const Instruction* instructions, int instruction_count, const Step* steps, int step_count, REAL* const* dense, REAL* memory,
             int64_t memory_tile, int memory_tiles, int images, int lanes, int threads) {
  with_vectors(lanes, [&]<class V, int NV>() {
    const int tiles = (images + lanes - 1) / lanes;
    const auto run = [&](int index, REAL* rows, int tile, int begin, int end) {
      const Instruction& op = instructions[index];
      const REAL* src = rows + op.src * lanes;
      REAL* dst = rows + op.dst * lanes;
      const int filled = std::min(lanes, images - tile * lanes);
      if (op.kind == GATHER) Tile<V, NV>::gather(*static_cast<const Gather*>(op.spec), src, dst, begin, end);
      if (op.kind == ROW_NORM) row_norm<V, NV>(*static_cast<const RowNorm*>(op.spec), src, dst, begin, end);
      if (op.kind == CONV) Tile<V, NV>::conv(*static_cast<const Conv*>(op.spec), src, dst, begin, end);
#if BFLOAT16_PRODUCTS
      if (op.kind == PAIR) pair_rows<V, NV>(*static_cast<const Pairing*>(op.spec), src, dst, begin, end);
      if (op.kind == CONV_PAIRS) Tile<V, NV, true>::conv(*static_cast<const Conv*>(op.spec), src, dst, begin, end);
#endif
      if (op.kind == PACK || op.kind == UNPACK) {
        const Dense& d = *static_cast<const Dense*>(op.spec);
        REAL* images_begin = dense[op.dense] + (int64_t)tile * lanes * d.image;
        if (op.kind == PACK) pack(d, images_begin, filled, dst, lanes, begin, end);
        else unpack(d, src, lanes, filled, images_begin, begin, end);
      }
    };
    if (tiles >= threads && memory_tiles >= threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
      for (int tile = 0; tile < tiles; tile++)
        for (int s = 0; s < step_count; s++)
          run(steps[s].instruction, memory + memory_tile * omp_get_thread_num(), tile, steps[s].begin, steps[s].end);
      return;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int tile = 0; tile < tiles; tile++)
      for (int index = 0; index < instruction_count; index++) {
        const Instruction& op = instructions[index];
        const int blocks = std::min(op.parts, threads * 8);
#pragma omp for schedule(dynamic)
        for (int block = 0; block < blocks; block++) run(index, memory, tile, first_part(op, block, blocks), first_part(op, block + 1, blocks));
      }
  });
}

// Runs a plan of maps: each thread takes whole images, in memory of its own, as long as there are enough for all; what is
// left is divided part by part, always the same share to the same thread: its cache holds what it wrote. `memory`: of as
// many images as threads, or fewer if there are fewer; offsets are numbers, not rows.
void tkn_run_maps(const Instruction* instructions, int instruction_count, REAL* const* dense, REAL* memory, int64_t memory_image, int images, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads(), alone = images / team * team;
    for (int image = thread; image < alone; image += team)
      for (int index = 0; index < instruction_count; index++)
        run_map_parts(instructions[index], dense, memory + thread * memory_image, image, 0, instructions[index].parts);
    for (int image = alone; image < images; image++)
      for (int index = 0; index < instruction_count; index++) {
#pragma omp barrier
        const Instruction& op = instructions[index];
        run_map_parts(op, dense, memory, image, first_part(op, thread, team), first_part(op, thread + 1, team));
      }
  }
}

}  // extern "C"

namespace {

// A weight gradient is divided into about so many tasks; small ones have sums of their own, of at most so many numbers.
constexpr int TASKS = 8, MOST_SUMS = 1 << 23;

// The first entry of a source pixel's chunk of channels.
INLINE int first_entry(const Conv& op, int pixel, int chunk) { return op.src_start[(int64_t)pixel * (op.chunks + 1) + chunk]; }

// Where taps read fewer channels than a vector holds: the columns of all taps of a pixel in one. Every part of the pixels
// has sums of its own, which are added up in one order whatever the number of threads.
template <bool PAIRS>
void weight_grad_of_few(const Conv& op, const REAL* x, int64_t x_tile, const REAL* grad_z, int64_t z_tile, REAL* grad, int tiles, int lanes,
                        int threads) {
  const int64_t size = op.weight_dst * op.dst_per_group;
  const int parts = std::min<int64_t>(op.pixels, std::clamp<int64_t>(MOST_SUMS / size, 1, 32));
  std::vector<REAL> sums(size * parts);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int part = 0; part < parts; part++) {
    std::vector<REAL> scratch;
    std::vector<const REAL*> rows;
    std::vector<int32_t> column;
    Spread spread;
    for (int p = part; p < op.pixels; p += parts) {
      const int begin = op.dst_start[p], end = op.dst_start[p + 1];
      column.clear();
      for (int t = op.tap_start[p]; t < op.tap_start[p + 1]; t++)
        for (int q = op.tap_pixel[t], e = first_entry(op, q, 0); e < first_entry(op, q, op.chunks); e++)
          column.push_back(op.tap_index[t] * op.weight_tap + op.src_channel[e]);
      const int count = column.size(), width = padded(count);
      if (begin == end || count == 0) continue;
      spread.clear();
      spread.add(column.data(), count);
      scratch.resize((size_t)width * lanes * tiles);
      rows.resize(count);
      for (int tile = 0; tile < tiles; tile++) {
        int k = 0;
        for (int t = op.tap_start[p]; t < op.tap_start[p + 1]; t++) {
          const int q = op.tap_pixel[t], channels = first_entry(op, q, op.chunks) - first_entry(op, q, 0);
          for (int c = 0; c < channels; c++) rows[k++] = x + tile * x_tile + ((int64_t)op.src_base[q] + c) * lanes;
        }
        transpose(rows.data(), count, lanes, scratch.data() + (int64_t)tile * width * lanes, width);
      }
      outer_all<PAIRS>(op, begin, end, grad_z + (int64_t)op.dst_base[p] * lanes, z_tile, scratch.data(), (int64_t)width * lanes, width, tiles, lanes,
                       sums.data() + part * size, spread, 0, width / WIDTH);
    }
  }
  for (int part = 0; part < parts; part++)
    for (int64_t i = 0; i < size; i++) grad[i] += sums[part * size + i];
}

template <bool PAIRS>
void weight_grad(const Conv& op, const REAL* x, int64_t x_tile, const REAL* grad_z, int64_t z_tile, REAL* grad, int taps, int source_pixels,
                 const int64_t* column_start, REAL* columns, int64_t columns_tile, int tiles, int lanes, int threads) {
  if (op.src_per_group < WIDTH && op.groups == 1) return weight_grad_of_few<PAIRS>(op, x, x_tile, grad_z, z_tile, grad, tiles, lanes, threads);
  parallel(tiles, source_pixels, threads, [&](int tile, int begin, int end) {
    std::vector<const REAL*> rows;
    for (int q = begin; q < end; q++) {
      const int count = first_entry(op, q, op.chunks) - first_entry(op, q, 0);
      rows.resize(count);
      for (int k = 0; k < count; k++) rows[k] = x + tile * x_tile + ((int64_t)op.src_base[q] + k) * lanes;
      transpose(rows.data(), count, lanes, columns + tile * columns_tile + column_start[q], padded(count));
    }
  });
  Spread spread;  // of each source pixel and group
  std::vector<int32_t> vector_of((size_t)source_pixels * op.groups);
  for (int q = 0; q < source_pixels; q++)
    for (int group = 0; group < op.groups; group++) {
      const int per_group = op.chunks / op.groups, from = first_entry(op, q, group * per_group), to = first_entry(op, q, (group + 1) * per_group);
      vector_of[(size_t)q * op.groups + group] = spread.start.size() - 1;
      spread.add(op.src_channel + from, to - from);
    }
  // Every task owns a range of outputs, and neighbouring taps, which read the same columns one pixel after the other: sums
  // are made in one order whatever the number of threads.
  const int dst_channels = op.groups * op.dst_per_group, tap_tasks = std::lround(std::sqrt(taps));
  const int ranges = std::max(1, std::min(dst_channels / 32, (TASKS + tap_tasks - 1) / tap_tasks));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int task = 0; task < tap_tasks * ranges; task++) {
    const int tap_task = task / ranges, range = task % ranges;
    const int low_tap = tap_task * taps / tap_tasks, high_tap = (tap_task + 1) * taps / tap_tasks;
    const int low = range * dst_channels / ranges, high = (range + 1) * dst_channels / ranges;
    for (int p = 0; p < op.pixels; p++) {
      const int32_t *first = op.dst_channel + op.dst_start[p], *last = op.dst_channel + op.dst_start[p + 1];
      const int begin = std::lower_bound(first, last, low) - op.dst_channel, end = std::lower_bound(first, last, high) - op.dst_channel;
      if (begin == end) continue;
      const REAL* g = grad_z + ((int64_t)op.dst_base[p] + begin - op.dst_start[p]) * lanes;
      for (int t = op.tap_start[p]; t < op.tap_start[p + 1]; t++) {
        const int tap = op.tap_index[t], q = op.tap_pixel[t];
        if (tap < low_tap || tap >= high_tap) continue;
        const int all = first_entry(op, q, 0), width = padded(first_entry(op, q, op.chunks) - all);
        for (int a = begin; a < end;) {
          const int group = op.dst_channel[a] / op.dst_per_group, b = group_end(op, a, end);
          const int per_group = op.chunks / op.groups, from = first_entry(op, q, group * per_group), to = first_entry(op, q, (group + 1) * per_group);
          if (from < to)
            outer_all<PAIRS>(op, a, b, g + (int64_t)(a - begin) * lanes, z_tile, columns + column_start[q] + from - all, columns_tile, width, tiles,
                             lanes, grad + tap * op.weight_tap - (int64_t)group * op.src_per_group, spread, vector_of[(size_t)q * op.groups + group],
                             padded(to - from) / WIDTH);
          a = b;
        }
      }
    }
  }
}

}  // namespace

// The weight's gradient of an unpooled convolution: `grad` as `weight`, set to zero before. `columns`: room for
// tiles * lanes * sum over source pixels of their channels rounded up to vectors; `column_start` [source pixels]: where in
// one tile's share (of `columns_tile` numbers) a pixel's begin; unused if the taps are many and the channels few. `pairs`:
// `x` and `grad_z` hold two images of bfloat16 in the place of each number; `lanes` counts these places.
extern "C" void tkn_weight_grad(const Conv* op, const REAL* x, int64_t x_tile, const REAL* grad_z, int64_t z_tile, REAL* grad, int taps,
                                int source_pixels, const int64_t* column_start, REAL* columns, int64_t columns_tile, int tiles, int lanes,
                                int pairs, int threads) {
  (pairs ? weight_grad<true> : weight_grad<false>)(*op, x, x_tile, grad_z, z_tile, grad, taps, source_pixels, column_start, columns, columns_tile, tiles, lanes,
                                                   threads);
}
