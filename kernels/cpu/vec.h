// A register of floats, as wide as the compile flags allow, in compiler vector extensions: one source for AVX-512, AVX2,
// NEON and anything else. Intrinsics gain nothing over them here.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef SPARSEDM_VECTOR_BYTES
#define SPARSEDM_NATIVE_WIDTH 1
#if defined(__AVX512F__)
#define SPARSEDM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SPARSEDM_VECTOR_BYTES 32
#else
#define SPARSEDM_VECTOR_BYTES 16
#endif
#endif

// -O2 leaves short loops rolled, and accumulators indexed by a loop variable then live in memory: 40 GFLOP/s, not 115.
#define SPARSEDM_UNROLL _Pragma("GCC unroll 32")

namespace sparsedm {

constexpr int kBytes = SPARSEDM_VECTOR_BYTES;
constexpr int kWidth = kBytes / static_cast<int>(sizeof(float));

typedef float Vec __attribute__((vector_size(kBytes)));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }

// x - 0 is x for every x, so this is one broadcast; 0 + x would also turn -0 into 0, and costs an addition.
inline Vec broadcast(float x) { return x - Vec{}; }

// The same, but surely in a register: compilers that find a value used twice may load it twice, as an operand of each use.
inline Vec loaded(Vec v) {
#if defined(SPARSEDM_NATIVE_WIDTH) && defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(SPARSEDM_NATIVE_WIDTH) && defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}

namespace detail {

#if defined(__clang__) || __GNUC__ >= 12
template <int... lane>
inline Vec pick(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, lane...);
}
#else
typedef int32_t Lanes __attribute__((vector_size(kBytes)));
template <int... lane>
inline Vec pick(Vec a, Vec b) {
  return __builtin_shuffle(a, b, Lanes{lane...});
}
#endif

template <int... lane>
struct LaneList {};
template <int count, int... lane>
struct MakeLanes : MakeLanes<count - 1, count - 1, lane...> {};
template <int... lane>
struct MakeLanes<0, lane...> {
  using type = LaneList<lane...>;
};

// The steps of a transposition, each one shuffle instruction on x86. Lane j of the result comes from lane `source` of a,
// or of b when source >= kWidth.
enum Step { kPairLow, kPairHigh, kQuadLow, kQuadHigh };

constexpr int interleave_source(Step step, int j) {
  const int base = j & ~3, p = j & 3;
  switch (step) {
    case kPairLow: return base + p / 2 + (p & 1 ? kWidth : 0);
    case kPairHigh: return base + 2 + p / 2 + (p & 1 ? kWidth : 0);
    case kQuadLow: return base + (p & 1) + (p & 2 ? kWidth : 0);
    default: return base + 2 + (p & 1) + (p & 2 ? kWidth : 0);
  }
}

constexpr int swap_source(int distance, bool high, int j) {
  if (high) return j & distance ? j + kWidth : j + distance;
  return j & distance ? j - distance + kWidth : j;
}

template <Step step, int... lane>
inline Vec interleave(Vec a, Vec b, LaneList<lane...>) {
  return pick<interleave_source(step, lane)...>(a, b);
}

template <int distance, bool high, int... lane>
inline Vec swap(Vec a, Vec b, LaneList<lane...>) {
  return pick<swap_source(distance, high, lane)...>(a, b);
}

template <int distance>
inline void swap_rows(Vec (&rows)[kWidth]) {
  using Lanes = typename MakeLanes<kWidth>::type;
  if constexpr (distance < kWidth) {
    SPARSEDM_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i & distance) continue;
      const Vec a = rows[i], b = rows[i + distance];
      rows[i] = swap<distance, false>(a, b, Lanes{});
      rows[i + distance] = swap<distance, true>(a, b, Lanes{});
    }
    swap_rows<distance * 2>(rows);
  }
}

template <int... lane>
inline Vec pick_evens(Vec a, Vec b, LaneList<lane...>) {
  return pick<2 * lane...>(a, b);
}

}  // namespace detail

// Elements 0, 2, 4, ... of a followed by b.
inline Vec evens(Vec a, Vec b) { return detail::pick_evens(a, b, typename detail::MakeLanes<kWidth>::type{}); }

// Transposes a kWidth x kWidth tile held in registers: 4 x 4 tiles within 128-bit lanes first, then whole lanes.
inline void transpose(Vec (&rows)[kWidth]) {
  using Lanes = typename detail::MakeLanes<kWidth>::type;
  SPARSEDM_UNROLL
  for (int i = 0; i < kWidth; i += 4) {
    const Vec low0 = detail::interleave<detail::kPairLow>(rows[i], rows[i + 1], Lanes{});
    const Vec high0 = detail::interleave<detail::kPairHigh>(rows[i], rows[i + 1], Lanes{});
    const Vec low1 = detail::interleave<detail::kPairLow>(rows[i + 2], rows[i + 3], Lanes{});
    const Vec high1 = detail::interleave<detail::kPairHigh>(rows[i + 2], rows[i + 3], Lanes{});
    rows[i] = detail::interleave<detail::kQuadLow>(low0, low1, Lanes{});
    rows[i + 1] = detail::interleave<detail::kQuadHigh>(low0, low1, Lanes{});
    rows[i + 2] = detail::interleave<detail::kQuadLow>(high0, high1, Lanes{});
    rows[i + 3] = detail::interleave<detail::kQuadHigh>(high0, high1, Lanes{});
  }
  detail::swap_rows<4>(rows);
}

}  // namespace sparsedm
