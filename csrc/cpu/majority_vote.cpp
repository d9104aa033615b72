// Majority vote in each group, fused with the mean over groups. Moves n x d elements in, d out; suspects and agreement
// come from the same sweep, by or-ing every member's differences from the winner.
#include "core/majority.h"
#include "cpu/common.h"

namespace draco {
namespace {

constexpr int64_t kVoteChunk = 16384;  // columns; the sum of a chunk stays in the second-level cache

template <typename T>
void fill_nan(Tensor& out) {
  using Bits = typename Element<T>::Bits;
  const Bits nan = mean_bits<T>(std::numeric_limits<typename Element<T>::Sum>::quiet_NaN());
  auto* to = static_cast<Bits*>(out.data_ptr());
  std::fill(to, to + out.numel(), nan);
}

template <typename T>
std::tuple<Tensor, Tensor> vote(const Tensor& messages, const std::vector<uint8_t>& missing,
                                const std::vector<int64_t>& group_sizes, int64_t adversaries, double atol, double rtol,
                                bool mean, Tensor& gradient) {
  using Sum = typename Element<T>::Sum;
  constexpr auto kIndex = static_cast<int>(kDtype<T>);
  const int64_t n = messages.size(0), d = messages.size(1), groups = group_sizes.size();
  auto* out = static_cast<T*>(gradient.data_ptr());

  // The present members of all groups, one group after the other.
  std::vector<int64_t> member, group_begin{0};
  bool failed = false;
  for (int64_t g = 0, j = 0; g < groups; ++g) {
    for (const int64_t end = j + group_sizes[g]; j < end; ++j)
      if (!missing[j]) member.push_back(j);
    failed |= static_cast<int64_t>(member.size()) == group_begin.back();
    group_begin.push_back(member.size());
  }

  std::vector<uint8_t> differs(n, 0);
  if (!failed) {
    const Kernels& kernel = kernels();
    const int64_t most = *std::max_element(group_sizes.begin(), group_sizes.end());
    const int64_t votes = (most * kVoteScratch + 63) / 64 * 64, per_column = groups == 1 ? 0 : sizeof(Sum);
    for_each_chunk(d, kVoteChunk, kAlignment, votes, per_column, [&](int64_t begin, int64_t columns, void* lent) {
      std::vector<const void*> rows(member.size());
      for (size_t i = 0; i < member.size(); ++i) rows[i] = row_pointer<T>(messages, member[i]) + begin;
      std::vector<uint8_t> local(member.size(), 0);
      auto* sum = reinterpret_cast<Sum*>(static_cast<unsigned char*>(lent) + votes);
      VoteChunk chunk{};
      chunk.columns = columns;
      chunk.tolerant = atol > 0 || rtol > 0;
      chunk.atol = atol;
      chunk.rtol = rtol;
      chunk.winner = out + begin;
      chunk.sum = groups == 1 ? nullptr : sum;
      chunk.scratch = lent;
      for (int64_t g = 0; g < groups; ++g) {
        chunk.rows = rows.data() + group_begin[g];
        chunk.members = static_cast<int>(group_begin[g + 1] - group_begin[g]);
        chunk.first = g == 0;
        chunk.differs = local.data() + group_begin[g];
        kernel.vote[kIndex](chunk);
      }
      if (groups > 1)
        kernel.finish[kIndex](sum, columns, mean ? static_cast<double>(groups) : 1.0, is_large(d * sizeof(T)),
                              out + begin);
      for (size_t i = 0; i < member.size(); ++i)
        if (local[i]) __atomic_store_n(&differs[member[i]], uint8_t{1}, __ATOMIC_RELAXED);
    });
  }
  for (int64_t g = 0; g < groups && !failed; ++g) {
    int present = 0, agreeing = 0;
    for (int64_t i = group_begin[g]; i < group_begin[g + 1]; ++i) {
      ++present;
      agreeing += !differs[member[i]];
    }
    failed = agreeing < agreement_needed(present, static_cast<int>(adversaries));
  }
  if (failed) fill_nan<T>(gradient);
  return {mask_tensor(differs), flag_tensor(failed)};
}

std::tuple<Tensor, Tensor> majority_vote_out(const Tensor& messages, const OptionalTensor& missing,
                                             const std::vector<int64_t> group_sizes, int64_t adversaries, double atol,
                                             double rtol, bool mean, Tensor out) {
  const char* op = "majority_vote";
  check_matrix(op, "messages", messages);
  check_out(op, out, messages.size(1), messages);
  check_groups(op, messages, group_sizes, adversaries);
  const std::vector<uint8_t> absent = read_mask(op, "missing", missing, messages);
  return dispatch_floating(op, "messages", messages.scalar_type(), [&](auto zero) {
    return vote<decltype(zero)>(messages, absent, group_sizes, adversaries, atol, rtol, mean, out);
  });
}

std::tuple<Tensor, Tensor, Tensor> majority_vote(const Tensor& messages, const OptionalTensor& missing,
                                                 const std::vector<int64_t> group_sizes, int64_t adversaries,
                                                 double atol, double rtol, bool mean) {
  check_matrix("majority_vote", "messages", messages);
  Tensor gradient = new_result(messages, messages.size(1));
  auto [suspects, failed] = majority_vote_out(messages, missing, group_sizes, adversaries, atol, rtol, mean, gradient);
  return {gradient, suspects, failed};
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("majority_vote", TORCH_BOX(&draco::majority_vote));
  m.impl("majority_vote_out", TORCH_BOX(&draco::majority_vote_out));
}
