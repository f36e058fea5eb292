// What the host twins of common/ptx.cuh have in common. Not for nvcc.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "common/formats.h"
#include "tests/simt/language.h"

namespace hybrid::cuda::ptx_host {

// x in a format of 16 bits with these fields: to nearest, ties to even, denormals kept; NaN becomes 0x7fff.
template <int kExponentBits, int kFractionBits>
inline uint16_t round_to_16(float x) {
  constexpr int kDropped = 23 - kFractionBits;
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr uint32_t kInfinity = ((1u << kExponentBits) - 1) << kFractionBits;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  // A float's number is fraction * 2^(power - 150); below the target's smallest normal exponent more bits are dropped.
  const int power = magnitude >> 23 != 0 ? static_cast<int>(magnitude >> 23) : 1;
  const uint64_t fraction = (magnitude & 0x7fffffu) | (magnitude >> 23 != 0 ? 0x800000u : 0u);
  const int exponent = power - 127 + kBias;  // in the target format, if it is at least 1
  const int dropped = kDropped + (exponent < 1 ? 1 - exponent : 0);
  if (dropped > 25) return static_cast<uint16_t>(sign);  // less than half of the smallest number
  uint64_t kept = fraction >> dropped;
  const uint64_t rest = fraction & ((uint64_t{1} << dropped) - 1), half = uint64_t{1} << (dropped - 1);
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  // The leading one of a normal number adds one to the exponent field, and so does a carry.
  if (exponent >= 1) kept += static_cast<uint64_t>(exponent - 1) << kFractionBits;
  return static_cast<uint16_t>(sign | (kept > kInfinity ? kInfinity : kept));
}

inline float widen_f16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline float widen(f16 x) { return widen_f16(x.bits); }
inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8.
template <int kMatrices, bool kTransposed>
inline void load_matrices(uint32_t (&out)[kMatrices], const void* row) {
  const simt::Site site = simt::Site::current();
  simt::require_alignment(row, 16, site);
  const simt::Packet* rows = simt::exchange(simt::Collective::kMatrix, ~0u, simt::packet(row), site);
  const int lane = simt::lane_index();
  for (int m = 0; m < kMatrices; ++m) {
    const auto element = [&](int i, int j) {
      uint16_t value;
      const auto* address = simt::unpack<const char*>(rows[8 * m + i]) + 2 * j;
      std::memcpy(&value, address, sizeof(value));
      return static_cast<uint32_t>(value);
    };
    const int major = lane / 4, minor = 2 * (lane % 4);
    out[m] = kTransposed ? element(minor, major) | element(minor + 1, major) << 16
                         : element(major, minor) | element(major, minor + 1) << 16;
  }
}

// mma.m16n8k16: the fragments as common/ptx.cuh lays them out.
template <typename T>
inline void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const simt::Packet* lanes =
      simt::exchange(simt::Collective::kMatrix, ~0u, simt::packet(mine), simt::Site::current());
  const auto half = [](uint32_t pair, int k) { return widen(T{static_cast<uint16_t>(pair >> 16 * (k % 2))}); };
  const auto a_at = [&](int row, int k) {
    const Fragments f = simt::unpack<Fragments>(lanes[row % 8 * 4 + k % 8 / 2]);
    return half(f.a[row / 8 + k / 8 * 2], k);
  };
  const auto b_at = [&](int k, int column) {
    const Fragments f = simt::unpack<Fragments>(lanes[column * 4 + k % 8 / 2]);
    return half(f.b[k / 8], k);
  };
  const int lane = simt::lane_index();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(a_at(row, k)) * b_at(k, column);
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace hybrid::cuda::ptx_host
