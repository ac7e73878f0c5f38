#include "run.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "dtype.h"
#include "elements.h"
#include "family.h"
#include "layer.h"
#include "parallel.h"
#include "round_up.h"
#include "run_row.h"
#include "workspace.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace claq {
namespace {

constexpr int64_t kMostChunkRows = 256;
// A task's tile of results, where there is a choice. Of few rows of x long runs of code words are worth more than sums that stay
// in the first-level cache.
constexpr int64_t kFewRowsSums = 32 * 1024;
constexpr int64_t kRowSums = 12 * 1024;  // of one row
constexpr int64_t kFewRows = 32;
// With outliers and more rows the outputs that are computed together are this many: the more, the more often a tile of transposed activations
// is used once it is cached; the fewer, the nearer are their sums when the outliers are added.
constexpr int64_t kOutlierOutputs = 1024;
constexpr int64_t kOutlierRows = 2 * kMostTileRows;  // whose outliers are added together
constexpr int64_t kMostSums = kMostChunkRows * kOutlierOutputs;  // rows rounded up to kMostTileRows, too
constexpr int64_t kChunkElements = 1024 * 1024;  // rows of x are taken in chunks of at most this many activations

constexpr double kActivationsPerSecond = 1e9;  // a rounded estimate, only used to decide into how many tasks to split

// Of a level, as the system reports it; 0 where it does not.
uint64_t cache_bytes([[maybe_unused]] int level) {
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
  const long known = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  if (known > 0) return static_cast<uint64_t>(known);
#endif
  return 0;
}

// How many bytes of codes may be read before a layer's own are no longer in a cache: half of the last level, as far as a thread
// can have it. What the system reports may be the sum of many caches (256 MB on an EPYC whose cores reach 32 MB of it).
// Known from loading on: a child that is forked while another thread asks for the first time would wait for it for ever.
const uint64_t kCachedCodeBytes = [] {
  const uint64_t most = uint64_t{32} << 20, known = cache_bytes(3);
  return (known ? std::min(most, known) : most) / 2;
}();

// The same for the second level, which every core has for itself.
const uint64_t kCoreCachedCodeBytes = cache_bytes(2);

// How many bytes of codes were read in this process since this layer's were, its own included.
uint64_t bytes_since(const claq_layer& handle) {
  static std::atomic<uint64_t> total{0};
  const LayerView& layer = handle.view;
  uint64_t bytes = 0;
  for (int s = 0; s < layer.segment_count; ++s) {
    bytes += static_cast<uint64_t>(layer.segments[s].blocks * layer.segments[s].width * layer.out_features) * sizeof(uint32_t);
  }
  const uint64_t now = total.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  return now - handle.read_at.exchange(now, std::memory_order_relaxed);
}

// Rows of x that are taken together: the weights are decoded once for each chunk, and its activations stay in the cache.
int64_t chunk_rows(const LayerView& layer) {
  return std::clamp(kChunkElements / layer.columns / kMostTileRows * kMostTileRows, kMostTileRows, kMostChunkRows);
}

struct Call {
  const LayerView& layer;
  const Family& family;
  claq_dtype dtype;
  bool int8;
  const void* x;
  const Part* parts;
  int count;
  int64_t first_row;  // of x and y, of the present chunk
};

// Calls use(part, first column in it, columns, first of them among [n0, n1)) for each part that has columns of [n0, n1).
template <class Use>
void for_each_part(const Call& call, int64_t n0, int64_t n1, Use use) {
  int64_t begin = 0;
  for (int i = 0; i < call.count; ++i) {
    const int64_t end = begin + call.parts[i].columns;
    const int64_t first = std::max(n0, begin), last = std::min(n1, end);
    if (first < last) use(call.parts[i], first - begin, last - first, first - n0);
    begin = end;
  }
}

// Lets the lines of y that rows [m0, m1) of the chunk will be written to come to the cache while they are computed: with many rows they
// lie far apart, where no hardware fetches ahead, and took a tenth of an encoder's time. Always inlined and without a lambda: GCC takes
// a function that only fetches ahead for one without effect, and leaves its calls out.
__attribute__((always_inline)) inline void fetch_results(const Call& call, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int64_t kLine = 64;
  const auto item = static_cast<int64_t>(size_of(call.dtype));
  int64_t begin = 0;
  for (int p = 0; p < call.count; begin += call.parts[p].columns, ++p) {
    const int64_t columns = call.parts[p].columns, first = std::max(n0 - begin, int64_t{0}), last = std::min(n1 - begin, columns);
    for (int64_t m = call.first_row + m0; m < call.first_row + m1; ++m) {
      const char* row = static_cast<const char*>(call.parts[p].y) + m * columns * item;
      for (int64_t i = first * item; i < last * item; i += kLine) __builtin_prefetch(row + i, 1, 2);
    }
  }
}

// Runs body(row, its float32 values) over the rows of the chunk.
template <class Body>
void for_each_row(const Call& call, const Host& host, int64_t rows, Body body) {
  const int64_t length = call.layer.in_features;
  const int64_t tasks = task_count(host, static_cast<double>(rows * call.layer.columns) / kActivationsPerSecond, rows);
  for_each(host, tasks, [&](int64_t task) {
    Workspace workspace(call.dtype == CLAQ_FLOAT32 ? 0 : Workspace::bytes_for<float>(length));
    float* buffer = workspace.take<float>(length);
    for (int64_t m = rows * task / tasks; m < rows * (task + 1) / tasks; ++m) {
      body(m, load_row(call.family, call.dtype, call.x, call.first_row + m, length, buffer));
    }
  });
}

// Rows from which on int8 activations are made by tiles of rows.
constexpr int64_t kFewestTiledRows = 3;

// The same for int8 by tiles of rows, and `transposed` if it is not null. Where there are more threads than tiles, each tile's columns
// are shared out; `exact` has room for kMostColumnParts numbers a row.
constexpr int64_t kMostColumnParts = 8;
constexpr int64_t kFewestPartBlocks = 4;

void prepare_tiles(const Call& call, const Host& host, Activations& activations, uint8_t* exact) {
  const LayerView& layer = call.layer;
  const int64_t length = layer.in_features, rows = activations.rows, tile_rows = call.family.tile_rows;
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t most_parts = layer.identity_order ? std::clamp<int64_t>(layer.blocks / kFewestPartBlocks, 1, kMostColumnParts) : 1;
  const int64_t tasks = task_count(host, static_cast<double>(rows * layer.columns) / kActivationsPerSecond, tiles * most_parts);
  const int64_t parts = std::min(most_parts, (tasks + tiles - 1) / tiles), units = tiles * parts;
  for_each(host, tasks, [&](int64_t task) {
    const int64_t feature_elements = tile_rows * (round_up(length, 16) + 1);
    Workspace workspace(Workspace::bytes_for<float>(feature_elements) +
                        (call.dtype == CLAQ_FLOAT32 ? 0 : Workspace::bytes_for<float>(tile_rows * length)));
    float* features = workspace.take<float>(feature_elements);
    float* buffer = call.dtype == CLAQ_FLOAT32 ? nullptr : workspace.take<float>(tile_rows * length);
    for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
      const float* x[kMostTileRows];
      const int64_t part = unit % parts, first = unit / parts * tile_rows, count = std::min(tile_rows, rows - first);
      const Range blocks{layer.blocks * part / parts, layer.blocks * (part + 1) / parts};
      const Range needed = features_of(layer, blocks.begin, blocks.end);
      for (int64_t i = 0; i < count; ++i) {
        x[i] = load_row(call.family, call.dtype, call.x, call.first_row + first + i, length, needed,
                        buffer ? buffer + i * length : nullptr);
      }
      call.family.prepare_tile(layer, x, activations, first, blocks.begin, blocks.end, features, exact + part * rows + first);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t m = 0; m < rows; ++m) exact[m] |= exact[part * rows + m];
  }
}

void transpose(const Call& call, const Host& host, Activations& activations) {
  const int64_t tiles = (activations.rows + call.family.tile_rows - 1) / call.family.tile_rows;
  for_each(host, tiles, [&](int64_t tile) { call.family.transpose(call.layer, activations, tile); });
}

// Outputs that are computed together, for `rows` rows of x and at most `sums` sums (more for one row, and at least one tile of
// the narrowest), in tiles of one length.
int64_t tile_length(int64_t rows, int64_t outputs, int64_t sums) {
  const int64_t wanted = rows == 1 ? kRowSums : sums;
  const int64_t most = std::clamp(wanted / rows / kNarrowestTile * kNarrowestTile, kNarrowestTile, kLongestTile);
  const int64_t tiles = (outputs + most - 1) / most;
  return round_up((outputs + tiles - 1) / tiles, kNarrowestTile);
}

struct Scratch {
  void* kernel;
  float* sums;
  float* finished;
};

// Adds the outliers to the sums of rows [m0, m1) of the chunk and outputs [n0, n1), and writes the results.
void finish_sums(const Call& call, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                 int64_t stride, float* finished) {
  const LayerView& layer = call.layer;
  if (layer.outlier_ptr) call.family.add_outliers(layer, activations, m0, m1, n0, n1, sums, stride);
  for_each_part(call, n0, n1, [&](const Part& part, int64_t column, int64_t columns, int64_t place) {
    for (int64_t m = m0; m < m1; ++m) {
      const int64_t offset = (call.first_row + m) * part.columns + column;
      float* row = call.dtype == CLAQ_FLOAT32 ? static_cast<float*>(part.y) + offset : finished;
      call.family.finish_row(layer, n0 + place, n0 + place + columns, sums + (m - m0) * stride + place, row);
      if (call.dtype != CLAQ_FLOAT32) store_row(call.family, call.dtype, row, columns, part.y, offset);
    }
  });
}

// Results of output rows [n0, n1) for rows [m0, m1) of the chunk.
void compute_rows(const Call& call, const Activations& activations, bool int8, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                  const Scratch& scratch) {
  const LayerView& layer = call.layer;
  const int64_t rows = m1 - m0, sums = rows <= kFewRows ? kFewRowsSums : int8 ? kCachedSums : call.family.float_sums;
  const auto kernel = int8 ? call.family.sums_int8 : call.family.sums_float;
  if (!layer.outlier_ptr || rows <= kFewRows) {
    const int64_t tile = tile_length(rows, n1 - n0, sums);
    for (int64_t t0 = n0; t0 < n1; t0 += tile) {
      const int64_t t1 = std::min(n1, t0 + tile);
      if (rows > kFewRows) fetch_results(call, m0, m1, t0, t1);
      kernel(layer, activations, m0, m1, t0, t1, scratch.sums, tile, scratch.kernel);
      finish_sums(call, activations, m0, m1, t0, t1, scratch.sums, tile, scratch.finished);
    }
    return;
  }
  // The sums of each part lie together, and a few rows of all parts are finished while their transposed activations are near.
  const int64_t tile = tile_length(rows, n1 - n0, rows * kOutlierOutputs), length = tile_length(rows, tile, sums);
  const int64_t padded_rows = round_up(rows, kMostTileRows);
  for (int64_t t0 = n0; t0 < n1; t0 += tile) {
    const int64_t t1 = std::min(n1, t0 + tile);
    // Calls use(first output, last one, their sums, stride) for each part.
    const auto for_parts = [&](auto use) {
      for (int64_t s0 = t0; s0 < t1; s0 += length) {
        const int64_t s1 = std::min(t1, s0 + length);
        use(s0, s1, scratch.sums + (s0 - t0) * padded_rows, round_up(s1 - s0, kNarrowestTile));
      }
    };
    for_parts([&](int64_t s0, int64_t s1, float* part, int64_t stride) {
      kernel(layer, activations, m0, m1, s0, s1, part, stride, scratch.kernel);
    });
    for (int64_t r0 = m0; r0 < m1; r0 += kOutlierRows) {
      const int64_t r1 = std::min(m1, r0 + kOutlierRows);
      for_parts([&](int64_t s0, int64_t s1, float* part, int64_t stride) {
        fetch_results(call, r0, r1, s0, s1);
        finish_sums(call, activations, r0, r1, s0, s1, part + (r0 - m0) * stride, stride, scratch.finished);
      });
    }
  }
}

// Results of output rows [n0, n1) for all rows of the chunk. Rows that need float32 arithmetic go through int8 too, which
// leaves the tiles of packed rows whole, and are then computed again.
void compute(const Call& call, const Activations& activations, const uint8_t* exact, int64_t n0, int64_t n1) {
  Workspace workspace(static_cast<size_t>(kScratchBytes) + Workspace::bytes_for<float>(kMostSums) +
                      Workspace::bytes_for<float>(kLongestTile));
  Scratch scratch;
  scratch.kernel = workspace.take<char>(kScratchBytes);
  scratch.sums = workspace.take<float>(kMostSums);
  scratch.finished = workspace.take<float>(kLongestTile);
  Activations floats = activations;
  if (call.int8) {
    compute_rows(call, activations, true, 0, activations.rows, n0, n1, scratch);
    floats.transposed = nullptr;  // see Family::add_outliers
  }
  for (int64_t m0 = 0; m0 < activations.rows;) {
    int64_t m1 = m0 + 1;
    while (m1 < activations.rows && exact[m1] == exact[m0]) ++m1;
    if (exact[m0]) compute_rows(call, floats, false, m0, m1, n0, n1, scratch);
    m0 = m1;
  }
}

// Summed as a whole, then shared out.
void run_row_of_parts(const Family& family, const LayerView& layer, claq_dtype dtype, bool int8, const void* x, const Part* parts, int count,
                      const Host& host) {
  const size_t item = size_of(dtype);
  Workspace workspace(static_cast<size_t>(layer.out_features) * item);
  const char* from = workspace.first<char>();
  run_row(family, layer, dtype, int8, x, workspace.first<char>(), host);
  for (int i = 0; i < count; ++i) {
    const size_t bytes = static_cast<size_t>(parts[i].columns) * item;
    if (bytes) std::memcpy(parts[i].y, from, bytes);
    from += bytes;
  }
}

}  // namespace

void run(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, void* y, const Host& host) {
  const Part whole{y, layer.view.out_features};
  run(layer, dtype, accuracy_level, x, rows, &whole, 1, host);
}

void run(const claq_layer& handle, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, const Part* parts, int count,
         const Host& host) {
  if (dtype != CLAQ_FLOAT32 && dtype != CLAQ_FLOAT16 && dtype != CLAQ_BFLOAT16) {
    throw InvalidArgument("x: expected float32, float16 or bfloat16");
  }
  if (accuracy_level != 0 && accuracy_level != 1 && accuracy_level != 4) {
    throw InvalidArgument("accuracy_level: is " + std::to_string(accuracy_level) + ", expected 0, 1 or 4");
  }
  if (rows < 0) throw InvalidArgument("x: negative number of rows");
  if (rows == 0) return;
  if (!x) throw InvalidArgument("x and y: expected data");
  for (int i = 0; i < count; ++i) {
    if (parts[i].columns > 0 && !parts[i].y) throw InvalidArgument("x and y: expected data");
  }

  LayerView layer = handle.view;
  const uint64_t since = bytes_since(handle);
  // Fetching code words ahead costs a quarter of the speed if they are in a cache, and gains a third if they are not.
  layer.fetch_ahead = since > kCachedCodeBytes;
  layer.core_cached = since <= kCoreCachedCodeBytes;
  if (rows == 1 && column_parts(layer) > 1) {
    if (count == 1) return run_row(*handle.family, layer, dtype, accuracy_level == 4, x, parts[0].y, host);
    return run_row_of_parts(*handle.family, layer, dtype, accuracy_level == 4, x, parts, count, host);
  }
  Call call{layer, *handle.family, dtype, accuracy_level == 4, x, parts, count, 0};
  const int64_t chunk = std::min(rows, chunk_rows(layer));
  Activations activations{};
  // Rows a power of two apart would compete for the same cache sets.
  activations.stride = layer.columns + 64;
  activations.alone = rows == 1;
  const int64_t elements = chunk * activations.stride;
  const int64_t packed_rows = chunk == 1 ? 1 : round_up(chunk, kMostTileRows);
  const int64_t block_elements = call.int8 ? packed_rows * layer.blocks : 0;
  const int64_t quantized_elements = call.int8 ? packed_rows * layer.columns * call.family.activation_bytes : 0;
  const bool tiled = call.int8 && call.family.prepare_tile && chunk >= kFewestTiledRows;
  const int64_t scaled_elements = !call.int8 || (layer.outlier_ptr && !tiled) ? elements : 0;
  activations.line_rows = !tiled || chunk > 8 ? call.family.tile_rows : chunk > 4 ? 8 : 4;
  const int64_t transposed_rows = round_up(chunk, activations.line_rows);
  const bool transposes = layer.outlier_ptr && chunk >= kFewestTiledRows && call.family.transpose;
  const int64_t transposed_elements = transposes ? transposed_rows * layer.columns : 0;
  Workspace workspace(Workspace::bytes_for<float>(scaled_elements) + Workspace::bytes_for<float>(transposed_elements) +
                      Workspace::bytes_for<int8_t>(quantized_elements) + Workspace::bytes_for<float>(block_elements) +
                      Workspace::bytes_for<int32_t>(block_elements) + Workspace::bytes_for<uint8_t>(chunk * kMostColumnParts));
  float* scaled = workspace.take<float>(scaled_elements);
  float* transposed = workspace.take<float>(transposed_elements);
  activations.quantized = call.int8 ? workspace.take<int8_t>(quantized_elements) : nullptr;
  activations.block_scale = workspace.take<float>(block_elements);
  activations.block_correction = workspace.take<int32_t>(block_elements);
  uint8_t* exact = workspace.take<uint8_t>(chunk * kMostColumnParts);

  for (int64_t first = 0; first < rows; first += chunk) {
    call.first_row = first;
    activations.rows = std::min(chunk, rows - first);
    activations.scaled = scaled_elements ? scaled : nullptr;
    activations.transposed = transposed_elements ? transposed : nullptr;
    if (tiled) {
      prepare_tiles(call, host, activations, exact);
    } else {
      for_each_row(call, host, activations.rows, [&](int64_t m, const float* row) {
        exact[m] = !call.family.prepare_row(layer, row, activations, m, call.int8) || !call.int8;
      });
    }
    const bool any_exact = std::find(exact, exact + activations.rows, 1) != exact + activations.rows;
    const bool late_scaled = any_exact && !activations.scaled;
    const Workspace late(late_scaled ? Workspace::bytes_for<float>(elements) : 0);
    if (late_scaled) {
      activations.scaled = late.first<float>();
      for_each_row(call, host, activations.rows, [&](int64_t m, const float* row) {
        if (exact[m]) call.family.prepare_row(layer, row, activations, m, false);
      });
    }
    if (activations.transposed && !tiled) transpose(call, host, activations);

    const int64_t tiles = (layer.out_features + kNarrowestTile - 1) / kNarrowestTile;
    const int64_t tasks = task_count(host, product_seconds(call.family, layer, call.int8, activations.rows), tiles);
    for_each(host, tasks, [&](int64_t task) {
      const int64_t n0 = tiles * task / tasks * kNarrowestTile;
      const int64_t n1 = std::min(layer.out_features, tiles * (task + 1) / tasks * kNarrowestTile);
      compute(call, activations, exact, n0, n1);
    });
  }
}

}  // namespace claq
