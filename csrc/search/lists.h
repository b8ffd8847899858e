// Inverted lists of RaBitQ codes (Gao and Long, SIGMOD 2024) as the kernels see them: plain data, see common/tensor.h.
//
// A row x of a list lies at c, its centroid times a level, plus r, in rotated coordinates. Its code is the signs of r:
//   <q, x> = <q, c> + <q, r>,  <q, r> ≈ factor <q, sign r>,  factor = |r|² / Σ|rᵢ|
// is the estimate that a scan ranks rows by; the best of them are scored by int8 codes of x.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastlvm {

inline constexpr int64_t block_rows = 32;  // whose codes lie together, [columns, block_rows], and then their factors
inline constexpr int64_t bytes_of_pair = 2 * block_rows;

// Of the codes alone, and of a block. Functions of this file are static, so that no linker merges those of two
// instruction sets.
static constexpr int64_t code_bytes(int64_t pairs) { return pairs * bytes_of_pair; }
static constexpr int64_t bytes_of_block(int64_t pairs) {
  return code_bytes(pairs) + block_rows * static_cast<int64_t>(sizeof(float));
}
inline constexpr int64_t rotation_rounds = 4;

// A score as a whole number in the same order, and then a place, the smallest first: a greater key comes first. No two
// rows have the same, so that the best of them do not depend on who found them.
[[maybe_unused]] static uint64_t key_of(float score, uint32_t place) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (~place & 0xffffffffu);
}

// Signs, then a Hadamard transform of the first (even rounds) or last (odd rounds) 2^k coordinates, k as large as fits.
struct Rotation {
  int64_t dim;
  const float* signs;  // [rotation_rounds, dim], 1 or -1
  bool back;           // the inverse
};

// <q, sign r> ≈ base + step · Σ of the entries that a row's bits select. Columns are bytes of a row's code; a pair of
// them has 128 bytes of entries: for the low four bits of each byte, two times 16 of the first and of the second
// column, and then as many for the high ones.
struct Table {
  uint8_t* entries;  // [pairs, 128]
  float base, step;
};

// Some rows of a list, from its beginning or from one of its blocks on.
struct Scan {
  int64_t rows, pairs;
  const uint8_t* blocks;
  const uint8_t* next;  // blocks that are scanned afterwards, to be fetched meanwhile
  Table table;
  float centroid;   // <q, c>
  float threshold;  // estimates below it are left out
  int32_t first;    // position of the first row
  uint64_t* keys;   // of estimates and positions, with room for `rows` rounded up to a block
};

// Exact for the int8 codes: scale Σ qᵢ codeᵢ, of `count` rows; `following` ones are fetched meanwhile.
struct Score {
  int64_t dim, count, following;
  const float* query;
  const int8_t* codes;       // [.., dim]
  const float* scales;       // [..]
  const int32_t* positions;  // [count + following]
  float* scores;
};

struct SearchKernels {
  void (*rotate)(const Rotation&, float* x);
  void (*fill)(const float* query, int64_t dim, int64_t pairs, Table& table);
  int64_t (*scan)(const Scan&);  // how many rows it kept
  void (*score)(const Score&);
};

}  // namespace fastlvm
