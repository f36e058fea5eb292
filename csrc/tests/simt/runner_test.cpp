// The runner itself: what CUDA documents works, what it forbids is reported, formats round as IEEE 754 says.
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

using namespace cuda;

// ---- kernels -----------------------------------------------------------------------------------------------------------------

__global__ void reverse_in_block(const int* in, int* out) {
  struct Tile {
    int value[256];
  };
  Tile& tile = shared_memory<Tile>();
  tile.value[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile.value[blockDim.x - 1 - threadIdx.x];
}

__global__ void lanes(int* out) {
  const int lane = threadIdx.x % kWarpSize;
  int* mine = out + 8 * threadIdx.x;
  mine[0] = __shfl_sync(kAllLanes, lane, 5);
  mine[1] = __shfl_sync(kAllLanes, lane, 3, 8);
  mine[2] = __shfl_up_sync(kAllLanes, lane, 2);
  mine[3] = __shfl_down_sync(kAllLanes, lane, 3, 16);
  mine[4] = __shfl_xor_sync(kAllLanes, lane, 17);
  mine[5] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  mine[6] = __all_sync(kAllLanes, lane < 32);
  mine[7] = __any_sync(kAllLanes, lane == 32);
}

__global__ void half_warp(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_down_sync(0xffffu, static_cast<int>(threadIdx.x), 1, 16);
  } else {
    __syncwarp(0xffff0000u);
    out[threadIdx.x] = -1;
  }
}

__global__ void count_up(int* counter, int* largest) {
  atomicAdd(counter, 1);
  atomicMax(largest, static_cast<int>(blockIdx.x * 100 + threadIdx.x));
}

__global__ void copy_asynchronously(const float* in, float* out, int valid_bytes, bool wait) {
  float* staged = dynamic_shared_memory<float>();
  for (int i = 0; i < 4; ++i) staged[4 * threadIdx.x + i] = -1.0f;
  cp_async_16(staged + 4 * threadIdx.x, in + 4 * threadIdx.x, valid_bytes);
  cp_async_commit();
  cp_async_commit();
  if (wait) {
    cp_async_wait<1>();
  }
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = staged[4 * threadIdx.x + i];
  cp_async_wait<0>();
}

// c[16x8] = a[16x16] b[16x8], or with b stored transposed, through ldmatrix.
template <typename T>
__global__ void multiply(const T* a, const T* b, float* c) {
  struct Tiles {
    alignas(16) T a[16][16], b[16][8];
  };
  Tiles& tiles = shared_memory<Tiles>();
  for (int i = threadIdx.x; i < 256; i += kWarpSize) tiles.a[i / 16][i % 16] = a[i];
  for (int i = threadIdx.x; i < 128; i += kWarpSize) tiles.b[i / 8][i % 8] = b[i];
  __syncwarp();
  const int lane = threadIdx.x, row = lane % 8, matrix = lane / 8;
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, &tiles.a[row + matrix % 2 * 8][matrix / 2 * 8]);
  ldmatrix_x4_transposed(fb, &tiles.b[row + matrix % 2 * 8][0]);  // matrices 2 and 3 repeat 0 and 1
  float d[4] = {};
  mma_m16n8k16<T>(d, fa, {fb[0], fb[1]});
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

__global__ void diverging_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void missing_lane(int* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}
__global__ void mixed_collectives() {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __ballot_sync(kAllLanes, 1);
  }
}
__global__ void misaligned(const float* in, float* out) {
  store_pack(out, load_pack(in + 1, 4, true), 4, true);
}
__global__ void unread_copy(const float* in) {
  cp_async_16(dynamic_shared_memory<float>(), in);
  cp_async_commit();
}
// ---- tests -------------------------------------------------------------------------------------------------------------------

template <typename Fn>
std::string error_of(const Fn& fn) {
  try {
    fn();
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "no error";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void test_threads() {
  Buffer<int> in(3 * 96), out(3 * 96);
  for (int i = 0; i < 288; ++i) in[i] = i;
  launch(reverse_in_block, {dim3(3), dim3(96)}, nullptr, in.data(), out.data());
  bool good = true;
  for (int i = 0; i < 288; ++i) good = good && out[i] == i / 96 * 96 + 95 - i % 96;
  expect(good, "a block reverses its elements through shared memory");

  Buffer<int> counter(1), largest(1);
  counter[0] = largest[0] = 0;
  launch(count_up, {dim3(5), dim3(70)}, nullptr, counter.data(), largest.data());
  expect(counter[0] == 350 && largest[0] == 469, "atomics");
}

void test_lanes() {
  Buffer<int> out(8 * 64);
  launch(lanes, {dim3(1), dim3(64)}, nullptr, out.data());
  unsigned thirds = 0;
  for (int lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32;
    const int* mine = out.data() + 8 * thread;
    expect(mine[0] == 5 && mine[1] == (lane & ~7) + 3, "__shfl_sync");
    expect(mine[2] == (lane < 2 ? lane : lane - 2), "__shfl_up_sync");
    expect(mine[3] == (lane % 16 + 3 < 16 ? lane + 3 : lane), "__shfl_down_sync");
    expect(mine[4] == (lane ^ 17), "__shfl_xor_sync");
    expect(static_cast<unsigned>(mine[5]) == thirds && mine[6] == 1 && mine[7] == 0, "votes");
  }
  Buffer<int> half(32);
  launch(half_warp, {dim3(1), dim3(32)}, nullptr, half.data());
  for (int lane = 0; lane < 32; ++lane) {
    expect(half[lane] == (lane >= 16 ? -1 : lane == 15 ? 15 : lane + 1), "two masks of one warp");
  }
}

void test_asynchronous_copies() {
  Buffer<float> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  const LaunchShape shape{dim3(1), dim3(32), 512};
  launch(copy_asynchronously, shape, nullptr, in.data(), out.data(), 8, true);
  for (int i = 0; i < 128; ++i) expect(out[i] == (i % 4 < 2 ? static_cast<float>(i) : 0.0f), "cp.async");
  launch(copy_asynchronously, shape, nullptr, in.data(), out.data(), 16, false);
  for (int i = 0; i < 128; ++i) {
    expect(std::isnan(out[i]), "a copy that is not waited for has not arrived, and what was there is gone");
  }
}

template <typename T>
void test_matrices() {
  Buffer<T> a(256), b(128);
  Buffer<float> c(128);
  Random random(3);
  random.fill(a);
  random.fill(b);
  launch(multiply<T>, {dim3(1), dim3(32)}, nullptr, a.data(), b.data(), c.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(to_float(a[16 * i + k])) * to_float(b[8 * k + j]);
      expect(c[8 * i + j] == static_cast<float>(sum), "mma.sync");
    }
  }
}

void test_errors() {
  const LaunchShape two_warps{dim3(1), dim3(64)}, one_warp{dim3(1), dim3(32)};
  Buffer<int> out(64);
  Buffer<float> numbers(8);
  std::string text = error_of([&] { launch(diverging_barrier, two_warps, nullptr); });
  expect(contains(text, "32 threads wait in __syncthreads at runner_test.cpp") && contains(text, "32 threads have returned"),
         "a barrier that some threads never reach");
  text = error_of([&] { launch(two_barriers, two_warps, nullptr); });
  expect(contains(text, "barrier divergence"), "two barriers at once");
  text = error_of([&] { launch(missing_lane, one_warp, nullptr, out.data()); });
  expect(contains(text, "31 threads wait in a shuffle") && contains(text, "1 threads have returned"), "a lane missing");
  text = error_of([&] { launch(mixed_collectives, one_warp, nullptr); });
  expect(contains(text, "warp divergence"), "two collectives at once");
  text = error_of([&] { launch(misaligned, {dim3(1), dim3(1)}, nullptr, numbers.data(), numbers.data()); });
  expect(contains(text, "misaligned address"), "16 bytes at an odd address");
  text = error_of([&] { launch(unread_copy, {dim3(1), dim3(1), 16}, nullptr, numbers.data()); });
  expect(contains(text, "under way"), "a thread that leaves a copy behind");
  text = error_of([&] { launch(diverging_barrier, {dim3(1), dim3(1025)}, nullptr); });
  expect(contains(text, "invalid launch"), "a block too large");
  text = error_of([&] { launch(diverging_barrier, {dim3(1, 70000), dim3(32)}, nullptr); });
  expect(contains(text, "invalid launch"), "a grid too high");
}

#if defined(HYBRID_THREAD_SANITIZER)
void test_missing_barrier() {}  // ThreadSanitizer would report it, as it should
#else
__global__ void missing_barrier(int* out) {
  struct Tile {
    int value[64];
  };
  Tile& tile = shared_memory<Tile>();
  tile.value[threadIdx.x] = 1;
  out[threadIdx.x] = tile.value[63 - threadIdx.x];
}

// A thread that reads what another has not written yet sees ones.
void test_missing_barrier() {
  Buffer<int> out(64);
  launch(missing_barrier, {dim3(1), dim3(64)}, nullptr, out.data());
  expect(out[0] == -1 && out[63] == 1, "shared memory is poisoned");
}
#endif

// Nearest, ties to even, from the definition: no other number of the format is nearer.
template <typename T>
void test_rounding(double largest) {
  const auto check = [&](float x) {
    const uint16_t bits = round_to<T>(x).bits;
    const double got = to_float(T{bits});
    const double magnitude = std::abs(static_cast<double>(x));
    if (std::isinf(got)) return expect(magnitude > largest, "overflow");
    const double error = std::abs(got - x);
    for (const int step : {-1, 1}) {
      const auto other_bits = static_cast<uint16_t>(bits + step);
      const double other = to_float(T{other_bits});
      if (!std::isfinite(other) || (bits & 0x7fff) == 0) continue;
      const double distance = std::abs(other - x);
      expect(error < distance || (error == distance && bits % 2 == 0), "nearest even");
    }
  };
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const T value{static_cast<uint16_t>(bits)};
    const float x = to_float(value);
    if (std::isnan(x)) {
      expect(round_to<T>(x).bits == 0x7fff, "NaN");
      continue;
    }
    expect(round_to<T>(x).bits == bits, "a number of the format stays");
    const float next = to_float(T{static_cast<uint16_t>(bits + 1)});
    if (!std::isfinite(x) || !std::isfinite(next)) continue;
    const float middle = static_cast<float>(0.5 * (static_cast<double>(x) + next));
    for (const float y : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, x + next)}) check(y);
  }
  expect(std::isinf(to_float(round_to<T>(INFINITY))) && to_float(round_to<T>(-INFINITY)) < 0, "infinity");
  expect(round_to<T>(-0.0f).bits == 0x8000 && round_to<T>(1e-45f).bits == 0, "zeros");
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  using namespace hybrid::testing;
  test_threads();
  test_lanes();
  test_asynchronous_copies();
  test_matrices<hybrid::f16>();
  test_matrices<hybrid::bf16>();
  test_errors();
  test_missing_barrier();
  test_rounding<hybrid::f16>(65519.0);
  test_rounding<hybrid::bf16>(3.3895e38);
  return finish_simt("runner");
}
