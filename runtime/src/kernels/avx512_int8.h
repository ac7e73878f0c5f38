// int8 sums for the AVX-512 families; `Isa` says how codes become weights and how weights meet activations:
//
//   kMostTogether<kWidth>: how many vectors of 16 outputs can be decoded together, 1 or 2 (kTogether: how many are);
//   kHeldTables: whether tables are worth registers; else they stay in memory;
//   load_table<kWidth>(table, group), step<kWidth, kTogether>(words, i), decode<kWidth, kTogether, second>(words, step, i, entries,
//     decoded): centroids of those outputs and the four columns of group group_of(i, second), as bytes; `step` is what both groups of
//     a step share. `words` and `decoded` are kTogether. Of two, the second is decoded with the two halves of its lanes exchanged;
//   weights(decoded), activation(four), begin(correction), dot(sum, weights, activation): the arithmetic;
//   rows_ahead(width): how many rows of code words ahead they are fetched for a few rows of x; kToSecondLevel: to the second-level
//     cache, and always, else to the first and only where they come from memory; row_vectors(width), few_rows_vectors(width):
//     vectors of outputs side by side for a row alone and for two to four;
//   held_activations(width): whether those of a row alone are worth registers;
//   kTileRows, kTileVectors: a register tile of the panels; kShallowRows: up to how many rows panels are shallow, and kShallowBlocks: how
//     many blocks deep these are (avx512_panels.h).
#pragma once

#include "avx512_panels.h"
#include "avx512_stream.h"

namespace claq {
namespace {

// Of at most kMost rows.
template <class Isa, int kMost = kPackedRows>
void few_rows_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                   int64_t stride) {
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  const PackedPlace place = packed_place(layer, activations, m0);
  for_tail<kMost>(place.rows, [&](auto rows) { stream<Isa, decltype(rows)::kValue>(layer, place, n0, n1, sums, stride); });
}

template <class Isa>
void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
               int64_t stride, void* scratch) {
  if (m1 - m0 <= kPackedRows) return few_rows_sums<Isa>(layer, activations, m0, m1, n0, n1, sums, stride);
  panel_sums<Isa>(layer, activations, m0, m1, n0, n1, sums, stride, static_cast<uint8_t*>(scratch));
}

}  // namespace
}  // namespace claq
