#include "common/dispatch.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "predictor/products.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fastlvm {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

std::array<uint32_t, 4> cpuid(uint32_t leaf, uint32_t subleaf) {
#if defined(_MSC_VER)
  int registers[4];
  __cpuidex(registers, static_cast<int>(leaf), static_cast<int>(subleaf));
  return {static_cast<uint32_t>(registers[0]), static_cast<uint32_t>(registers[1]), static_cast<uint32_t>(registers[2]),
          static_cast<uint32_t>(registers[3])};
#else
  uint32_t a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d);
  return {a, b, c, d};
#endif
}

// The register state that the system saves (XCR0).
uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

enum class Level { baseline, avx2, avx512 };

Level processor_level() {
  const auto has = [](uint32_t bits, int bit) { return (bits >> bit & 1) != 0; };
  const uint32_t basic = cpuid(1, 0)[2];
  if (cpuid(0, 0)[0] < 7 || !has(basic, 27)) return Level::baseline;  // 27: OSXSAVE
  const uint64_t saved = saved_state();
  const uint32_t extended = cpuid(7, 0)[1];
  const bool fma = has(basic, 12), avx = has(basic, 28), f16c = has(basic, 29), avx2 = has(extended, 5);
  if (!(fma && avx && f16c && avx2) || (saved & 0x6) != 0x6) return Level::baseline;  // xmm and ymm
  const bool f = has(extended, 16), dq = has(extended, 17), bw = has(extended, 30), vl = has(extended, 31);
  return f && dq && bw && vl && (saved & 0xe6) == 0xe6 ? Level::avx512 : Level::avx2;  // masks and zmm as well
}

bool runs_avx2() { return processor_level() >= Level::avx2; }
bool runs_avx512() { return processor_level() >= Level::avx512; }

bool has_vnni() {
  static const bool found = runs_avx512() && (cpuid(7, 0)[2] >> 11 & 1) != 0;
  return found;
}

bool has_bf16() {
  static const bool found = runs_avx512() && cpuid(7, 0)[0] >= 1 && (cpuid(7, 1)[0] >> 5 & 1) != 0;
  return found;
}

// AMX of int8 and bfloat16. Linux gives a process the registers when it asks for them, which it does here.
bool has_amx() {
#if defined(__linux__)
  constexpr uint32_t wanted = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  constexpr uint64_t saved = 1u << 17 | 1u << 18;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool found = has_vnni() && has_bf16() && (cpuid(7, 0)[3] & wanted) == wanted &&
                            (saved_state() & saved) == saved &&
                            syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return found;
#else
  return false;
#endif
}
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
bool has_vnni() { return false; }
bool has_bf16() { return false; }
bool has_amx() { return false; }
#endif

#if defined(__aarch64__) && defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }  // HWCAP_ASIMDDP
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
bool has_neon_bf16() { return (getauxval(AT_HWCAP2) >> 14 & 1) != 0; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool system_names(const char* feature) {
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found != 0;
}

bool has_dotprod() { return true; }  // since the first M1
bool has_i8mm() { return system_names("hw.optional.arm.FEAT_I8MM"); }
bool has_neon_bf16() { return system_names("hw.optional.arm.FEAT_BF16"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
bool has_neon_bf16() { return false; }
#endif

bool runs_always() { return true; }

struct Isa {
  const Kernels* kernels;
  bool (*runs)();
};

// Worst first. Advanced SIMD is part of every AArch64 processor.
std::array<Isa, 4> all_isas() {
  return {{{scalar_kernels(), runs_always},
           {neon_kernels(), runs_always},
           {avx2_kernels(), runs_avx2},
           {avx512_kernels(), runs_avx512}}};
}

// Products that take the place of those of an instruction set, or of those of a lower level.
struct Extension {
  const Kernels* base;
  Precision precision;
  int level;
  const Product* (*product)();  // null where it was not compiled; called only where it runs
  bool (*runs)();
};

// Lower levels first.
std::array<Extension, 7> all_extensions() {
  return {{{avx512_kernels(), Precision::int8, 1, avx512_vnni_int8, has_vnni},
           {avx512_kernels(), Precision::bf16, 1, avx512_bf16_product, has_bf16},
           {neon_kernels(), Precision::int8, 1, neon_dotprod_int8, has_dotprod},
           {neon_kernels(), Precision::bf16, 1, neon_bf16_product, has_neon_bf16},
           {neon_kernels(), Precision::int8, 2, neon_i8mm_int8, has_i8mm},
           {avx512_kernels(), Precision::int8, 2, avx512_amx_int8, has_amx},
           {avx512_kernels(), Precision::bf16, 2, avx512_amx_bf16, has_amx}}};
}

// What an instruction set has up to a level. Nothing is asked of the system before somebody wants it.
Products extended(const Kernels& base, int level) {
  Products found = base.products;
  for (const Extension& extension : all_extensions()) {
    if (extension.base != &base || extension.level > level || !extension.runs()) continue;
    if (const Product* product = extension.product()) found.of[static_cast<int>(extension.precision)] = product;
  }
  return found;
}

std::atomic<int> level_wanted{extension_levels};

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  for (const Isa& isa : all_isas())
    if (isa.kernels && isa.runs()) found.push_back(isa.kernels);
  return found;
}

const Kernels& find(const std::string& name, const std::string& setting) {
  std::string names;
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument(setting + ": got '" + name + "', this machine can run " + names);
}

std::atomic<const Kernels*> active{nullptr};  // null: FASTLVM_ISA was bad
std::string environment_error;                // written once, at import

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all_isas())
    if (isa.kernels) names.emplace_back(isa.kernels->name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

void read_isa_environment() {
  const char* name = std::getenv("FASTLVM_ISA");
  try {
    active.store(name && *name ? &find(name, "FASTLVM_ISA") : available().back());
  } catch (const std::invalid_argument& error) {
    environment_error = error.what();
  }
}

void set_isa(const std::string& name) { active.store(&find(name, "isa")); }

const Kernels& active_kernels() {
  const Kernels* kernels = active.load();
  if (!kernels) throw std::invalid_argument(environment_error);
  return *kernels;
}

Products active_products() { return extended(active_kernels(), level_wanted.load()); }

void set_extension_level(int level) {
  if (level < 0 || level > extension_levels)
    throw std::invalid_argument("level: got " + std::to_string(level) + ", wants 0 to " +
                                std::to_string(extension_levels));
  level_wanted.store(level);
}

}  // namespace fastlvm
