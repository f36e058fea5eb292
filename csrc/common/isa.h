// Which instruction set the hot kernels run on: chosen once, when the first of them is called.
//
// A file `foo.simd.cpp` is compiled once per instruction set, with HYBRID_ISA defined as the namespace to put it in.
// The plain file `foo.cpp` declares the copies and picks one:
//
//   HYBRID_DECLARE_SIMD(void rms_norm(const NormArgs& args))
//   void rms_norm(const NormArgs& args) { HYBRID_PICK_SIMD(rms_norm)(args); }
//
// See csrc/README.md for the rules that keep such a file safe.
#pragma once

namespace hybrid {

// kAmx: AVX-512, and linear's products on the matrix unit (`*.amx.cpp`, in the namespace amx).
enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The best level that this processor has, or the lower one named by HYBRID_KERNELS_ISA (generic, avx2, avx512, amx).
// Throws std::invalid_argument when that variable names an unknown level or one the processor lacks.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace hybrid

// Both are used inside namespace hybrid. Other processors than x86-64 have the generic copy only.
#if defined(__x86_64__)
#define HYBRID_DECLARE_SIMD(...)        \
  namespace generic { __VA_ARGS__; }    \
  namespace avx2 { __VA_ARGS__; }       \
  namespace avx512 { __VA_ARGS__; }
#define HYBRID_PICK_SIMD(name)                                          \
  (::hybrid::current_isa() >= ::hybrid::Isa::kAvx512 ? avx512::name     \
   : ::hybrid::current_isa() == ::hybrid::Isa::kAvx2 ? avx2::name       \
                                                     : generic::name)
#else
#define HYBRID_DECLARE_SIMD(...) \
  namespace generic { __VA_ARGS__; }
#define HYBRID_PICK_SIMD(name) (::hybrid::current_isa(), generic::name)
#endif
