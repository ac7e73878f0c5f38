// Attention of random shapes on every kernel family against plain loops in double, for claq_check.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "claq.h"
#include "../../runtime/src/half.h"

// A key or value as a cache holds it.
inline uint16_t to_cache(float number, uint16_t) { return claq::float_to_half(number); }
inline float to_cache(float number, float) { return number; }
inline float from_cache(uint16_t bits) { return claq::half_to_float(bits); }
inline float from_cache(float number) { return number; }

template <class Cache>
struct TestAttention {
  int64_t batch, kv_heads, groups, rows, past, tokens, key_size, value_size;
  bool cached;
  int64_t capacity;  // of buffers; 0: none
  bool in_place;     // the past's buffers are those of the present
  int64_t mask_batch, mask_head, mask_row;
  // Exactly as many elements as the interface says, on the heap, so that an access past an end is seen.
  std::vector<float> query, key, value, mask, y;
  std::vector<Cache> past_key, past_value, present_key, present_value;

  claq_attention_desc desc() {
    claq_attention_desc desc{};
    desc.struct_size = sizeof desc;
    desc.batch = batch;
    desc.heads = kv_heads * groups;
    desc.kv_heads = kv_heads;
    desc.rows = rows;
    desc.tokens = tokens;
    desc.past = past;
    desc.key_size = key_size;
    desc.value_size = value_size;
    desc.scale = 0.3f;
    desc.query = query.data();
    desc.key = key.data();
    desc.value = value.data();
    desc.mask = mask.empty() ? nullptr : mask.data();
    desc.mask_batch = mask_batch;
    desc.mask_head = mask_head;
    desc.mask_row = mask_row;
    desc.y = y.data();
    desc.cache_dtype = sizeof(Cache) == 2 ? CLAQ_FLOAT16 : CLAQ_FLOAT32;
    if (cached) {
      desc.past_key = in_place ? present_key.data() : past_key.data();
      desc.past_value = in_place ? present_value.data() : past_value.data();
      desc.present_key = present_key.data();
      desc.present_value = present_value.data();
      desc.capacity = capacity;
    }
    return desc;
  }

  // Tokens that a head of the past, and of the present, has room for.
  int64_t past_room() const { return capacity ? capacity : past; }
  int64_t room() const { return capacity ? capacity : tokens; }

  float key_at(int64_t b, int64_t h, int64_t t, int64_t i) const {
    if (t < past) return from_cache(past_key[static_cast<size_t>(((b * kv_heads + h) * past_room() + t) * key_size + i)]);
    return rounded(key[static_cast<size_t>(((b * (tokens - past) + t - past) * kv_heads + h) * key_size + i)]);
  }
  float value_at(int64_t b, int64_t h, int64_t t, int64_t i) const {
    if (t < past) return from_cache(past_value[static_cast<size_t>(((b * kv_heads + h) * past_room() + t) * value_size + i)]);
    return rounded(value[static_cast<size_t>(((b * (tokens - past) + t - past) * kv_heads + h) * value_size + i)]);
  }
  static float rounded(float number) { return from_cache(to_cache(number, Cache{})); }
};

template <class Cache>
TestAttention<Cache> random_attention(std::mt19937& random) {
  const auto below = [&](int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); };
  TestAttention<Cache> a{};
  a.batch = 1 + below(3);
  a.kv_heads = 1 + below(3);
  a.groups = 1 + below(3);
  a.rows = 1 + below(below(2) ? 6 : 60);
  a.cached = sizeof(Cache) == 2 || below(3) > 0;
  a.past = a.cached ? below(150) : 0;
  a.tokens = a.cached ? a.past + a.rows : below(150);
  a.capacity = a.cached && below(2) ? a.tokens + below(20) : 0;
  a.in_place = a.capacity && below(2);
  a.key_size = 1 + below(40);
  a.value_size = 1 + below(40);
  const auto fill = [&](auto& values, int64_t count) {
    std::normal_distribution<float> normal;
    values.resize(static_cast<size_t>(count));
    for (auto& value : values) value = to_cache(normal(random), std::decay_t<decltype(value)>{});
  };
  const int64_t heads = a.kv_heads * a.groups, fresh = a.tokens - a.past;
  fill(a.query, a.batch * a.rows * heads * a.key_size);
  fill(a.key, a.batch * fresh * a.kv_heads * a.key_size);
  fill(a.value, a.batch * fresh * a.kv_heads * a.value_size);
  if (below(4)) {
    const int64_t mask_rows = below(2) ? a.rows : 1, mask_heads = below(2) ? heads : 1, mask_batches = below(2) ? a.batch : 1;
    a.mask_row = mask_rows > 1 ? a.tokens : 0;
    a.mask_head = mask_heads > 1 ? mask_rows * a.tokens : 0;
    a.mask_batch = mask_batches > 1 ? mask_heads * mask_rows * a.tokens : 0;
    fill(a.mask, mask_batches * mask_heads * mask_rows * a.tokens);
    const int64_t hidden = below(3);
    for (float& value : a.mask) value = below(3) < hidden ? -1.7e38f : value;
  }
  fill(a.past_key, a.batch * a.kv_heads * a.past_room() * a.key_size);
  fill(a.past_value, a.batch * a.kv_heads * a.past_room() * a.value_size);
  // What lies behind the tokens of a buffer is not to be read.
  for (int64_t pair = 0; pair < a.batch * a.kv_heads; ++pair) {
    for (int64_t t = a.past; t < a.past_room(); ++t) {
      std::fill_n(a.past_key.begin() + (pair * a.past_room() + t) * a.key_size, a.key_size, to_cache(std::nanf(""), Cache{}));
      std::fill_n(a.past_value.begin() + (pair * a.past_room() + t) * a.value_size, a.value_size, to_cache(std::nanf(""), Cache{}));
    }
  }
  a.y.resize(static_cast<size_t>(a.batch * a.rows * heads * a.value_size));
  a.present_key.resize(static_cast<size_t>(a.cached ? a.batch * a.kv_heads * a.room() * a.key_size : 0));
  a.present_value.resize(static_cast<size_t>(a.cached ? a.batch * a.kv_heads * a.room() * a.value_size : 0));
  return a;
}

// The largest difference from attention written out in double.
template <class Cache>
double attention_error(const TestAttention<Cache>& a) {
  double worst = 0;
  const int64_t heads = a.kv_heads * a.groups;
  std::vector<double> weight(static_cast<size_t>(a.tokens));
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < a.rows; ++r) {
        double largest = -1e300, sum = 0;
        for (int64_t t = 0; t < a.tokens; ++t) {
          double score = 0;
          for (int64_t i = 0; i < a.key_size; ++i) {
            score += static_cast<double>(a.query[static_cast<size_t>(((b * a.rows + r) * heads + h) * a.key_size + i)]) *
                     a.key_at(b, h / a.groups, t, i);
          }
          score *= 0.3f;
          // Added in float, in which a score beside a hidden token's number is lost.
          if (!a.mask.empty()) {
            score = static_cast<float>(score) + a.mask[static_cast<size_t>(b * a.mask_batch + h * a.mask_head + r * a.mask_row + t)];
          }
          weight[static_cast<size_t>(t)] = score;
          largest = std::max(largest, score);
        }
        for (double& w : weight) sum += w = std::exp(w - largest);
        for (int64_t i = 0; i < a.value_size; ++i) {
          double wanted = 0;
          for (int64_t t = 0; t < a.tokens; ++t) wanted += weight[static_cast<size_t>(t)] / sum * a.value_at(b, h / a.groups, t, i);
          worst = std::max(worst, std::fabs(wanted - a.y[static_cast<size_t>(((b * a.rows + r) * heads + h) * a.value_size + i)]));
        }
      }
    }
  }
  for (int64_t b = 0; a.cached && b < a.batch; ++b) {
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      for (int64_t t = 0; t < a.tokens; ++t) {
        const int64_t at = (b * a.kv_heads + h) * a.room() + t;
        for (int64_t i = 0; i < a.key_size; ++i) {
          if (from_cache(a.present_key[static_cast<size_t>(at * a.key_size + i)]) != a.key_at(b, h, t, i)) return 1e9;
        }
        for (int64_t i = 0; i < a.value_size; ++i) {
          if (from_cache(a.present_value[static_cast<size_t>(at * a.value_size + i)]) != a.value_at(b, h, t, i)) return 1e9;
        }
      }
    }
  }
  return worst;
}

template <class Cache, class Expect>
void check_attention(std::mt19937& random, const std::vector<std::string>& kernels, Expect expect) {
  TestAttention<Cache> a = random_attention<Cache>(random);
  for (const std::string& kernel : kernels) {
    setenv("CLAQ_KERNEL", kernel.c_str(), 1);
    for (const int64_t threads : {0, 3}) {
      std::fill(a.y.begin(), a.y.end(), -1.0f);
      if (a.in_place) {
        a.present_key = a.past_key;
        a.present_value = a.past_value;
      }
      const claq_attention_desc desc = a.desc();
      char message[256] = "";
      const claq_status status = claq_attend(&desc, threads ? claq_pool_parallel_for : nullptr, reinterpret_cast<void*>(threads), message, sizeof message);
      expect(status == CLAQ_OK, "attention: " + std::string(message));
      const double error = attention_error(a);
      expect(error < 1e-4, "attention by " + kernel + ": " + std::to_string(a.rows) + " rows, " + std::to_string(a.past) + " of " +
                               std::to_string(a.tokens) + " tokens cached in " + std::to_string(sizeof(Cache)) + " bytes, error " + std::to_string(error));
    }
  }
  unsetenv("CLAQ_KERNEL");
}

// Without elements tensors have no data: no tokens, with and without a mask, and no batch.
template <class Expect>
void check_empty_attention(Expect expect) {
  for (const int64_t rows : {2, 40}) {
    for (const int64_t batch : {0, 1}) {
      std::vector<float> query(static_cast<size_t>(rows * 4)), y(query.size(), -1.0f);
      const float none = 0;
      claq_attention_desc desc{};
      desc.struct_size = sizeof desc;
      desc.batch = batch;
      desc.heads = desc.kv_heads = 1;
      desc.rows = rows;
      desc.cache_dtype = CLAQ_FLOAT32;
      desc.tokens = desc.past = batch ? 0 : 3;
      desc.key_size = desc.value_size = 4;
      desc.query = query.data();
      desc.mask = &none;
      desc.y = y.data();
      char message[256] = "";
      const claq_status status = claq_attend(&desc, nullptr, nullptr, message, sizeof message);
      expect(status == CLAQ_OK, "empty attention: " + std::string(message));
      expect(y == std::vector<float>(y.size(), batch ? 0.0f : -1.0f), "empty attention: wrong result");
    }
  }
}

template <class Expect>
void check_bad_attention(std::mt19937& random, Expect expect) {
  TestAttention<float> a = random_attention<float>(random);
  const auto refused = [&](const char* name, auto change) {
    claq_attention_desc desc = a.desc();
    change(desc);
    char message[256] = "";
    const bool found = claq_attend(&desc, nullptr, nullptr, message, sizeof message) == CLAQ_INVALID_ARGUMENT &&
                       std::string(message).find(name) != std::string::npos;
    expect(found, std::string("attention with a wrong ") + name + ": " + message);
  };
  refused("struct_size", [](claq_attention_desc& d) { d.struct_size = 8; });
  refused("kv_heads", [](claq_attention_desc& d) { d.kv_heads = 0; });
  refused("kv_heads", [](claq_attention_desc& d) { d.heads = 3; d.kv_heads = 2; });
  refused("heads", [](claq_attention_desc& d) { d.heads = d.kv_heads = int64_t{1} << 62; d.key_size = d.value_size = 0; });
  refused("tokens", [](claq_attention_desc& d) { d.tokens = int64_t{1} << 31; });
  refused("too large", [](claq_attention_desc& d) { d.batch = d.rows = d.tokens = int64_t{1} << 29; });
  refused("past", [](claq_attention_desc& d) { d.past = d.tokens + 1; });
  refused("key_size", [](claq_attention_desc& d) { d.key_size = -1; });
  refused("value", [](claq_attention_desc& d) { d.value = nullptr; });
  refused("present_value", [](claq_attention_desc& d) { d.present_key = d.y; d.present_value = nullptr; });
  refused("capacity", [](claq_attention_desc& d) { d.tokens += 2; d.capacity = d.tokens - 1; });
  refused("capacity", [](claq_attention_desc& d) { d.capacity = -1; });
  // The present in the memory of the past: keys alone, and without buffers.
  refused("present_key", [](claq_attention_desc& d) {
    d.past = 0;
    d.capacity = d.tokens + 1;
    d.past_key = d.present_key = d.present_value = d.y;
    d.past_value = nullptr;
  });
  refused("present_key", [](claq_attention_desc& d) {
    d.capacity = 0;
    d.past_key = d.present_key = d.y;
    d.past_value = d.present_value = d.y;
  });
  refused("cache_dtype", [](claq_attention_desc& d) { d.cache_dtype = CLAQ_BFLOAT16; });
  refused("cache_dtype", [](claq_attention_desc& d) { d.cache_dtype = 0; });
  refused("present_key", [](claq_attention_desc& d) {
    d.cache_dtype = CLAQ_FLOAT16;
    d.past = 0;
    d.past_key = d.past_value = d.present_key = d.present_value = nullptr;
  });
  refused("past_key", [](claq_attention_desc& d) { d.past = 1; d.tokens = 5; d.past_key = nullptr; });
}
