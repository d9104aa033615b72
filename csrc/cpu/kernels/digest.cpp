// Digests one block of bytes (core/digest.h).
#include "core/digest.h"

#include "cpu/kernels/set.h"
#include "cpu/kernels/stats.h"
#include "cpu/kernels/vectors.h"

namespace draco {
namespace {

// The products of the lower halves of every 64 bits.
DRACO_HD Vector<uint64_t> multiply_lower(Vector<uint64_t> a, Vector<uint64_t> b) {
#if defined(__AVX512F__)
  return (Vector<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Vector<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (Vector<uint64_t>)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Those of the lower and upper halves.
DRACO_HD Vector<uint64_t> multiply_halves(Vector<uint64_t> x) { return multiply_lower(x, x >> 32); }

DRACO_HD uint64_t sum_of(Vector<uint64_t> x) {
  typedef uint64_t Half __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  // Not by casts, of which GCC 12 warns.
  const auto wide = _mm256_add_epi64(_mm512_maskz_extracti64x4_epi64(0xf, (__m512i)x, 0),
                                     _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)x, 1));
  const auto half = (Half)_mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#elif defined(__AVX2__)
  const auto half = (Half)_mm_add_epi64(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  const Half half = x;
#endif
  return half[0] + half[1];
}

// Writes the hashes of the cells of a row. The groups from number `whole` on are a single one, `rest`. The words of the
// first row are written to `xors`, and those of other rows added there; kXors: they are those themselves. Takes the
// statistics of the whole groups, one by one, so that the memory works all the time.
enum class Row { kFirst, kOther, kXors };
template <Row kRow, typename Statistics>
DRACO_HD void digest_row(const uint32_t* key, const unsigned char* from, int whole, const unsigned char* rest,
                         int groups, unsigned char* xors, uint64_t* hashes, Statistics& statistics) {
  // A group's lines of the key are those of the group before, but for one: they stay in registers where there are
  // enough of them, since loads are what takes the time.
  constexpr bool kKept = kBytes == 64 && std::is_same_v<Statistics, NoStatistics>;
  Vector<uint32_t> kept[kDigestRowCells] = {};
  DRACO_UNROLL for (int j = 0; kKept && j < kDigestColumns; ++j) kept[j + 1] = load(key + j * kDigestLineWords);
  Vector<uint64_t> sums[kDigestRowCells] = {};
  for (int g = 0; g < groups; ++g, from += kDigestGroup, key += kDigestLineWords, xors += kDigestGroup) {
    const unsigned char* const group = g < whole ? from : rest;
    if (kRow != Row::kXors) {
      DRACO_UNROLL for (int j = 0; j < kDigestColumns; ++j) fetch_far_ahead(from + j * kDigestLine);
    }
    if (kKept) {
      DRACO_UNROLL for (int j = 0; j < kDigestColumns; ++j) kept[j] = kept[j + 1];
      kept[kDigestColumns] = load(key + kDigestColumns * kDigestLineWords);
    }
    DRACO_UNROLL for (int v = 0; v < kDigestLine; v += kBytes) {
      const auto hash = [&](int j, Vector<uint32_t> words) __attribute__((always_inline)) {
        const Vector<uint32_t> keyed = words + (kKept ? kept[j] : load(key + j * kDigestLineWords + v / 4));
        sums[j] += multiply_halves((Vector<uint64_t>)keyed);
        // Where there are few registers, compilers that begin with the next columns run out of them.
        if (kBytes < 64) in_order<uint64_t>(sums[j]);
      };
      Vector<uint32_t> ninth = {};
      DRACO_UNROLL for (int j = 0; j < kDigestColumns; ++j) {
        const int at = j * kDigestLine + v;
        Vector<uint32_t> words;
        memcpy(&words, group + at, sizeof(words));
        in_register<uint32_t>(words);
        ninth ^= words;
        auto* const sum = reinterpret_cast<uint32_t*>(xors + at);
        if (kRow == Row::kFirst) store(sum, words);
        if (kRow == Row::kOther) store(sum, load(sum) ^ words);
        hash(j, words);
      }
      hash(kDigestColumns, ninth);
    }
    if (g < whole) {
      DRACO_UNROLL for (int j = 0; j < kDigestColumns; ++j) statistics.take_line(from + j * kDigestLine);
    }
  }
  DRACO_UNROLL for (int j = 0; j < kDigestRowCells; ++j) hashes[j] = sum_of(sums[j]);
}

// Adds what the hashes of a block's cells add to its four sums.
DRACO_HD void digest_cells(const uint32_t* key, const uint64_t* hashes, int cells, uint64_t* sums) {
  constexpr int kCount = VectorOf<uint64_t>::kSize;
  Vector<uint64_t> all[kDigestSums] = {};
  int c = 0;
  for (; c + kCount <= cells; c += kCount) {
    const auto words = (Vector<uint32_t>)load(hashes + c);
    DRACO_UNROLL for (int i = 0; i < kDigestSums; ++i) all[i] +=
        multiply_halves((Vector<uint64_t>)(words + load(key + kDigestCellKey + kDigestShift * i + 2 * c)));
  }
  DRACO_UNROLL for (int i = 0; i < kDigestSums; ++i) {
    sums[i] += sum_of(all[i]);
    for (int rest = c; rest < cells; ++rest) sums[i] += digest_cell(key, rest, i, hashes[rest]);
  }
}

// Adds the four sums of a block, and takes the statistics of its values.
template <typename Statistics>
DRACO_HD void digest_block(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums,
                           Statistics& statistics) {
  alignas(64) unsigned char xors[kDigestRow];
  alignas(64) unsigned char rest[kDigestGroup];
  alignas(64) uint64_t hashes[kDigestCells];
  const int rows = digest_rows(bytes);
  if (bytes % kDigestGroup != 0) {
    memset(rest, 0, sizeof(rest));
    memcpy(rest, from + bytes / kDigestGroup * kDigestGroup, bytes % kDigestGroup);
  }
  const uint32_t* row_key = key;
  for (int i = 0; i < rows; ++i, row_key += kDigestRowCells * kDigestLineWords) {
    const int64_t begin = i * int64_t{kDigestRow}, left = bytes - begin;
    const int whole = static_cast<int>(left < kDigestRow ? left / kDigestGroup : kDigestGroups);
    uint64_t* const to = hashes + i * kDigestRowCells;
    if (i == 0) {
      digest_row<Row::kFirst>(row_key, from, whole, rest, digest_groups(bytes, i), xors, to, statistics);
    } else {
      digest_row<Row::kOther>(row_key, from + begin, whole, rest, digest_groups(bytes, i), xors, to, statistics);
    }
  }
  const int64_t whole = bytes / kDigestGroup * kDigestGroup;
  statistics.take(from + whole, bytes - whole);
  const int groups = digest_groups(bytes, 0);
  NoStatistics none;
  digest_row<Row::kXors>(row_key, xors, groups, nullptr, groups, nullptr, hashes + rows * kDigestRowCells, none);
  digest_cells(key, hashes, (rows + 1) * kDigestRowCells, sums);
}

}  // namespace

namespace DRACO_ISA {

// philox of several counters, a word of each in the lower half of 64 bits; what is above is not used.
void random_words(uint64_t seed, uint32_t domain, uint64_t first, int count, uint32_t* words) {
  constexpr int kCount = VectorOf<uint64_t>::kSize;
  static_assert(kPhiloxStep % kCount == 0, "whole vectors are drawn");
  Vector<uint64_t> own;
  for (int i = 0; i < kCount; ++i) own[i] = i;
  for (int at = 0; at < count; at += kCount) {
    Vector<uint64_t> c3 = {}, c2 = c3 + domain, c0 = own + (first + at), c1 = c0 >> 32;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Vector<uint64_t> none = {};
      const Vector<uint64_t> p0 = multiply_lower(c0, none + 0xD2511F53u), p1 = multiply_lower(c2, none + 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Vector<uint64_t> low = (c0 & 0xffffffffu) | c1 << 32, high = (c2 & 0xffffffffu) | c3 << 32;
    for (int i = 0; i < kCount; ++i) {
      const uint64_t block[2] = {low[i], high[i]};
      memcpy(words + 4 * (at + i), block, sizeof(block));
    }
  }
}

void digest(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums) {
  NoStatistics none;
  digest_block(key, from, bytes, sums, none);
}

template <typename T>
void digest_and_stats(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums, Stats* stats) {
  FiniteStatistics<T> statistics;
  digest_block(key, from, bytes, sums, statistics);
  *stats = statistics.all_finite() ? statistics.stats() : stats_of_finite<T>(from, bytes);
}

template void digest_and_stats<float>(const uint32_t*, const unsigned char*, int64_t, uint64_t*, Stats*);
template void digest_and_stats<double>(const uint32_t*, const unsigned char*, int64_t, uint64_t*, Stats*);
template void digest_and_stats<Half>(const uint32_t*, const unsigned char*, int64_t, uint64_t*, Stats*);
template void digest_and_stats<BFloat16>(const uint32_t*, const unsigned char*, int64_t, uint64_t*, Stats*);

template <typename T>
void scale(unsigned char* values, int64_t bytes, double factor) {
  const auto own_factor = static_cast<typename Element<T>::Sum>(factor);
  auto* const bits = reinterpret_cast<typename Element<T>::Bits*>(values);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; ++i) bits[i] = draco::scale<T>(bits[i], own_factor);
}

template void scale<float>(unsigned char*, int64_t, double);
template void scale<double>(unsigned char*, int64_t, double);
template void scale<Half>(unsigned char*, int64_t, double);
template void scale<BFloat16>(unsigned char*, int64_t, double);

}  // namespace DRACO_ISA
}  // namespace draco
