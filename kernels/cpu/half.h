// bfloat16 and float16: what they become in a panel, and the way between them and registers of floats. Integer vectors
// do it on every processor.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "vec.h"

// Processors that multiply pairs of bfloat16 do so twice as fast as floats: what dense reaches there.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && SPARSEDM_VECTOR_BYTES == 64
#define SPARSEDM_BF16_PAIRS 1
#include <immintrin.h>
#else
#define SPARSEDM_BF16_PAIRS 0
#endif

namespace sparsedm {

using c10::BFloat16;
using c10::Half;

// The element of a panel of activations that are T in memory.
template <class T>
struct PanelOf {
  using type = float;
};
#if SPARSEDM_BF16_PAIRS
template <>
struct PanelOf<BFloat16> {
  using type = BFloat16;
};
#endif

// Rows of K that one multiplication takes: a lane of 32 bits holds so many elements of a panel.
template <class Panel>
constexpr int kStep = static_cast<int>(sizeof(float) / sizeof(Panel));

namespace detail {

typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kBytes / 2)));

inline Bits load_bits(const void* from) {
  HalfBits narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Bits);
}

inline void store_bits(void* to, Bits bits) {
  const HalfBits narrow = __builtin_convertvector(bits, HalfBits);
  std::memcpy(to, &narrow, sizeof(narrow));
}

inline Bits select(Bits mask, Bits yes, Bits no) { return (mask & yes) | (~mask & no); }

}  // namespace detail

// Exact.
inline Vec load(const BFloat16* from) { return (Vec)(detail::load_bits(from) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline void store(BFloat16* to, Vec v) {
  using detail::Bits;
  const Bits bits = (Bits)v;
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  detail::store_bits(to, detail::select((Bits)(v != v), bits | 0x400000, rounded) >> 16);
}

// Exact: exponents are moved by a product, which makes subnormals normal.
inline Vec load(const Half* from) {
  using detail::Bits;
  const Bits bits = detail::load_bits(from), magnitude = (bits & 0x7fff) << 13;
  const Bits finite = (Bits)((Vec)magnitude * 0x1p112f);
  const Bits exact = detail::select((Bits)(magnitude >= 0x7c00u << 13), magnitude | 0x7f800000, finite);
  return (Vec)(exact | (bits & 0x8000) << 16);
}

// Rounds to nearest even; NaN stays NaN. Below the smallest normal number, adding 0.5 rounds where float16 does.
inline void store(Half* to, Vec v) {
  using detail::Bits;
  using detail::select;
  const Bits bits = (Bits)v, magnitude = bits & 0x7fffffff;
  const Bits normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const Bits small = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000;
  const Bits large = select((Bits)(v != v), Bits{} + 0x7e00, Bits{} + 0x7c00);
  const Bits above = select((Bits)(magnitude >= 0x47800000), large, normal);
  const Bits rounded = select((Bits)(magnitude < 0x38800000), small, above);
  detail::store_bits(to, rounded | (bits & 0x80000000) >> 16);
}

// A register of a panel's elements, from where they lie in memory.
template <class Panel, class T>
inline void copy(Panel* to, const T* from) {
  if constexpr (std::is_same_v<Panel, T>) {
    std::memcpy(to, from, kBytes);
  } else {
    store(to, load(from));
  }
}

}  // namespace sparsedm
