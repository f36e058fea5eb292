// Rows of a matrix that the warps of a block share: 16-bit types in shared memory, fp32 where they lie.
//
// 16-byte chunk c of row r lies at chunk c ^ f(r) of its row, f(r) being the three low bits of r in another order. Then two kinds of
// access are free of bank conflicts: eight rows at one chunk, which ldmatrix reads, and four neighbouring chunks of rows 2i and 2i + 1,
// which a quarter of a warp reads in ScoreTile::multiply.
#pragma once
#include "attention/tile.cuh"

namespace hybrid::cuda {

// `offset(row)` says where a row begins, in elements from `base`.
template <typename T, typename Offset>
struct RowsSource {
  const T* base;
  Offset offset;
  int count;     // rows that may be read
  int64_t dim;   // elements of a row
  bool aligned;  // rows begin at multiples of 16 bytes, and are whole packs
};
template <typename T, typename Offset>
RowsSource(const T*, Offset, int, int64_t, bool) -> RowsSource<T, Offset>;

constexpr int kStagedRows = 64;  // a key tile, or what four warps own

// kCols: 64, 128 or 256.
template <typename T, int kCols>
class StagedRows {
 public:
  static constexpr size_t kBytes = size_t{kStagedRows} * kCols * sizeof(T);

  // Takes its kBytes from `memory`, which moves on.
  __device__ __forceinline__ explicit StagedRows(uint4*& memory) : data_(memory) { memory += kStagedRows * kChunks; }

  // Starts copying the source's columns from `col` on, by all threads of the block; zeros beyond its edges. They are there after
  // cp_async_wait and the barrier that follows it.
  template <typename Offset>
  __device__ __forceinline__ void start_copy(const RowsSource<T, Offset>& source, int64_t col) {
    const int threads = kWarpSize * static_cast<int>(blockDim.y);
#pragma unroll 1  // nothing to wait for: more at once would only cost registers
    for (int i = static_cast<int>(threadIdx.y) * kWarpSize + static_cast<int>(threadIdx.x); i < kStagedRows * kChunks; i += threads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int64_t from = col + chunk * kPack<T>;
      const int64_t left = row < source.count ? larger(source.dim - from, 0) : 0;
      uint4* to = data_ + place(row, chunk);
      if (source.aligned) {
        const T* p = left > 0 ? source.base + source.offset(row) + from : source.base;
        cp_async_16(to, p, left > 0 ? 16 : 0);
      } else {
        *to = load_words(left > 0 ? source.base + source.offset(row) + from : source.base, left, false);
      }
    }
  }

  __device__ __forceinline__ uint4& chunk(int row, int index) const { return data_[place(row, index)]; }

 private:
  static constexpr int kChunks = kCols / kPack<T>;  // of a row: a multiple of 8

  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kChunks + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3)));
  }

  uint4* data_;
};

// Staged rows from `first` on, for ScoreTile::multiply and add_values.
template <typename T, int kCols>
struct StagedView {
  static constexpr int kInFlight = 4;
  const StagedRows<T, kCols>& staged;
  int first;

  __device__ __forceinline__ uint4 load(int row, int64_t col) const {
    return staged.chunk(first + row, static_cast<int>(col / kPack<T>));
  }
};

// fp32: the rows where they lie; the warps of a block share them in L1.
template <typename Offset>
struct RowsInPlace {
  RowsSource<float, Offset> source;
  int first = 0;

  __device__ __forceinline__ uint4 load(int row, int64_t col) const {
    const int64_t left = first + row < source.count ? source.dim - col : 0;
    return load_words(left > 0 ? source.base + source.offset(first + row) + col : source.base, left, source.aligned);
  }
  __device__ __forceinline__ float value(int row, int64_t col) const {
    return first + row < source.count && col < source.dim ? source.base[source.offset(first + row) + col] : 0.0f;
  }
};
template <typename Offset>
RowsInPlace(RowsSource<float, Offset>, int) -> RowsInPlace<Offset>;

// slice += weights [16, 64] times 32 columns of the 64 staged values, from column `col` of what is staged on. Lane 4g + t gets rows g
// and g + 8 of columns 2t and 2t + 1 of every eight (slice_row, slice_col).
template <typename T, int kCols>
__device__ __forceinline__ void add_values(const ScoreTile<T>& weights, const StagedView<T, kCols>& values, int col, Slice& slice) {
  const int lane = threadIdx.x, matrix = lane / 8;
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    const int key = values.first + 16 * step + matrix % 2 * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < kSliceCols / 8; j += 2) {
      uint32_t b[4];  // keys 0 .. 8 and 8 .. 16 of eight columns, then of the next eight
      ldmatrix_x4_transposed(b, &values.staged.chunk(key, col / kPack<T> + j + matrix / 2));
      mma_m16n8k16<T>(slice[j], weights.operand[step], {b[0], b[1]});
      mma_m16n8k16<T>(slice[j + 1], weights.operand[step], {b[2], b[3]});
    }
  }
}

// Row and column of a slice's element i.
template <typename T>
__device__ __forceinline__ int slice_row(int i) {
  if constexpr (sizeof(T) == 4) return i;
  return static_cast<int>(threadIdx.x) / 4 + i / 2 % 2 * 8;
}
template <typename T>
__device__ __forceinline__ int slice_col(int i) {
  if constexpr (sizeof(T) == 4) return threadIdx.x;
  return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

// Of what each lane knows of its own rows of a score tile, the value for the row of its slice element i. All lanes call it.
template <typename T>
__device__ __forceinline__ float of_slice_row(const float (&own)[ScoreTile<T>::kRows], int i) {
  if constexpr (sizeof(T) == 4) return __shfl_sync(kAllLanes, own[0], ScoreTile<float>::kLanes * slice_row<float>(i));
  return own[i / 2 % 2];
}

}  // namespace hybrid::cuda
