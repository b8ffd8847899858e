// int8 and bfloat16 products with AMX; nothing where the target lacks it.
//
// A block of packed weights is what the instructions want: 16 groups of inputs are a tile of 16 rows of 64 bytes. Sums
// are those of avx512_vnni.cpp bit for bit, and near those of avx512_bf16.cpp, which prepare the activations and
// multiply where there are few inputs.
#include "predictor/products.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define FASTLVM_ISA avx512_amx
#define FASTLVM_VECTOR_AVX512
#include "predictor/product.h"

namespace fastlvm {
namespace avx512_amx::product {
namespace {

constexpr int64_t tile_rows = 16, tile_groups = 16, tile_bytes = 64;  // of a row
constexpr int64_t least_groups = 64;                                  // of inputs that are worth setting the tiles up

// Tiles 0 … 3 are sums of 2 tiles of rows × 2 blocks, 4 activations, 5 weights, 6 and 7 the same of the last groups.
class Tiles {
 public:
  Tiles(int64_t rows, int64_t last_groups) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto set = [&](int tile, int64_t count, int64_t bytes) {
      config.rows[tile] = static_cast<uint8_t>(count), config.bytes[tile] = static_cast<uint16_t>(bytes);
    };
    for (int tile = 0; tile < 5; ++tile) set(tile, rows, tile_bytes);
    set(5, tile_groups, tile_bytes);
    if (last_groups > 0) set(6, rows, last_groups * 4), set(7, last_groups, tile_bytes);
    asm volatile("" : : "r"(&config) : "memory");  // GCC 12 takes the instruction to read 8 of the 64 bytes
    _tile_loadconfig(&config);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

struct Int8 {
  using Sum = int32_t;
  static constexpr bool whole = true;
  static const Product* vectors() { return avx512_vnni_int8(); }
  static Vec finish(const int32_t* sums, const Matrix& m, int64_t output, float scale) {
    const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_loadu_si512(m.sums + output));
    return product::scaled({_mm512_cvtepi32_ps(sum)}, m, output, scale);
  }
};

struct Bf16 {
  using Sum = float;
  static constexpr bool whole = false;
  static const Product* vectors() { return avx512_bf16_product(); }
  static Vec finish(const float* sums, const Matrix&, int64_t, float) { return Vec::load(sums); }
};

// The instructions take the numbers of their tiles as constants.
#define FASTLVM_DOT(sum, x, w)   \
  do {                           \
    if constexpr (Dot::whole)    \
      _tile_dpbusd(sum, x, w);   \
    else                         \
      _tile_dpbf16ps(sum, x, w); \
  } while (false)

// 16 groups, or the last ones, of the inputs: x of the first row, w of the first block, `block` bytes to the second.
#define FASTLVM_STEP(X, W)                            \
  do {                                                \
    _tile_loadd(X, x, stride);                        \
    _tile_loadd(W, w, slab);                          \
    FASTLVM_DOT(0, X, W);                             \
    if constexpr (Blocks > 1) {                       \
      _tile_loadd(W, w + block, slab);                \
      FASTLVM_DOT(1, X, W);                           \
    }                                                 \
    if constexpr (Row_tiles > 1) {                    \
      _tile_loadd(X, x + tile_rows * stride, stride); \
      if constexpr (Blocks > 1) {                     \
        FASTLVM_DOT(3, X, W);                         \
        _tile_loadd(W, w, slab);                      \
      }                                               \
      FASTLVM_DOT(2, X, W);                           \
    }                                                 \
  } while (false)

// sums [Row_tiles, Blocks, 16, 16]
template <class Dot, int Row_tiles, int Blocks>
inline void add_up(const uint8_t* x, int64_t stride, const uint8_t* w, int64_t groups, typename Dot::Sum* sums) {
  const int64_t block = groups * slab;
  _tile_zero(0);
  if constexpr (Blocks > 1) _tile_zero(1);
  if constexpr (Row_tiles > 1) _tile_zero(2);
  if constexpr (Row_tiles > 1 && Blocks > 1) _tile_zero(3);
  int64_t g = 0;
  for (; g + tile_groups <= groups; g += tile_groups, x += tile_bytes, w += tile_groups * slab) FASTLVM_STEP(4, 5);
  if (g < groups) FASTLVM_STEP(6, 7);
  constexpr int64_t size = tile_rows * block_outputs;
  _tile_stored(0, sums, tile_bytes);
  if constexpr (Blocks > 1) _tile_stored(1, sums + size, tile_bytes);
  if constexpr (Row_tiles > 1) _tile_stored(2, sums + Blocks * size, tile_bytes);
  if constexpr (Row_tiles > 1 && Blocks > 1) _tile_stored(3, sums + 3 * size, tile_bytes);
}

#undef FASTLVM_STEP
#undef FASTLVM_DOT

struct Output {
  float* y;
  int64_t stride;
  bool add;
};

// Rows [row, row + rows · Row_tiles) of blocks [block, block + Blocks).
template <class Dot, int Row_tiles, int Blocks>
inline void multiply(const Matrix& m, const Activations& a, int64_t row, int64_t rows, int64_t block,
                     const Output& out) {
  using Sum = typename Dot::Sum;
  const int64_t groups = groups_of(m);
  alignas(64) Sum sums[Row_tiles * Blocks * tile_rows * block_outputs];
  add_up<Dot, Row_tiles, Blocks>(a.data + row * a.stride, a.stride, m.weight + block * groups * slab, groups, sums);
  for (int64_t b = 0; b < Blocks; ++b) {
    const int64_t output = (block + b) * block_outputs;
    for (int64_t r = 0; r < rows * Row_tiles; ++r) {
      const int64_t tile = r / tile_rows * Blocks + b;
      const float scale = a.scale ? a.scale[(row + r) * a.scale_stride] : 1.0f;
      Vec value = Dot::finish(sums + (tile * tile_rows + r % tile_rows) * block_outputs, m, output, scale) +
                  Vec::load(m.bias + output);
      float* const to = out.y + (row + r) * out.stride + output;
      if (out.add) value = value + Vec::load(to);
      value.store(to);
    }
  }
}

template <class Dot, int Blocks>
inline void multiply(const Matrix& m, const Activations& a, int64_t row, int64_t end, int64_t block,
                     const Output& out) {
  for (; row + 2 * tile_rows <= end; row += 2 * tile_rows) multiply<Dot, 2, Blocks>(m, a, row, tile_rows, block, out);
  if (row < end) multiply<Dot, 1, Blocks>(m, a, row, end - row, block, out);
}

template <class Dot>
void multiply(const Matrix& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride, bool add) {
  const int64_t groups = groups_of(m);
  if (groups < least_groups) return Dot::vectors()->multiply(m, a, begin, end, y, stride, add);
  const Output out = {y, stride, add};
  // Whole tiles of rows, then the rest, whose tiles are lower.
  const int64_t whole = a.rows / tile_rows * tile_rows;
  const int64_t from[] = {0, whole, a.rows};
  for (int pass = 0; pass < 2; ++pass) {
    if (from[pass] == from[pass + 1]) continue;
    const Tiles tiles(pass == 0 ? tile_rows : a.rows - whole, groups % tile_groups);
    int64_t block = begin;
    for (; block + 2 <= end; block += 2) multiply<Dot, 2>(m, a, from[pass], from[pass + 1], block, out);
    if (block < end) multiply<Dot, 1>(m, a, from[pass], from[pass + 1], block, out);
  }
}

template <class Dot>
const Product* product() {
  const Product* const vectors = Dot::vectors();
  if (!vectors) return nullptr;
  static const Product made = {"avx512_amx", vectors->element, vectors->prepare, multiply<Dot>, true};
  return &made;
}

}  // namespace
}  // namespace avx512_amx::product

const Product* avx512_amx_int8() { return avx512_amx::product::product<avx512_amx::product::Int8>(); }
const Product* avx512_amx_bf16() { return avx512_amx::product::product<avx512_amx::product::Bf16>(); }
}  // namespace fastlvm
#else
namespace fastlvm {
const Product* avx512_amx_int8() { return nullptr; }
const Product* avx512_amx_bf16() { return nullptr; }
}  // namespace fastlvm
#endif
