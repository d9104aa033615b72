// Encodes: parts are added up in twice the precision of the message, which so is rounded once.
#include "core/cyclic.h"
#include "core/half.h"
#include "cpu/kernels/pairs.h"
#include "cpu/kernels/set.h"

namespace draco {
namespace {

template <typename T>
DRACO_HD Vector<T> absolute(Vector<T> v) {
  using Bits = typename Element<T>::Bits;
  return (Vector<T>)((Vector<Bits>)v & (static_cast<Bits>(~Bits{0}) >> 1));
}
// a > b ? a : b, which compilers make more of than there is.
template <typename T>
DRACO_HD Vector<T> larger(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  } else {
    return (Vector<T>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm256_max_ps((__m256)a, (__m256)b);
  } else {
    return (Vector<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
  }
#else
  return a > b ? a : b;
#endif
}
// True where any number of a mask is set.
DRACO_HD bool any_set(Vector<int64_t> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  return any<int64_t>(mask);
#endif
}
DRACO_HD Vector<double> finite_or(Vector<double> v, Vector<double> otherwise) { return v - v == 0 ? v : otherwise; }

// a * b - rounded, where rounded is what a * b was rounded to.
DRACO_HD Vector<double> product_rest(Vector<double> a, Vector<double> b, Vector<double> rounded) {
#if defined(__AVX2__) || defined(__aarch64__)
  return multiply_add<double>(a, b, -rounded);
#else  // in halves of 26 and 27 bits
  const auto upper = [](Vector<double> v) {
    return (Vector<double>)((Vector<uint64_t>)v & ~((uint64_t{1} << 27) - 1));
  };
  const Vector<double> a1 = upper(a), a2 = a - a1, b1 = upper(b), b2 = b - b1;
  return ((a1 * b1 - rounded) + a1 * b2 + a2 * b1) + a2 * b2;
#endif
}

// Sums of weighted pairs of columns, before they are rounded.
template <typename T>
struct Encoded;

// In double: exact products of a weight, less its own rounding, and exact sums of numbers of similar size.
template <>
struct Encoded<float> {
  Vector<double> re = {}, im = {};

  DRACO_MEMBER void start(Vector<double> message, Vector<double> carry) { re = message + carry; }
  template <bool kReal>
  DRACO_MEMBER void add(const EncodingWeight& weight, Vector<double> v) {
    re = multiply_add<double>(Vector<double>{} + weight.re.hi, v, re);
    if constexpr (!kReal) im = multiply_add<double>(Vector<double>{} + weight.im.hi, v, im);
  }
  // What rounds to the message, and what is left of it.
  template <bool kReal>
  DRACO_MEMBER Vector<double> total(Vector<double>& rest) const {
    rest = Vector<double>{};
    if constexpr (kReal) return re;
    const Vector<double> swapped = swap_pairs<double>(im);
    Vector<double> sign;
    for (int i = 0; i < VectorOf<double>::kSize; ++i) sign[i] = i % 2 ? 1 : -1;
    return multiply_add<double>(sign, swapped, re);
  }
};

template <>
struct Encoded<double> {
  Vector<double> hi = {}, lo = {};

  DRACO_MEMBER void start(Vector<double> message, Vector<double> carry) {
    hi = message;
    lo = carry;
  }
  DRACO_MEMBER void add_product(Vector<double> weight, Vector<double> weight_rest, Vector<double> v) {
    Vector<double> product = weight * v;
    in_register<double>(product);  // rounded by itself
    const Vector<double> rest = multiply_add<double>(weight_rest, v, product_rest(weight, v, product));
    const Vector<double> sum = hi + product, other = sum - hi;
    lo += ((hi - (sum - other)) + (product - other)) + rest;
    hi = sum;
  }
  template <bool kReal>
  DRACO_MEMBER void add(const EncodingWeight& weight, Vector<double> v) {
    add_product(Vector<double>{} + weight.re.hi, Vector<double>{} + weight.re.lo, v);
    if constexpr (!kReal) {
      const PairWeight<double> high(0, weight.im.hi), low(0, weight.im.lo);
      add_product(high.im, low.im, swap_pairs<double>(v));
    }
  }
  template <bool kReal>
  DRACO_MEMBER Vector<double> total(Vector<double>& rest) const {
    const Vector<double> sum = hi + lo, other = sum - hi;
    const Vector<double> left = (hi - (sum - other)) + (lo - other);
    const Vector<double> whole = finite_or(sum, hi);  // something has overflowed: lo may mean nothing
    rest = whole == sum ? finite_or(left, Vector<double>{}) : Vector<double>{};
    return whole;
  }
};

// Doubles as T, rounded.
DRACO_HD void store_rounded(float* to, Vector<double> value) {
  typedef float Narrow __attribute__((vector_size(kBytes / 2)));
  const Narrow narrow = __builtin_convertvector(value, Narrow);
  memcpy(to, &narrow, sizeof(narrow));
}
DRACO_HD void store_rounded(double* to, Vector<double> value) { store(to, value); }

// The vectors of doubles that a vector of T becomes.
template <typename T>
constexpr int kWider = sizeof(double) / sizeof(T);

// Sums that are all below this part of their own terms are looked at together.
template <typename T>
constexpr double kSuspicious = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

template <typename T, int kVectors>
__attribute__((noinline)) void cancel_block(Vector<double>* total, const T* terms, double least) {
  double largest = 0, term = 0;
  for (int i = 0; i < kCancelBlock; ++i) {
    const double value = total[i / VectorOf<double>::kSize][i % VectorOf<double>::kSize];
    const double size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
    term = terms[i] > term ? static_cast<double>(terms[i]) : term;
  }
  if (!(largest < least * term)) return;
  for (int v = 0; v < kVectors; ++v) total[v] = Vector<double>{};
}

// One step of the columns from c on. kWhole: all of them exist.
template <typename T, bool kReal, bool kWhole>
DRACO_HD void encode_step(const EncodeChunk<T>& chunk, double least, int64_t c) {
  constexpr int kSize = VectorOf<double>::kSize, kStep = kCancelBlock;
  constexpr int kVectors = kStep / kSize, kNarrow = kVectors / kWider<T>;
  const int64_t left = chunk.columns - c, even = left + left % 2;
  alignas(64) T padded[2][kStep];
  // Where whole vectors may be read: what is not there is 0.
  const auto whole = [&](const T* from, int64_t count, int which) __attribute__((always_inline)) {
    if constexpr (kWhole) return from + c;
    memset(padded[which], 0, sizeof(padded[which]));
    memcpy(padded[which], from + c, count * sizeof(T));
    return static_cast<const T*>(padded[which]);
  };
  Encoded<T> encoded[kVectors];
  Vector<T> before[kNarrow] = {}, largest[kNarrow] = {};
  if (chunk.add) {
    const T *message = whole(chunk.message, even, 0), *carry = whole(chunk.carry, even, 1);
    DRACO_UNROLL for (int v = 0; v < kVectors; ++v) encoded[v].start(widen_real(message + v * kSize),
                                                                     widen_real(carry + v * kSize));
    DRACO_UNROLL for (int v = 0; v < kNarrow; ++v) before[v] = absolute<T>(load(message + v * VectorOf<T>::kSize));
  }
  for (int j = 0; j < chunk.count; ++j) {
    const EncodingWeight weight = chunk.weights[j];
    if constexpr (kWhole)
      DRACO_UNROLL for (int i = 0; i < kStep; i += kLine / static_cast<int>(sizeof(T)))
          fetch_ahead(chunk.rows[j] + c + i);
    const T* from = whole(chunk.rows[j], left, 0);
    DRACO_UNROLL for (int v = 0; v < kVectors; ++v) encoded[v].template add<kReal>(weight,
                                                                                   widen_real(from + v * kSize));
    DRACO_UNROLL for (int v = 0; v < kNarrow; ++v) largest[v] =
        larger<T>(largest[v], absolute<T>(load(from + v * VectorOf<T>::kSize)));
  }
  T* message = kWhole ? chunk.message + c : padded[0];
  T* carry = kWhole ? chunk.carry + c : padded[1];
  alignas(64) T terms[kStep];
  DRACO_UNROLL for (int v = 0; v < kNarrow; ++v) {
    Vector<T> term = larger<T>(before[v], largest[v]);
    // Both of a pair enter both of a sum, if not of this part then of one before it.
    if constexpr (!kReal) term = larger<T>(term, swap_pairs<T>(term));
    store(terms + v * VectorOf<T>::kSize, term);
  }
  Vector<double> total[kVectors], rest[kVectors];
  Vector<int64_t> zero{}, large{};
  zero = ~zero;
  DRACO_UNROLL for (int v = 0; v < kVectors; ++v) {
    const Vector<double> term = widen_real(terms + v * kSize);
    total[v] = encoded[v].template total<kReal>(rest[v]);
    total[v] = absolute<double>(total[v]) < least * term ? Vector<double>{} : total[v];
    zero &= total[v] == 0;
    large |= absolute<double>(total[v]) > kSuspicious<T> * term;
  }
  if (!any_set(large) && any_set(~zero)) cancel_block<T, kVectors>(total, terms, least);
  DRACO_UNROLL for (int v = 0; v < kVectors; ++v) {
    store_rounded(message + v * kSize, total[v]);
    if (chunk.carry == nullptr) continue;
    if constexpr (sizeof(T) == 4) rest[v] = finite_or(total[v] - widen_real(message + v * kSize), Vector<double>{});
    store_rounded(carry + v * kSize, total[v] == 0 ? Vector<double>{} : rest[v]);
  }
  if constexpr (kWhole) return;
  memcpy(chunk.message + c, message, even * sizeof(T));
  if (chunk.carry != nullptr) memcpy(chunk.carry + c, carry, even * sizeof(T));
}

template <typename T, bool kReal>
void encode_columns(const EncodeChunk<T>& chunk, double least) {
  constexpr int kStep = kCancelBlock;
  int64_t c = 0;
  for (; c + kStep <= chunk.columns; c += kStep) encode_step<T, kReal, true>(chunk, least, c);
  for (; c < chunk.columns; c += kStep) encode_step<T, kReal, false>(chunk, least, c);
}

}  // namespace

namespace DRACO_ISA {

template <typename T>
void encode(const EncodeChunk<T>& chunk) {
  if (chunk.real) {
    encode_columns<T, true>(chunk, cancelling<T>(chunk.weights, chunk.count));
  } else {
    encode_columns<T, false>(chunk, cancelling<T>(chunk.weights, chunk.count));
  }
}

template void encode<float>(const EncodeChunk<float>&);
template void encode<double>(const EncodeChunk<double>&);

}  // namespace DRACO_ISA
}  // namespace draco
