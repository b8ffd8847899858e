// The functions of common/vmath.h that have a bound, one line each in `functions`. Compiled once for every instruction
// set, as isa/*.cpp are: -DFASTLVM_ISA=avx2 -DFASTLVM_VECTOR_AVX2 -mavx2 -mfma -mf16c.
#include "vmath_functions.h"

#include "common/rows.h"
#include "common/vmath.h"

namespace fastlvm::FASTLVM_ISA {
namespace {

// exp and log1p in double, to some 1e-16: plain arithmetic, of which the compiler makes vectors.

inline double exact_exp(double x) {
  constexpr double magic = 0x1.8p52;
  constexpr double inverse_factorials[] = {
      1,         1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  const double inside = x < -708 ? -708 : x > 708 ? 708 : x;
  const double shifted = inside * 0x1.71547652b82fep0 + magic, k = shifted - magic;
  const double r = (inside - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33;
  double sum = inverse_factorials[13];
#pragma GCC unroll 13
  for (int i = 12; i >= 0; --i) sum = sum * r + inverse_factorials[i];
  int64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return x < -708 ? 0 : x > 708 ? HUGE_VAL : sum * power;
}

constexpr float most = 127;  // what exp2 promises to take
inline double exact_exp2(double t) { return exact_exp((t > most ? most : t) * 0x1.62e42fefa39efp-1); }

inline double exact_log1p(double e) {  // 0 <= e <= 1
  const double s = e / (2 + e), w = s * s;
  double sum = 1. / 35;
#pragma GCC unroll 17
  for (int i = 16; i >= 0; --i) sum = sum * w + 1. / (2 * i + 1);
  return 2 * s * sum;
}

inline double exact_sigmoid(double x) { return 1 / (1 + exact_exp(-x)); }

inline double exact_softplus(double x) {
  const double tail = exact_log1p(exact_exp(x < 0 ? x : -x));
  return x > 20 ? x : (x > 0 ? x : 0) + tail;
}

template <class F>
constexpr auto on_vectors(F) {
  return [](const float* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += Vec::width) F()(Vec::load(in + i)).store(out + i);
  };
}

template <class F>
constexpr auto on_doubles(F) {
  return [](const float* in, double* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = F()(in[i]);
  };
}

#define FUNCTION(name, vector, exact, ...) \
  {name, on_vectors([](Vec x) { return vector; }), on_doubles([](double x) { return exact; }), __VA_ARGS__}

constexpr test::Function functions[] = {
    FUNCTION("exp", exp(x), exact_exp(x), 2, 0, -104, 89, 1),
    FUNCTION("exp2", exp2(Vec::min(Vec::set1(most), x)), exact_exp2(x), 2, 0x1p-126, -150, most, 1),
    FUNCTION("softplus", softplus(x), exact_softplus(x), 4, 1e-43, -104, 21, 11),
    FUNCTION("sigmoid", sigmoid(x), exact_sigmoid(x), 4, 1e-43, -104, 104, 11),
    FUNCTION("silu", silu(x), x* exact_sigmoid(x), 4, 1e-43, -104, 104, 11),
};

void errors(const test::Function& function, const float* got, const double* exact, float* out, int64_t count) {
  constexpr double too_small = 0x1p-126, far = 1e30;
  for (int64_t i = 0; i < count; ++i) {
    double size = exact[i] < 0 ? -exact[i] : exact[i];
    const double x = got[i], difference = x - exact[i], distance = difference < 0 ? -difference : difference;
    int64_t bits;
    size = size < too_small ? too_small : size;
    memcpy(&bits, &size, sizeof bits);
    bits = (int64_t{2046} << 52) - (bits & 0x7ff0000000000000);
    double inverse;  // of the power of two at or below size
    memcpy(&inverse, &bits, sizeof inverse);
    double error = distance * inverse * 0x1p23;
    error = size < 0x1p-119 && distance < function.negligible ? 0 : error;
    error = size > 3.4028234e38 && (x > 3.4028234e38 || x < -3.4028234e38) && (x > 0) == (exact[i] > 0) ? 0 : error;
    const bool nan = exact[i] != exact[i], got_nan = x != x;
    out[i] = static_cast<float>(nan && got_nan ? 0 : nan || got_nan || !(error < far) ? far : error);
  }
}

double exact_error() {
  double worst = 0;
  for (int i = 0; i <= 400000; ++i) {
    const double x = -200 + i * 1e-3, e = i / 400000.0;
    worst = fmax(worst, fabs(exact_exp(x) / ::exp(x) - 1));
    if (e > 0) worst = fmax(worst, fabs(exact_log1p(e) / ::log1p(e) - 1));
  }
  return worst;
}

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

constexpr test::VectorMath math = {
    TEXT(FASTLVM_ISA), Vec::width, functions, sizeof functions / sizeof *functions, errors, exact_error};
[[maybe_unused]] const bool known = test::add(math);

}  // namespace
}  // namespace fastlvm::FASTLVM_ISA
