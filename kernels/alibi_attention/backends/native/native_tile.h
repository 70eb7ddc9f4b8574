// What native.cpp computes with: vectors, their exponential, small matrix products, 16-bit floats, memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

namespace {

// Registers: kRows x kVectors accumulators, kVectors of one operand and a broadcast of the other must fit.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 6, kVectors = 4;
#endif
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector value) { *reinterpret_cast<Vector*>(x) = value; }
inline Vector max(Vector a, Vector b) { return a > b ? a : b; }

// exp(x) for x <= 88, to 1 ulp or so: 2^n times a polynomial on [-ln(2)/2, ln(2)/2]; exactly 0 below -87; a NaN stays one.
inline Vector exp(Vector x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vector shifted = x * 1.44269504088896341f + kRound;
  const Vector n = shifted - kRound;
  Vector r = x - n * 0x1.62e4p-1f;  // ln(2) in two parts: n times the first is exact
  r -= n * 1.42860682e-6f;
  Vector p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Integers power = reinterpret_cast<const Integers&>(shifted) << 23;
  const Integers bits = reinterpret_cast<const Integers&>(p) + power;
  const Vector result = x < -87.0f ? Vector{} : reinterpret_cast<const Vector&>(bits);
  return x == x ? result : x;
}

// C[R][V vectors] = A B, or C * scale + A B; element (i, k) of A lies at a[i * a_row + k * a_step]. A B is summed by itself
// and then added: sums over a long sequence become sums of tiles, and their rounding errors stay short.
template <int R, int V>
inline void multiply_tile(int depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t ldb, float* c,
                          int64_t ldc, bool accumulate, const float* scale) {
  Vector sum[R][V] = {};
  for (int k = 0; k < depth; ++k, a += a_step, b += ldb) {
    Vector row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const float value = a[i * a_row];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += value * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const float factor = scale ? scale[i] : 1.0f;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + i * ldc + v * kLanes;
      store(to, accumulate ? sum[i][v] + factor * load(to) : sum[i][v]);
    }
  }
}

struct Matrix {
  const float* data;
  int64_t row, step;  // distance between rows, and between the elements of a row
};

template <int V>
void multiply_panel(int rows, int depth, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate,
                    const float* scale) {
  int i = 0;
  const auto tile = [&](auto count) {
    constexpr int R = decltype(count)::value;
    multiply_tile<R, V>(depth, a.data + i * a.row, a.row, a.step, b, ldb, c + i * ldc, ldc, accumulate,
                        scale ? scale + i : nullptr);
    i += R;
  };
  while (rows - i >= kRows) tile(std::integral_constant<int, kRows>());
  if (rows - i >= 4) tile(std::integral_constant<int, 4>());
  if (rows - i >= 2) tile(std::integral_constant<int, 2>());
  if (rows - i >= 1) tile(std::integral_constant<int, 1>());
}

// C[rows][columns] (+)= A[rows][depth] B[depth][columns]; columns is a multiple of kLanes.
void multiply(int rows, int columns, int depth, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate,
              const float* scale = nullptr) {
  int done = 0;
  const auto panel = [&](auto count) {
    constexpr int V = decltype(count)::value;
    multiply_panel<V>(rows, depth, a, b + done, ldb, c + done, ldc, accumulate, scale);
    done += V * kLanes;
  };
  while (columns - done >= kVectors * kLanes) panel(std::integral_constant<int, kVectors>());
  if constexpr (kVectors > 2)
    if (columns - done >= 2 * kLanes) panel(std::integral_constant<int, 2>());
  if (columns - done >= kLanes) panel(std::integral_constant<int, 1>());
}

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16() = default;
  BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);  // nearest, ties to even
  }
};

// Memory that is aligned to a cache line and not initialized.
struct Buffer {
  explicit Buffer(int64_t count) : data(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  float* data;
};

}  // namespace
