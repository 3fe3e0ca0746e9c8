// The tensors of a step, cut into tiles that are numbered together, for threads to share. No torch, and no threads:
//
//   Schedule schedule(numbers, kernels);  schedule.add(parameter) for each;  schedule.prepare();
//   schedule.run(from, to) for ranges that make up [0, schedule.units()), on any threads;  schedule.finish();
//
// A thread that has all tiles of a tensor gathers the maxima in memory of its own, and writes them over the
// accumulators. Threads that share a tensor gather them in a second buffer by an atomic maximum, which is exact in
// every order, and finish() copies that buffer.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "../common/numbers.h"
#include "sm3.h"

namespace leanops {
namespace sm3 {

// One parameter with its state; all memory is contiguous. Only add() reads `sizes`.
struct Parameter {
  void* param;
  const void* grad;
  float* cover;    // the axes' accumulators one after another
  void* momentum;  // null where kind is kNone
  float* scales;
  DType dtype;
  Momentum kind;
  uint32_t tensor_id;
  uint64_t offset;
  const int64_t* sizes;
  int64_t rank;
  float lr_factor = 1.0f;
};

class Schedule {
 public:
  static constexpr int64_t kUnit = 4096;  // work, of about 4,096 elements; threads take whole units

  Schedule(const Numbers& numbers, const Kernels& kernels) : numbers_(numbers), kernels_(kernels) {}

  void reserve(size_t tensors) {
    jobs_.reserve(tensors);
    axes_.reserve(2 * tensors);
  }

  void add(const Parameter& parameter) {
    Job job;
    job.parameter = parameter;
    job.first_axis = axes_.size();
    int64_t numel = 1, start = 0, long_axes = 0;
    for (int64_t k = 0; k < parameter.rank; ++k) {
      axes_.push_back({start, parameter.sizes[k]});
      start += parameter.sizes[k];
      numel *= parameter.sizes[k];
      long_axes += parameter.sizes[k] != 1;
    }
    if (parameter.rank == 0) axes_.push_back({0, start = 1});
    if (numel == 0) {
      axes_.resize(job.first_axis);
      return;
    }
    job.entries = start;
    job.length = parameter.rank > 1 ? numel / parameter.sizes[0] : numel;
    const size_t rank = axes_.size() - job.first_axis;
    Axis* axes = axes_.data() + job.first_axis;
    if (long_axes < 2) {  // a vector, perhaps with axes of size 1: a single row
      std::sort(axes, axes + rank, [](const Axis& a, const Axis& b) { return a.size < b.size; });
      split(job, rank, rank - 1, 1, numel);
    } else {
      int64_t rows = axes[0].size;
      for (size_t k = 1; k < rank; rows *= axes[k++].size) {
        const int64_t columns = numel / rows, best = job.rows + job.columns;
        if (k == 1 || rows + columns < best || (rows + columns == best && columns > job.columns)) {
          split(job, rank, k, rows, columns);
        }
      }
    }
    cut(job);
    job.begin = total_;
    total_ += job.tiles * job.cost;
    jobs_.push_back(job);
  }

  void prepare() {
    size_t size = 0;
    for (Job& job : jobs_) {
      if (job.tiles == 1) continue;  // never shared
      job.first_shared = size;
      size += static_cast<size_t>(job.maxima_entries());
    }
    // the system makes these zeros when they are first touched, and most tensors are not shared
    shared_maxima_.reset(static_cast<uint32_t*>(std::calloc(std::max<size_t>(size, 1), sizeof(uint32_t))));
    if (!shared_maxima_) throw std::bad_alloc();
    is_shared_.assign(jobs_.size(), 0);
  }

  int64_t units() const { return (total_ + kUnit - 1) / kUnit; }

  // Takes all tiles that begin in units [from, to).
  void run(int64_t from, int64_t to) {
    const int64_t end = std::min(to * kUnit, total_);
    const int64_t begin = from * kUnit;
    if (begin >= end) return;
    Scratch scratch;
    auto job = std::upper_bound(jobs_.begin(), jobs_.end(), begin,
                                [](int64_t work, const Job& j) { return work < j.begin; }) -
               1;
    for (; job != jobs_.end() && job->begin < end; ++job) {
      const int64_t skipped = std::max<int64_t>(begin - job->begin, 0);
      const int64_t first = (skipped + job->cost - 1) / job->cost;
      const int64_t last = std::min(job->tiles, (end - job->begin + job->cost - 1) / job->cost);
      const bool ends = job + 1 == jobs_.end() || (job + 1)->begin >= end;
      if (first < last) work(*job, first, last, ends ? nullptr : &job[1].parameter, scratch);
    }
  }

  void finish() {
    for (size_t j = 0; j < jobs_.size(); ++j) {
      if (is_shared_[j]) write_cover(jobs_[j], shared_maxima_.get() + jobs_[j].first_shared);
    }
  }

 private:
  static constexpr int64_t kTile = 32768;  // about the elements of a tile
  // The most columns of a tile: their accumulators and maxima stay in the first two levels of cache.
  static constexpr int64_t kWide = 8192;
  static constexpr int64_t kTileCost = 256;  // the cost of a tile itself, in elements

  struct Axis {
    int64_t start, size;  // within the cover
  };

  struct Job {
    Parameter parameter;
    size_t first_axis, row_axes, column_axes;
    int64_t entries;  // of the cover
    int64_t rows = 0, columns = 0;
    int64_t length;  // elements of a row of axis 0
    int64_t band;    // rows of a band; a tile lies within one band
    int64_t tile_rows, tile_columns;
    int64_t tiles_per_band, bands, tiles, cost;
    int64_t begin;            // its first work, counted over all jobs
    size_t first_shared = 0;  // index of its maxima in shared_maxima_

    bool single_row() const { return rows == 1; }
    // The accumulators of a vector's own axis are written in place. Its axes of size 1 share one maximum.
    int64_t maxima_entries() const { return single_row() ? 1 : entries; }
  };

  struct Scratch {
    std::vector<uint32_t> maxima, row_maxima, column_maxima;
    std::vector<float> row_cover, column_cover;
  };

  struct Free {
    void operator()(uint32_t* p) const { std::free(p); }
  };

  static void split(Job& job, size_t rank, size_t k, int64_t rows, int64_t columns) {
    job.row_axes = k;
    job.column_axes = rank - k;
    job.rows = rows;
    job.columns = columns;
  }

  // A tile's runs of consecutive elements begin at the edges of int8 blocks: see Tile.
  static void cut(Job& job) {
    const int64_t rows_of_axis0 = std::max<int64_t>(job.length / job.columns, 1);
    job.band = job.rows;
    job.tile_columns = job.columns;
    if (rows_of_axis0 == 1) {
      const int64_t widest = job.single_row() ? kTile : kWide;
      if (job.columns > widest) {
        const int64_t parts = (job.columns + widest - 1) / widest;
        job.tile_columns = ((job.columns + parts - 1) / parts + kBlock - 1) / kBlock * kBlock;
      }
      job.tile_rows = std::max<int64_t>(kTile / job.tile_columns, 1);
    } else if (job.length <= kTile) {
      job.tile_rows = kTile / job.length * rows_of_axis0;
    } else {
      const int64_t step = kBlock / std::gcd(job.columns, kBlock);
      job.band = rows_of_axis0;
      job.tile_rows = (std::max<int64_t>(kTile / job.columns, 1) + step - 1) / step * step;
    }
    job.tile_rows = std::min(job.tile_rows, job.band);
    job.bands = job.rows / job.band;
    job.tiles_per_band = (job.band + job.tile_rows - 1) / job.tile_rows;
    job.tiles = job.bands * job.tiles_per_band * ((job.columns + job.tile_columns - 1) / job.tile_columns);
    job.cost = job.tile_rows * job.tile_columns + kTileCost;
  }

  // Takes tiles [first, last) of a tensor. Tiles are numbered down the rows first, so that a thread passes once through
  // the accumulators of a run of columns. `next`: the parameter that the thread takes after this one, or null.
  void work(const Job& job, int64_t first, int64_t last, const Parameter* next, Scratch& scratch) {
    const Parameter& p = job.parameter;
    const bool whole = last - first == job.tiles;
    uint32_t* maxima;
    if (whole) {
      scratch.maxima.assign(static_cast<size_t>(job.maxima_entries()), 0);
      maxima = scratch.maxima.data();
    } else {
      __atomic_store_n(&is_shared_[static_cast<size_t>(&job - jobs_.data())], 1, __ATOMIC_RELAXED);
      maxima = shared_maxima_.get() + job.first_shared;
    }
    const Axis* row_axes = axes_.data() + job.first_axis;
    const Axis* column_axes = row_axes + job.row_axes;
    const bool plain_rows = job.row_axes == 1, plain_columns = job.column_axes == 1;

    Tile tile;
    tile.param = static_cast<char*>(p.param);
    tile.grad = static_cast<const char*>(p.grad);
    tile.momentum = static_cast<char*>(p.momentum);
    tile.scales = p.scales;
    tile.dtype = p.dtype;
    tile.kind = p.kind;
    tile.tensor_id = p.tensor_id;
    tile.offset = p.offset;
    tile.lr_factor = p.lr_factor;
    tile.single = job.single_row();
    tile.width = job.columns;
    tile.length = job.length;
    const int64_t down = job.bands * job.tiles_per_band;
    for (int64_t t = first; t < last; ++t) {
      const int64_t across = t / down, band = t % down / job.tiles_per_band,
                    part = t % down % job.tiles_per_band;
      tile.column = across * job.tile_columns;
      tile.columns = std::min(job.tile_columns, job.columns - tile.column);
      tile.row = band * job.band + part * job.tile_rows;
      tile.rows = std::min(job.tile_rows, job.band - part * job.tile_rows);

      const bool begins = t == first || t % down == 0, ends = t + 1 == last || (t + 1) % down == 0;
      if (begins) {
        tile.column_cover = plain_columns ? p.cover + column_axes->start + tile.column
                                          : least_cover(scratch.column_cover, p.cover, column_axes,
                                                        job.column_axes, tile.column, tile.columns);
        if (job.single_row()) {
          tile.column_maxima = reinterpret_cast<uint32_t*>(p.cover + column_axes->start + tile.column);
        } else if (whole && plain_columns) {
          tile.column_maxima = maxima + column_axes->start + tile.column;
        } else {
          scratch.column_maxima.assign(static_cast<size_t>(tile.columns), 0);
          tile.column_maxima = scratch.column_maxima.data();
        }
      }
      tile.row_cover =
          plain_rows ? p.cover + row_axes->start + tile.row
                     : least_cover(scratch.row_cover, p.cover, row_axes, job.row_axes, tile.row, tile.rows);
      if (whole && plain_rows && !job.single_row()) {
        tile.row_maxima = maxima + row_axes->start + tile.row;
      } else {
        scratch.row_maxima.assign(static_cast<size_t>(tile.rows), 0);
        tile.row_maxima = scratch.row_maxima.data();
      }

      if (next && t + 1 == last) {
        tile.next = {next->param, next->grad, next->momentum};
        __builtin_prefetch(next->cover);
      }
      kernels_.tile(numbers_, tile);

      if (job.single_row()) {
        raise(maxima, *tile.row_maxima);
        continue;
      }
      if (tile.row_maxima == scratch.row_maxima.data()) {
        raise_axes(maxima, row_axes, job.row_axes, tile.row, tile.rows, tile.row_maxima);
      }
      if (ends && tile.column_maxima == scratch.column_maxima.data()) {
        raise_axes(maxima, column_axes, job.column_axes, tile.column, tile.columns, tile.column_maxima);
      }
    }
    if (whole) write_cover(job, maxima);
  }

  // Writes the new accumulators over the old ones.
  void write_cover(const Job& job, const uint32_t* maxima) const {
    if (!job.single_row()) {
      std::memcpy(job.parameter.cover, maxima, static_cast<size_t>(job.entries) * sizeof(float));
      return;
    }
    for (size_t k = 0; k < job.row_axes; ++k) {
      job.parameter.cover[axes_[job.first_axis + k].start] = bits_float(*maxima);
    }
  }

  // Splits the indices [from, from + n) of a side into runs along its last axis. For each run it calls visit(position
  // in [0, n), count, index along the last axis, index of the other axes together).
  template <class Visit>
  static void for_lines(const Axis* axes, size_t rank, int64_t from, int64_t n, const Visit& visit) {
    int64_t done = 0;
    const int64_t line = axes[rank - 1].size;
    while (done < n) {
      const int64_t index = (from + done) % line, count = std::min(line - index, n - done);
      visit(done, count, index, (from + done) / line);
      done += count;
    }
  }

  // [n], the least accumulator at the indices [from, from + n) of a side. `out`: scratch that holds it.
  static const float* least_cover(std::vector<float>& out, const float* cover, const Axis* axes, size_t rank,
                                  int64_t from, int64_t n) {
    out.resize(static_cast<size_t>(n));
    if (rank == 0) {  // a vector without axes of size 1
      out[0] = __builtin_inff();
      return out.data();
    }
    for_lines(axes, rank, from, n, [&](int64_t done, int64_t count, int64_t index, int64_t others) {
      float c = __builtin_inff();
      for (size_t k = rank - 1; k-- > 0; others /= axes[k].size) {
        c = min_or_nan(c, cover[axes[k].start + others % axes[k].size]);
      }
      const float* along = cover + axes[rank - 1].start + index;
      for (int64_t j = 0; j < count; ++j) out[static_cast<size_t>(done + j)] = min_or_nan(c, along[j]);
    });
    return out.data();
  }

  // Raises the maxima of a side's axes to those that were found at its indices [from, from + n).
  static void raise_axes(uint32_t* maxima, const Axis* axes, size_t rank, int64_t from, int64_t n,
                         const uint32_t* found) {
    for_lines(axes, rank, from, n, [&](int64_t done, int64_t count, int64_t index, int64_t others) {
      uint32_t top = 0;
      uint32_t* along = maxima + axes[rank - 1].start + index;
      for (int64_t j = 0; j < count; ++j) {
        top = std::max(top, found[done + j]);
        raise(along + j, found[done + j]);
      }
      for (size_t k = rank - 1; k-- > 0; others /= axes[k].size) {
        raise(maxima + axes[k].start + others % axes[k].size, top);
      }
    });
  }

  static float min_or_nan(float a, float b) { return a < b || a != a ? a : b; }  // NaN if a or b is NaN

  static void raise(uint32_t* maximum, uint32_t value) {
    uint32_t seen = __atomic_load_n(maximum, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(maximum, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  const Numbers numbers_;
  const Kernels& kernels_;
  std::vector<Axis> axes_;
  std::vector<Job> jobs_;
  int64_t total_ = 0;
  std::unique_ptr<uint32_t[], Free> shared_maxima_;
  std::vector<unsigned char> is_shared_;
};

}  // namespace sm3
}  // namespace leanops
