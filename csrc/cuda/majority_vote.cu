// Majority vote in each group, fused with the mean over groups. Three launches; the host waits for none:
//   vote_begin   one block: who is present in which group. Reads the mask, writes 4 bytes per worker.
//   vote         256 threads a block, 16 bytes of each row a thread and step, at most 32 blocks per multiprocessor.
//                Reads n x d elements once, writes d (groups other than of 1, 3, 5, 7 read theirs again, from cache).
//   vote_finish  NaN over the gradient where the vote failed: writes d elements then, otherwise nothing.
#include "core/limits.h"
#include "core/majority.h"
#include "cuda/common.cuh"

namespace draco {
namespace {

constexpr int kVoteThreads = 256, kBlocksPerMultiprocessor = 32;
constexpr int kGroupsPerLaunch = 1024;

// Consecutive groups as a kernel argument: no copy from the host that a CUDA graph could not keep.
struct Groups {
  uint16_t begin[kGroupsPerLaunch + 1];  // first worker of each
  int first, count;
};

struct Members {
  int* member;  // (workers,): of group g, the present workers from begin[g] on
  int* begin;   // (groups,)
  int* count;   // (groups,)
};

struct VoteState {
  unsigned arrived;
  int failed;
};

__global__ void vote_begin(const __grid_constant__ Groups groups, Mask missing, Members members, uint8_t* differs,
                           VoteState* state) {
  if (threadIdx.x == 0 && groups.first == 0) *state = {0, 0};
  __syncthreads();
  for (int g = threadIdx.x; g < groups.count; g += blockDim.x) {
    const int begin = groups.begin[g], end = groups.begin[g + 1];
    int present = 0;
    for (int j = begin; j < end; ++j) {
      differs[j] = 0;
      if (!missing[j]) members.member[begin + present++] = j;
    }
    members.begin[groups.first + g] = begin;
    members.count[groups.first + g] = present;
    if (present == 0) state->failed = 1;
  }
}

// 16 bytes of elements as words, for what is done bit by bit.
struct Words {
  uint32_t at[4];
};

// The winners of 16 bytes of columns, bit by bit; marks the members that differ.
template <int kMembers, typename Row>
DRACO_DEVICE Words majority(int members, Row&& row, const int* member, uint8_t* differs) {
  Words winner;
  if constexpr (kMembers > 0) {
    Words word[kMembers];
#pragma unroll
    for (int i = 0; i < kMembers; ++i) word[i] = row(i);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if constexpr (kMembers == 1) {
        winner.at[b] = word[0].at[b];
      } else if constexpr (kMembers == 3) {
        winner.at[b] = majority3(word[0].at[b], word[1].at[b], word[2].at[b]);
      } else {
        MajorityCounter<uint32_t, 2> counter;
        counter.start(kMembers);
#pragma unroll
        for (int i = 0; i < kMembers; ++i) counter.add(word[i].at[b]);
        winner.at[b] = counter.verdict;
      }
    }
#pragma unroll
    for (int i = 0; i < kMembers; ++i) {
      uint32_t difference = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) difference |= word[i].at[b] ^ winner.at[b];
      if (difference != 0) differs[member[i]] = 1;
    }
  } else {
    MajorityCounter<uint32_t, kVotePlanes> counter[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) counter[b].start(members);
    for (int i = 0; i < members; ++i) {
      const Words word = row(i);
#pragma unroll
      for (int b = 0; b < 4; ++b) counter[b].add(word.at[b]);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) winner.at[b] = counter[b].verdict;
    for (int i = 0; i < members; ++i) {
      const Words word = row(i);
      uint32_t difference = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) difference |= word.at[b] ^ winner.at[b];
      if (difference != 0) differs[member[i]] = 1;
    }
  }
  return winner;
}

// Floats in their total order (-NaN < -inf < ... < -0 < +0 < ... < NaN) as unsigned integers, and back.
template <typename Bits>
DRACO_DEVICE Bits key_of(Bits bits) {
  constexpr Bits kTop = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  return static_cast<Bits>(bits & kTop ? ~bits : bits | kTop);
}
template <typename Bits>
DRACO_DEVICE Bits bits_of_key(Bits key) {
  constexpr Bits kTop = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  return static_cast<Bits>(key & kTop ? key & ~kTop : ~key);
}

// The lower medians of 16 bytes of columns; marks the members further away than the tolerance.
template <typename T, int kMembers, typename Row>
DRACO_DEVICE Words median(int members, Row&& row, const int* member, uint8_t* differs, double atol, double rtol) {
  using Bits = typename Element<T>::Bits;
  using Elements = Vector<Bits>;
  Elements winner;
  if constexpr (kMembers > 0) {
    Elements key[kMembers];
#pragma unroll
    for (int i = 0; i < kMembers; ++i) key[i] = bit_cast<Elements>(row(i));
#pragma unroll
    for (int c = 0; c < Elements::kCount; ++c) {
      Bits sorted[kMembers];
#pragma unroll
      for (int i = 0; i < kMembers; ++i) sorted[i] = key_of(key[i].at[c]);
#pragma unroll
      for (int round = 0; round < kMembers; ++round) {  // odd-even transposition
#pragma unroll
        for (int i = round & 1; i + 1 < kMembers; i += 2) {
          const Bits a = sorted[i], b = sorted[i + 1];
          sorted[i] = a < b ? a : b;
          sorted[i + 1] = a < b ? b : a;
        }
      }
      winner.at[c] = bits_of_key(sorted[(kMembers - 1) / 2]);
    }
#pragma unroll
    for (int i = 0; i < kMembers; ++i) {
      bool apart = false;
#pragma unroll
      for (int c = 0; c < Elements::kCount; ++c) apart |= !within<T>(key[i].at[c], winner.at[c], atol, rtol);
      if (apart) differs[member[i]] = 1;
    }
  } else {
    // From the top bit down: does the median have it, among the members that share the bits above?
    Bits prefix[Elements::kCount] = {};
    int rank[Elements::kCount];
#pragma unroll
    for (int c = 0; c < Elements::kCount; ++c) rank[c] = (members - 1) / 2;
    for (int bit = 8 * sizeof(Bits) - 1; bit >= 0; --bit) {
      int below[Elements::kCount] = {};
      for (int i = 0; i < members; ++i) {
        const Elements key = bit_cast<Elements>(row(i));
#pragma unroll
        for (int c = 0; c < Elements::kCount; ++c) below[c] += key_of(key.at[c]) >> bit == prefix[c] >> bit;
      }
#pragma unroll
      for (int c = 0; c < Elements::kCount; ++c) {
        if (rank[c] < below[c]) continue;
        rank[c] -= below[c];
        prefix[c] = static_cast<Bits>(prefix[c] | Bits{1} << bit);
      }
    }
#pragma unroll
    for (int c = 0; c < Elements::kCount; ++c) winner.at[c] = bits_of_key(prefix[c]);
    for (int i = 0; i < members; ++i) {
      const Elements key = bit_cast<Elements>(row(i));
      bool apart = false;
#pragma unroll
      for (int c = 0; c < Elements::kCount; ++c) apart |= !within<T>(key.at[c], winner.at[c], atol, rtol);
      if (apart) differs[member[i]] = 1;
    }
  }
  return bit_cast<Words>(winner);
}

template <typename T>
struct Vote {
  const typename Element<T>::Bits* messages;
  int64_t stride, columns;
  Members members;
  int groups, workers, adversaries;
  double atol, rtol;
  bool mean;
  typename Element<T>::Bits* gradient;
  uint8_t* differs;  // (workers,): the suspects
  uint8_t* failed;
  VoteState* state;
};

template <typename T, bool kTolerant, bool kWhole>
DRACO_DEVICE void vote_columns(const Vote<T>& vote, int64_t column, uint8_t* differs) {
  using Bits = typename Element<T>::Bits;
  using Sum = typename Element<T>::Sum;
  using Elements = Vector<Bits>;
  const int64_t left = vote.columns - column;
  Sum total[Elements::kCount];
  Words winner;
  for (int g = 0; g < vote.groups; ++g) {
    const int members = vote.members.count[g];
    const int* member = vote.members.member + vote.members.begin[g];
    const auto row = [&](int i) {
      return bit_cast<Words>(load<kWhole>(vote.messages + member[i] * vote.stride + column, left));
    };
    const auto decide = [&](auto constant) {
      constexpr int kMembers = decltype(constant)::value;
      if constexpr (kTolerant) {
        winner = median<T, kMembers>(members, row, member, differs, vote.atol, vote.rtol);
      } else {
        winner = majority<kMembers>(members, row, member, differs);
      }
    };
    switch (members) {
      case 1:
        decide(std::integral_constant<int, 1>());
        break;
      case 3:
        decide(std::integral_constant<int, 3>());
        break;
      case 5:
        decide(std::integral_constant<int, 5>());
        break;
      case 7:
        decide(std::integral_constant<int, 7>());
        break;
      default:
        decide(std::integral_constant<int, 0>());
        break;
    }
    const Elements bits = bit_cast<Elements>(winner);
#pragma unroll
    for (int c = 0; c < Elements::kCount; ++c) {
      const Sum value = value_of<T>(bits.at[c]);
      total[c] = g == 0 ? value : total[c] + value;
    }
  }
  Elements out = bit_cast<Elements>(winner);  // of a single group the winners themselves, bit by bit
  if (vote.groups > 1) {
    const Sum divisor = vote.mean ? static_cast<Sum>(vote.groups) : Sum{1};
#pragma unroll
    for (int c = 0; c < Elements::kCount; ++c) out.at[c] = mean_bits<T>(total[c] / divisor);
  }
  store<kWhole>(vote.gradient + column, left, out);
}

// Dynamic shared memory: one byte per worker, set where it differs in one of the block's columns.
template <typename T, bool kTolerant>
__global__ void __launch_bounds__(kVoteThreads, kTolerant ? 1 : 0) vote_kernel(Vote<T> vote, bool aligned) {
  constexpr int kCount = Vector<typename Element<T>::Bits>::kCount;
  DRACO_DYNAMIC_SHARED(differs);
  for (int j = threadIdx.x; j < vote.workers; j += kVoteThreads) differs[j] = 0;
  __syncthreads();
  const int64_t step = int64_t{kVoteThreads} * kCount;
  if (!vote.state->failed) {
    for (int64_t begin = blockIdx.x * step; begin < vote.columns; begin += gridDim.x * step) {
      const int64_t column = begin + threadIdx.x * kCount;
      if (aligned && column + kCount <= vote.columns) {
        vote_columns<T, kTolerant, true>(vote, column, differs);
      } else if (column < vote.columns) {
        vote_columns<T, kTolerant, false>(vote, column, differs);
      }
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < vote.workers; j += kVoteThreads)
    if (differs[j]) vote.differs[j] = 1;

  if (!is_last_block(&vote.state->arrived)) return;
  bool failed = vote.state->failed;
  for (int g = threadIdx.x; g < vote.groups && !failed; g += kVoteThreads) {
    const int members = vote.members.count[g];
    int agreeing = 0;
    for (int i = 0; i < members; ++i) agreeing += !vote.differs[vote.members.member[vote.members.begin[g] + i]];
    failed = agreeing < agreement_needed(members, vote.adversaries);
  }
  failed = __syncthreads_or(failed);
  if (threadIdx.x == 0) *vote.failed = failed;
}

template <typename T>
__global__ void vote_finish(typename Element<T>::Bits* gradient, int64_t columns, const uint8_t* failed) {
  if (!*failed) return;
  const auto nan = mean_bits<T>(static_cast<typename Element<T>::Sum>(NAN));
  for (int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; c < columns; c += int64_t{gridDim.x} * blockDim.x)
    gradient[c] = nan;
}

template <typename T>
void launch_vote(const Device& device, const Tensor& messages, const OptionalTensor& missing,
                 const std::vector<int64_t>& group_sizes, int64_t adversaries, double atol, double rtol, bool mean,
                 Tensor& gradient, Tensor& suspects, Tensor& failed) {
  using Bits = typename Element<T>::Bits;
  const int64_t n = messages.size(0), d = messages.size(1), groups = group_sizes.size();
  Tensor scratch = new_scratch(messages, sizeof(VoteState) + (n + 2 * groups) * sizeof(int));
  auto* state = static_cast<VoteState*>(scratch.data_ptr());
  int* tables = reinterpret_cast<int*>(state + 1);
  const Members members{tables, tables + n, tables + n + groups};
  auto* differs = static_cast<uint8_t*>(suspects.data_ptr());

  Groups table;
  int64_t worker = 0;
  for (int64_t first = 0; first < groups; first += table.count) {
    table.first = static_cast<int>(first);
    table.count = static_cast<int>(std::min<int64_t>(kGroupsPerLaunch, groups - first));
    for (int g = 0; g < table.count; ++g) {
      table.begin[g] = static_cast<uint16_t>(worker);
      worker += group_sizes[first + g];
    }
    table.begin[table.count] = static_cast<uint16_t>(worker);
    DRACO_LAUNCH(device, vote_begin, 1, kVoteThreads, 0, table, Mask(missing), members, differs, state);
  }
  const Vote<T> vote{static_cast<const Bits*>(messages.data_ptr()),
                     messages.stride(0),
                     d,
                     members,
                     static_cast<int>(groups),
                     static_cast<int>(n),
                     static_cast<int>(adversaries),
                     atol,
                     rtol,
                     mean,
                     static_cast<Bits*>(gradient.data_ptr()),
                     differs,
                     static_cast<uint8_t*>(failed.data_ptr()),
                     state};
  const int64_t steps = ceil_div(d, kVoteThreads * Vector<Bits>::kCount);
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * device.multiprocessors;
  const int64_t blocks = std::max<int64_t>(1, std::min(steps, most));
  const bool aligned =
      rows_aligned<Bits>(messages.data_ptr(), messages.stride(0), n) && rows_aligned<Bits>(gradient.data_ptr(), 0, 1);
  const auto kernel = atol > 0 || rtol > 0 ? vote_kernel<T, true> : vote_kernel<T, false>;
  DRACO_LAUNCH(device, kernel, blocks, kVoteThreads, n, vote, aligned);
  if (d > 0) DRACO_LAUNCH(device, vote_finish<T>, blocks, kVoteThreads, 0, vote.gradient, d, vote.failed);
}

std::tuple<Tensor, Tensor> majority_vote_out(const Tensor& messages, const OptionalTensor& missing,
                                             const std::vector<int64_t> group_sizes, int64_t adversaries, double atol,
                                             double rtol, bool mean, Tensor out) {
  const char* op = "majority_vote";
  check_matrix(op, "messages", messages);
  check_out(op, out, messages.size(1), messages);
  check_groups(op, messages, group_sizes, adversaries);
  check_mask(op, "missing", missing, messages);
  const Device device(messages);
  Tensor suspects = torch::stable::new_empty(messages, {messages.size(0)}, ScalarType::Bool);
  Tensor failed = torch::stable::new_empty(messages, {}, ScalarType::Bool);
  dispatch_floating(op, "messages", messages.scalar_type(), [&](auto zero) {
    launch_vote<decltype(zero)>(device, messages, missing, group_sizes, adversaries, atol, rtol, mean, out, suspects,
                                failed);
  });
  return {suspects, failed};
}

std::tuple<Tensor, Tensor, Tensor> majority_vote(const Tensor& messages, const OptionalTensor& missing,
                                                 const std::vector<int64_t> group_sizes, int64_t adversaries,
                                                 double atol, double rtol, bool mean) {
  check_matrix("majority_vote", "messages", messages);
  Tensor gradient = torch::stable::new_empty(messages, {messages.size(1)});
  auto [suspects, failed] = majority_vote_out(messages, missing, group_sizes, adversaries, atol, rtol, mean, gradient);
  return {gradient, suspects, failed};
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("majority_vote", TORCH_BOX(&draco::majority_vote));
  m.impl("majority_vote_out", TORCH_BOX(&draco::majority_vote_out));
}
