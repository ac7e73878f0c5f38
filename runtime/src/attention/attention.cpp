#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "../family.h"
#include "../round_up.h"
#include "../workspace.h"
#include "loops.h"

namespace claq {
namespace {

using attention::Loops;

constexpr int64_t kFewRows = 8;      // fewer rows than this are computed straight from the keys, as they are copied
constexpr int64_t kFewTokens = 64;   // keys at a time then: they stay in the first-level cache
constexpr int64_t kBlockRows = 24;   // of many rows: rows of scores at a time
constexpr int64_t kBlockTokens = 512;
constexpr double kMostProducts = 72057594037927936.0;  // 2^56: no count of elements or bytes below overflows 64 bits
constexpr float kHidden = 1e30f;     // a mask this far below the largest leaves no weight, whatever the scores are

// Rounded, only used to decide into how many tasks to split.
constexpr double kSecondsPerCopy = 4e-10, kSecondsPerProduct = 4e-11;

void check(bool holds, const char* message) {
  if (!holds) throw InvalidArgument(message);
}

void validate(const claq_attention_desc& a) {
  check_sizes(a);
  if (a.batch == 0) return;  // tensors without elements may have no data
  const bool asked = a.rows > 0;
  check(!asked || (a.y && a.query), "query or y: is NULL");
  check(!asked || a.past == a.tokens || (a.key && a.value), "key or value: is NULL");
  check(!a.present_key == !a.present_value, "present_key and present_value: expected both or neither");
  check(a.cache_dtype == CLAQ_FLOAT32 || a.cache_dtype == CLAQ_FLOAT16, "cache_dtype: expected float32 or float16");
  check(a.cache_dtype == CLAQ_FLOAT32 || a.present_key, "present_key: is NULL, expected a cache in float16");
  check(a.past == 0 || (a.past_key && a.past_value && a.present_key), "past_key, past_value or present_key: is NULL, but there is a past");
  const bool same_keys = a.present_key && a.present_key == a.past_key, same_values = a.present_value && a.present_value == a.past_value;
  check(a.capacity > 0 ? same_keys == same_values : !same_keys && !same_values,
        "present_key and present_value: are the past's, expected both with a capacity, or neither");
}

// Keys or values of one head, or the part of them that begins at a token.
template <class Element>
struct Rows {
  const Element* data;
  int64_t stride;
};

// The weighted mean of values over the tokens seen so far, for a number of rows; each has its own largest score.
class Mean {
 public:
  // Of no tokens yet; `buffer` holds size(rows, value_size) floats.
  static Mean empty(float* buffer, int64_t rows, int64_t value_size) {
    std::fill(buffer, buffer + rows, -std::numeric_limits<float>::infinity());
    std::fill(buffer + rows, buffer + size(rows, value_size), 0.0f);
    return Mean(buffer, rows, value_size);
  }
  // Goes on with what a buffer holds.
  Mean(float* buffer, int64_t rows, int64_t value_size)
      : largest_(buffer), sum_(buffer + rows), total_(buffer + 2 * rows), rows_(rows), value_size_(value_size) {}
  static int64_t size(int64_t rows, int64_t value_size) { return rows * (2 + value_size); }

  // Turns the scores of tokens into weights for this mean; mask(r) points to row r's (null: no mask). Their values are then to be
  // added to `total`.
  template <class Mask>
  void weigh(const Loops& loops, float* scores, int64_t stride, int64_t tokens, float scale, Mask mask) {
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = scores + r * stride;
      const float found = loops.add_mask(row, tokens, scale, mask(r));
      const float largest = found > largest_[r] ? found : largest_[r];
      rescale(r, largest);
      sum_[r] += loops.exponentials(row, tokens, reference(largest));
    }
  }
  float* total() { return total_; }  // [rows, value_size]

  // Adds what another mean has seen, of the same rows.
  void add(const Mean& other) {
    for (int64_t r = 0; r < rows_; ++r) {
      if (other.sum_[r] == 0) continue;  // minus infinity everywhere
      const float largest = std::max(largest_[r], other.largest_[r]);
      rescale(r, largest);
      const float factor = std::exp(reference(other.largest_[r]) - reference(largest));
      sum_[r] += factor * other.sum_[r];
      for (int64_t i = 0; i < value_size_; ++i) total_[r * value_size_ + i] += factor * other.total_[r * value_size_ + i];
    }
  }

  void store(int64_t r, float* y) const {
    const float inverse = 1.0f / sum_[r];
    for (int64_t i = 0; i < value_size_; ++i) y[i] = total_[r * value_size_ + i] * inverse;
  }

 private:
  // What is taken off scores whose largest is this: where all are minus infinity their weights shall be 0 for now, not NaN.
  static float reference(float largest) { return largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest; }

  void rescale(int64_t r, float largest) {
    if (largest == largest_[r]) return;
    const float factor = sum_[r] == 0 ? 0.0f : std::exp(largest_[r] - largest);
    largest_[r] = largest;
    sum_[r] *= factor;
    for (int64_t i = 0; i < value_size_; ++i) total_[r * value_size_ + i] *= factor;
  }

  float *largest_, *sum_, *total_;
  int64_t rows_, value_size_;
};

// Of a cache of floats, or of the bits of float16: what is new is rounded into such a cache first and read there, so that a token counts
// the same when it is new and later.
template <class Element>
class Run {
  static constexpr bool kSingle = std::is_same_v<Element, float>;

 public:
  Run(const claq_attention_desc& a, const Loops& loops, const Host& host)
      : a_(a),
        host_(host),
        loops_(loops),
        pairs_(a.batch * a.kv_heads),
        groups_(a.heads / a.kv_heads),
        past_room_(a.capacity ? a.capacity : a.past),
        room_(a.capacity ? a.capacity : a.tokens),
        in_place_(a.present_key && a.present_key == a.past_key) {}

  void run() {
    if (a_.rows < kFewRows) few_rows();
    else many_rows();
  }

 private:
  // ---- keys and values: `pair` counts heads of keys over the batch -------------------------------------------------------

  // Keys or values: `fresh` are the new ones.
  struct Tensors {
    const Element* past;
    const float* fresh;
    Element* present;
    int64_t size;
  };
  Tensors keys() const { return {static_cast<const Element*>(a_.past_key), a_.key, static_cast<Element*>(a_.present_key), a_.key_size}; }
  Tensors values() const {
    return {static_cast<const Element*>(a_.past_value), a_.value, static_cast<Element*>(a_.present_value), a_.value_size};
  }

  // A new token as it was given.
  Rows<float> given(const Tensors& of, int64_t pair, int64_t token) const {
    const int64_t stride = a_.kv_heads * of.size;
    return {of.fresh + (pair / a_.kv_heads * (a_.tokens - a_.past) + token - a_.past) * stride + pair % a_.kv_heads * of.size, stride};
  }
  // Where a token comes from: the past or the new ones, or of these what was rounded into the cache.
  Rows<Element> source(const Tensors& of, int64_t pair, int64_t token) const {
    if (token < a_.past) return {of.past + (pair * past_room_ + token) * of.size, of.size};
    if constexpr (kSingle) return given(of, pair, token);
    else return {place(of, pair, token), of.size};
  }
  // Where it is in the cache that is returned; null without one.
  Element* place(const Tensors& of, int64_t pair, int64_t token) const {
    return of.present ? of.present + (pair * room_ + token) * of.size : nullptr;
  }
  // Where it is to be copied to when it is read; null if it is there, or without a cache.
  Element* copy_to(const Tensors& of, int64_t pair, int64_t token) const {
    return token < a_.past ? (in_place_ ? nullptr : place(of, pair, token)) : kSingle ? place(of, pair, token) : nullptr;
  }
  // Where it is read once it has been copied.
  Rows<Element> rows(const Tensors& of, int64_t pair, int64_t token) const {
    if (of.present) return {place(of, pair, token), of.size};
    return source(of, pair, token);
  }

  // Copies those of the tokens [first, last) of a pair that are new into the cache that is returned, if one is.
  void copy_new(const Tensors& of, int64_t pair, int64_t first, int64_t last) const {
    for (int64_t t = std::max(first, a_.past); of.present && t < last; ++t) {
      const float* const from = given(of, pair, t).data;
      if constexpr (kSingle) std::memcpy(place(of, pair, t), from, static_cast<size_t>(of.size) * sizeof(float));
      else loops_.narrow(from, of.size, place(of, pair, t));
    }
  }
  // All of the tokens [first, last) likewise.
  void copy(const Tensors& of, int64_t pair, int64_t first, int64_t last) const {
    const int64_t cached = std::min(last, a_.past) - first;
    if (cached > 0 && of.present && !in_place_) {
      std::memcpy(place(of, pair, first), source(of, pair, first).data, static_cast<size_t>(cached * of.size) * sizeof(Element));
    }
    copy_new(of, pair, first, last);
  }

  const float* mask(int64_t batch, int64_t head, int64_t row, int64_t token) const {
    return a_.mask ? a_.mask + batch * a_.mask_batch + head * a_.mask_head + row * a_.mask_row + token : nullptr;
  }

  // ---- few rows: each task has an equal part of all tokens of all pairs, and looks at them once --------------------------

  void few_rows() const {
    const int64_t rows = a_.rows * groups_, work = pairs_ * a_.tokens;
    if (rows == 0) {  // there is only a cache to hand on
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        for (const Tensors& each : {keys(), values()}) copy(each, pair, 0, a_.tokens);
      }
      return;
    }
    if (work == 0) {
      std::fill(a_.y, a_.y + a_.batch * a_.rows * a_.heads * a_.value_size, 0.0f);
      return;
    }
    const double seconds = static_cast<double>(work * (a_.key_size + a_.value_size)) *
                           (kSecondsPerCopy + static_cast<double>(rows) * kSecondsPerProduct);
    const int64_t tasks = task_count(host_, seconds, work);
    // A task's part of a pair gets the place pair + task: from one part to the next either grows by one.
    const int64_t size = Mean::size(rows, a_.value_size);
    Workspace workspace(Workspace::bytes_for<float>((pairs_ + tasks) * size));
    float* means = workspace.take<float>((pairs_ + tasks) * size);
    for_each(host_, tasks, [&](int64_t task) {
      const int64_t end = work * (task + 1) / tasks;
      for (int64_t at = work * task / tasks; at < end;) {
        const int64_t pair = at / a_.tokens, first = at % a_.tokens, last = std::min(a_.tokens, first + end - at);
        add_tokens(pair, first, last, Mean::empty(means + (pair + task) * size, rows, a_.value_size));
        at += last - first;
      }
    });
    for (int64_t pair = 0; pair < pairs_; ++pair) {
      // The last task that begins at or before a token is the one that has it.
      const auto task_of = [&](int64_t place) { return ((place + 1) * tasks - 1) / work; };
      const int64_t first = task_of(pair * a_.tokens), last = task_of((pair + 1) * a_.tokens - 1);
      const auto mean = [&](int64_t task) { return Mean(means + (pair + task) * size, rows, a_.value_size); };
      Mean total = mean(first);
      for (int64_t task = first + 1; task <= last; ++task) total.add(mean(task));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = pair % a_.kv_heads * groups_ + r % groups_;
        total.store(r, a_.y + ((pair / a_.kv_heads * a_.rows + r / groups_) * a_.heads + head) * a_.value_size);
      }
    }
  }

  const attention::CacheLoops<Element>& cache_loops() const {
    if constexpr (kSingle) return loops_.single;
    else return loops_.half;
  }

  // Copies and adds tokens [first, last) of a pair, for all rows of the heads that read it.
  void add_tokens(int64_t pair, int64_t first, int64_t last, Mean mean) const {
    const Tensors all_keys = keys(), all_values = values();
    if constexpr (!kSingle) {
      for (const Tensors& each : {all_keys, all_values}) copy_new(each, pair, first, last);
    }
    const int64_t rows = a_.rows * groups_, batch = pair / a_.kv_heads, head = pair % a_.kv_heads * groups_;
    const int64_t stride = round_up(kFewTokens, loops_.panel) + loops_.panel;  // scores are written in whole vectors
    Workspace workspace(Workspace::bytes_for<float>(rows * a_.key_size) + Workspace::bytes_for<float>(rows * stride));
    float* query = workspace.take<float>(rows * a_.key_size);
    float* scores = workspace.take<float>(rows * stride);
    for (int64_t s = 0; s < a_.rows; ++s) {
      std::copy_n(a_.query + ((batch * a_.rows + s) * a_.heads + head) * a_.key_size, groups_ * a_.key_size, query + s * groups_ * a_.key_size);
    }
    for (int64_t t = first; t < last; t += kFewTokens) {
      const int64_t end = std::min(t + kFewTokens, last);
      // Of a past and new ones the two parts lie apart.
      const int64_t middle = std::clamp(a_.past, t, end);
      const auto each_part = [&](auto use) {
        if (t < middle) use(t, middle - t);
        if (middle < end) use(middle, end - middle);
      };
      each_part([&](int64_t token, int64_t count) {
        const Rows<Element> key = source(all_keys, pair, token);
        cache_loops().scores(query, rows, key.data, key.stride, count, a_.key_size, scores + token - t, stride,
                             copy_to(all_keys, pair, token));
      });
      mean.weigh(loops_, scores, stride, end - t, a_.scale, [&](int64_t r) { return mask(batch, head + r % groups_, r / groups_, t); });
      each_part([&](int64_t token, int64_t count) {
        const Rows<Element> value = source(all_values, pair, token);
        cache_loops().mean(scores + token - t, stride, rows, value.data, value.stride, count, a_.value_size, mean.total(),
                           copy_to(all_values, pair, token));
      });
    }
  }

  // ---- many rows: keys are turned into panels, blocks of rows are multiplied by the panels that they see -----------------

  int64_t panels() const { return (a_.tokens + loops_.panel - 1) / loops_.panel; }
  int64_t blocks() const { return (a_.rows + kBlockRows - 1) / kBlockRows; }
  int64_t panel_floats() const { return loops_.panel * a_.key_size; }

  // What many rows read of a pair.
  struct Prepared {
    float* keys;    // turned [panels, key_size, panel]
    float* values;  // [tokens, value_size]; null: they are read where they are
  };
  int64_t wide_floats() const { return kSingle ? 0 : a_.tokens * a_.value_size; }
  size_t prepared_bytes(int64_t pairs) const {
    return Workspace::bytes_for<float>(pairs * panels() * panel_floats()) + Workspace::bytes_for<float>(pairs * wide_floats());
  }
  Prepared take_prepared(Workspace& workspace, int64_t pairs) const {
    float* const turned = workspace.take<float>(pairs * panels() * panel_floats());
    return {turned, kSingle ? nullptr : workspace.take<float>(pairs * wide_floats())};
  }
  Prepared of_pair(const Prepared& all, int64_t pair) const {
    return {all.keys + pair * panels() * panel_floats(), all.values ? all.values + pair * wide_floats() : nullptr};
  }

  void many_rows() const {
    const int64_t sets_b = a_.mask_batch ? a_.batch : 1, sets_h = a_.mask_head ? a_.heads : 1;
    const int64_t seen_count = a_.mask ? sets_b * sets_h * blocks() * panels() : 0;
    // With pairs for all threads each task has one and its panels stay in its cache; else all panels are made first.
    const bool by_pair = pairs_ >= task_count(host_, 1.0, std::numeric_limits<int64_t>::max());
    Workspace workspace(Workspace::bytes_for<uint8_t>(seen_count) + (by_pair ? 0 : prepared_bytes(pairs_)));
    uint8_t* seen = a_.mask ? workspace.take<uint8_t>(seen_count) : nullptr;
    const int64_t seen_tasks = a_.mask ? sets_b * sets_h * blocks() : 0;
    const auto look = [&](int64_t task) {
      const int64_t block = task % blocks(), set = task / blocks();
      find_seen(set / sets_h, set % sets_h, block, seen + task * panels());
    };
    const auto seen_by = [&](int64_t batch, int64_t head, int64_t block) -> const uint8_t* {
      if (!seen) return nullptr;
      const int64_t set = (a_.mask_batch ? batch : 0) * sets_h + (a_.mask_head ? head : 0);
      return seen + (set * blocks() + block) * panels();
    };
    if (by_pair) {
      for_each(host_, seen_tasks, look);
      for_each(host_, pairs_, [&](int64_t pair) {
        Workspace own(prepared_bytes(1));
        const Prepared prepared = take_prepared(own, 1);
        prepare(pair, 0, panels(), prepared);
        for (int64_t g = 0; g < groups_; ++g) {
          const int64_t head = pair % a_.kv_heads * groups_ + g;
          for (int64_t block = 0; block < blocks(); ++block) {
            multiply(pair, head, block, prepared, seen_by(pair / a_.kv_heads, head, block));
          }
        }
      });
      return;
    }
    const Prepared prepared = take_prepared(workspace, pairs_);
    const int64_t pieces = std::max<int64_t>(1, panels() / 2);  // of a pair's panels
    for_each(host_, seen_tasks + pairs_ * pieces, [&](int64_t task) {
      if (task < seen_tasks) return look(task);
      const int64_t pair = (task - seen_tasks) / pieces, piece = (task - seen_tasks) % pieces;
      prepare(pair, panels() * piece / pieces, panels() * (piece + 1) / pieces, of_pair(prepared, pair));
    });
    // Rows see what is before them, so the last blocks take longest: they go first.
    const int64_t heads = a_.batch * a_.heads;
    for_each(host_, heads * blocks(), [&](int64_t task) {
      const int64_t block = blocks() - 1 - task / heads, batch = task % heads / a_.heads, head = task % a_.heads;
      const int64_t pair = batch * a_.kv_heads + head / groups_;
      multiply(pair, head, block, of_pair(prepared, pair), seen_by(batch, head, block));
    });
  }

  // Copies panels [first, last) of a pair's keys and values into the cache, turns the keys, and widens both where they are not floats.
  void prepare(int64_t pair, int64_t first, int64_t last, const Prepared& prepared) const {
    Workspace workspace(kSingle ? 0 : Workspace::bytes_for<float>(panel_floats()));
    [[maybe_unused]] float* const wide = kSingle ? nullptr : workspace.take<float>(panel_floats());
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t t = panel * loops_.panel, end = std::min(a_.tokens, t + loops_.panel);
      for (const Tensors& each : {keys(), values()}) copy(each, pair, t, end);
      float* const turned = prepared.keys + panel * panel_floats();
      const Rows<Element> key = rows(keys(), pair, t);
      if constexpr (kSingle) {
        loops_.turn(key.data, key.stride, end - t, a_.key_size, turned);
      } else {
        loops_.widen(key.data, (end - t) * a_.key_size, wide);
        loops_.turn(wide, a_.key_size, end - t, a_.key_size, turned);
        loops_.widen(place(values(), pair, t), (end - t) * a_.value_size, prepared.values + t * a_.value_size);
      }
    }
  }

  // Which panels the rows of a block see: seen[panel] is 0 if no row has a weight there.
  void find_seen(int64_t batch, int64_t head, int64_t block, uint8_t* seen) const {
    std::fill_n(seen, panels(), uint8_t{0});  // of no tokens `seen` is null
    const int64_t last = a_.mask_row ? std::min(a_.rows, (block + 1) * kBlockRows) : block * kBlockRows + 1;
    for (int64_t s = block * kBlockRows; s < last; ++s) {
      const float* row = mask(batch, head, s, 0);
      const float least = loops_.largest(row, a_.tokens) - kHidden;
      for (int64_t panel = 0; panel < panels(); ++panel) {
        const int64_t t = panel * loops_.panel;
        seen[panel] |= loops_.reaches(row + t, std::min(loops_.panel, a_.tokens - t), least);
      }
    }
  }

  // Values of a pair from a token on, as floats.
  Rows<float> wide_values(const Prepared& prepared, int64_t pair, int64_t token) const {
    if constexpr (kSingle) return rows(values(), pair, token);
    else return {prepared.values + token * a_.value_size, a_.value_size};
  }

  void multiply(int64_t pair, int64_t head, int64_t block, const Prepared& prepared, const uint8_t* seen) const {
    const int64_t first = block * kBlockRows, count = std::min(kBlockRows, a_.rows - first), batch = pair / a_.kv_heads;
    const int64_t most = std::max<int64_t>(1, kBlockTokens / loops_.panel), stride = most * loops_.panel;
    const int64_t size = Mean::size(count, a_.value_size);
    Workspace workspace(Workspace::bytes_for<float>(count * stride) + Workspace::bytes_for<float>(size));
    float* scores = workspace.take<float>(count * stride);
    Mean mean = Mean::empty(workspace.take<float>(size), count, a_.value_size);
    const float* query = a_.query + ((batch * a_.rows + first) * a_.heads + head) * a_.key_size;
    for (int64_t panel = 0; panel < panels();) {
      if (seen && !seen[panel]) {
        ++panel;
        continue;
      }
      // Panels side by side that are seen.
      int64_t end = panel + 1;
      while (end < panels() && end - panel < most && (!seen || seen[end])) ++end;
      const int64_t t = panel * loops_.panel, tokens = std::min(a_.tokens, end * loops_.panel) - t;
      for (int64_t p = panel; p < end; ++p) {
        loops_.product(false, query, a_.heads * a_.key_size, count, prepared.keys + p * panel_floats(), loops_.panel, a_.key_size, loops_.panel,
                       scores + (p - panel) * loops_.panel, stride);
      }
      mean.weigh(loops_, scores, stride, tokens, a_.scale, [&](int64_t r) { return mask(batch, head, first + r, t); });
      const Rows<float> value = wide_values(prepared, pair, t);
      loops_.product(true, scores, stride, count, value.data, value.stride, tokens, a_.value_size, mean.total(), a_.value_size);
      panel = end;
    }
    for (int64_t r = 0; r < count; ++r) {
      float* y = a_.y + ((batch * a_.rows + first + r) * a_.heads + head) * a_.value_size;
      if (panels()) mean.store(r, y);
      else std::fill(y, y + a_.value_size, 0.0f);
    }
  }

  const claq_attention_desc& a_;
  const Host& host_;
  const Loops& loops_;
  const int64_t pairs_, groups_;
  const int64_t past_room_, room_;  // tokens that a head of the past, and of what is returned, has room for
  const bool in_place_;             // both are the same memory
};

}  // namespace

const Loops& choose_attention_loops() {
  [[maybe_unused]] const Vectors vectors = choose_vectors(nullptr);
#if defined(__x86_64__)
  if (vectors == Vectors::kAvx512) return attention::kAvx512Loops;
  if (vectors == Vectors::kAvx2) return attention::kAvx2Loops;
#endif
  return attention::kPortableLoops;
}

void check_sizes(const claq_attention_desc& a) {
  const struct {
    const char* name;
    int64_t value;
    int64_t smallest;
  } sizes[] = {{"batch", a.batch, 0},   {"heads", a.heads, 1},       {"kv_heads", a.kv_heads, 1},    {"rows", a.rows, 0},
               {"tokens", a.tokens, 0}, {"key_size", a.key_size, 0}, {"value_size", a.value_size, 0}, {"capacity", a.capacity, 0}};
  for (const auto& size : sizes) {
    if (size.value < size.smallest || size.value > kLargestAttentionSize) {
      throw InvalidArgument(std::string(size.name) + ": is " + std::to_string(size.value) + ", expected " + std::to_string(size.smallest) +
                            " to " + std::to_string(kLargestAttentionSize));
    }
  }
  check(a.heads % a.kv_heads == 0, "heads: expected a positive multiple of kv_heads");
  check(a.past >= 0 && a.past <= a.tokens, "past: expected 0 to tokens");
  check(a.capacity == 0 || a.capacity >= a.tokens, "capacity: expected 0, or tokens or more");
  double products = 1;
  for (const int64_t size : {a.batch, a.heads, a.rows, std::max(a.tokens, a.capacity), std::max(a.key_size, a.value_size)}) {
    products *= static_cast<double>(std::max<int64_t>(size, 1));
  }
  check(products <= kMostProducts, "batch, heads, rows, tokens, key_size or value_size: is too large beside the others");
}

void attend(const claq_attention_desc& attention, const Loops& loops, const Host& host) {
  validate(attention);
  if (attention.batch == 0) return;
  if (attention.cache_dtype == CLAQ_FLOAT16) Run<uint16_t>(attention, loops, host).run();
  else Run<float>(attention, loops, host).run();
}

}  // namespace claq
