// Digests one block of bytes (core/digest.h).
#include "core/digest.h"

#include "cpu/kernels/set.h"
#include "cpu/kernels/stats.h"
#include "cpu/kernels/vectors.h"

namespace draco {
namespace {

// The products of the lower and upper halves of every 64 bits.
DRACO_HD Vector<uint64_t> multiply_halves(Vector<uint64_t> x) {
#if defined(__AVX512F__)
  return (Vector<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)(x >> 32));
#elif defined(__AVX2__)
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32));
#elif defined(__SSE2__)
  return (Vector<uint64_t>)_mm_mul_epu32((__m128i)x, (__m128i)(x >> 32));
#elif defined(__aarch64__)
  return (Vector<uint64_t>)vmull_u32(vmovn_u64((uint64x2_t)x), vshrn_n_u64((uint64x2_t)x, 32));
#else
  return (x & 0xffffffffu) * (x >> 32);
#endif
}

constexpr int kDigestAhead = 8192;  // bytes: further than kAhead, as there is one stream alone

// Adds NH of the words of a chunk, `bytes` bytes, to both lanes' sums. The words are added to `extra` or,
// of the first chunk, written there; kExtra: they are those themselves, which have no statistics.
enum class Chunk { kFirst, kOther, kExtra };
template <Chunk kChunk, typename Statistics>
DRACO_HD void digest_chunk(const uint32_t* key, const unsigned char* from, int64_t bytes, uint32_t* extra,
                           Vector<uint64_t>* sums, Statistics& statistics) {
  const unsigned char* const end = from + bytes;
  const auto take = [&](int word) __attribute__((always_inline)) {
    Vector<uint32_t> words;
    memcpy(&words, from + 4 * word, sizeof(words));
    in_register<uint32_t>(words);
    if (kChunk == Chunk::kFirst) store(extra + word, words);
    if (kChunk == Chunk::kOther) store(extra + word, load(extra + word) + words);
    DRACO_UNROLL
    for (int t = 0; t < kDigestLanes; ++t)
      sums[t] += multiply_halves((Vector<uint64_t>)(words + load(key + word + kDigestShift * t)));
  };
  const auto advance = [&](int by) __attribute__((always_inline)) {
    from += by;
    key += by / 4;
    extra += by / 4;
  };
  for (; from + kLine <= end; advance(kLine)) {
    if (kChunk != Chunk::kExtra) __builtin_prefetch(from + kDigestAhead);
    DRACO_UNROLL for (int v = 0; v < kLine; v += kBytes) take(v / 4);
    if (kChunk != Chunk::kExtra) statistics.take_line(from);
  }
  if (kChunk != Chunk::kExtra) statistics.take_rest(from, end - from);
  for (; from + kBytes <= end; advance(kBytes)) take(0);
  for (; from < end; advance(8)) {
    uint32_t pair[2] = {0, 0};
    memcpy(pair, from, end - from < 8 ? end - from : 8);
    for (int i = 0; i < 2; ++i) {
      if (kChunk == Chunk::kFirst) extra[i] = pair[i];
      if (kChunk == Chunk::kOther) extra[i] += pair[i];
    }
    for (int t = 0; t < kDigestLanes; ++t)
      sums[t][0] += digest_pair(pair[0], pair[1], key[kDigestShift * t], key[kDigestShift * t + 1]);
  }
}

// Adds the four sums of a block and takes the statistics of its values.
template <typename Statistics>
DRACO_HD void digest_block(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums,
                           Statistics& statistics) {
  alignas(64) uint32_t extra[kDigestChunk / 4];
  Vector<uint64_t> plain[kDigestLanes] = {}, weighted[kDigestLanes] = {};
  const auto join = [&]() __attribute__((always_inline)) {  // so the last chunk counts once, the one before it twice
    DRACO_UNROLL for (int t = 0; t < kDigestLanes; ++t) weighted[t] += plain[t];
  };
  const auto size = [&](int64_t at) { return bytes - at < kDigestChunk ? bytes - at : kDigestChunk; };
  digest_chunk<Chunk::kFirst>(key, from, size(0), extra, plain, statistics);
  join();
  for (int64_t at = kDigestChunk; at < bytes; at += kDigestChunk) {
    key += kDigestChunkKey;
    digest_chunk<Chunk::kOther>(key, from + at, size(at), extra, plain, statistics);
    join();
  }
  digest_chunk<Chunk::kExtra>(key + kDigestChunkKey, reinterpret_cast<const unsigned char*>(extra),
                              (size(0) + 7) / 8 * 8, extra, plain, statistics);
  join();
  for (int t = 0; t < kDigestLanes; ++t) {
    for (int i = 0; i < VectorOf<uint64_t>::kSize; ++i) {
      sums[2 * t] += plain[t][i];
      sums[2 * t + 1] += weighted[t][i];
    }
  }
}

}  // namespace

namespace DRACO_ISA {

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

}  // namespace DRACO_ISA
}  // namespace draco
