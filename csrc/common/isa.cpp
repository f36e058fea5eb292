#include "common/isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace hybrid {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx"};

#if defined(__x86_64__) && defined(__linux__)
// Whether the processor multiplies tiles of bfloat16 and Linux lets this process: it keeps 8 KiB of registers more for every
// thread that uses them, and wants to be asked first.
bool may_use_amx() {
  unsigned eax, ebx, ecx, edx;  // asked directly: not every compiler that builds this knows the feature by name
  constexpr unsigned kAmxBFloat16 = 1u << 22, kAmxTile = 1u << 24, kBoth = kAmxBFloat16 | kAmxTile;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kBoth) != kBoth) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool may_use_amx() { return false; }
#endif

// The features listed for each level are those that its files are compiled with (python/hybrid_kernels/_build.py).
Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? (may_use_amx() ? Isa::kAmx : Isa::kAvx512) : avx2 ? Isa::kAvx2 : Isa::kGeneric;
#else
  return Isa::kGeneric;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("HYBRID_KERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level < 4; ++level) {
    if (std::string(wanted) != kNames[level]) continue;
    if (level > static_cast<int>(best)) {
      throw std::invalid_argument(std::string("HYBRID_KERNELS_ISA=") + wanted + ": this processor offers at most " +
                                  isa_name(best));
    }
    return static_cast<Isa>(level);
  }
  throw std::invalid_argument(std::string("HYBRID_KERNELS_ISA=") + wanted + ": expected generic, avx2, avx512 or amx");
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace hybrid
