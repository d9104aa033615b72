// The tables of messages that are k times shorter than a gradient (Solon, arXiv 2110.01595, by a construction of our
// own that continues the cyclic code).
//
// A gradient is cut into k blocks. Part p is computed by r = 2s+k evenly spread workers and enters their messages with
// a weight for each of its blocks b: z_j = sum over p and b of W_jpb g_p[b]. The weights solve
//
//   sum_j W_jpb x_j^m = [m == m_b]   for r consecutive moments m: the checks 1 .. 2s, and the k answers m_b beside
//   them.
//
// So sum_j x_j^(m_b) z_j is block b of the sum of the gradients, and the checks vanish as they do in the cyclic code.
// Half of the answers lie on each side of the checks, which makes noise grow least. With k = 1 the only answer is
// moment 0: the cyclic code.
#pragma once

#include <vector>

#include "core/cyclic.h"

namespace draco {
namespace {

// exp(2 pi i power / n) in twice double's precision. On the host alone.
[[maybe_unused]] static inline EncodingWeight encoding_node(int workers, long long power) {
  power %= workers;
  return {sine_of_pi(4 * power + workers, 2LL * workers), sine_of_pi(2 * power, workers)};
}

// The weights of part 0, (r, k) by position in the support and answer. Part p's have another factor x_p^(-m_b). With
// L_t the Lagrange polynomial of the support's node t, the coefficient of x^(m_b - m_0) in L_t is x_t^(m_0) W_tb, where
// m_0 is the lowest moment. On the host alone.
[[maybe_unused]] static inline std::vector<EncodingWeight> answer_weights(int workers, int adversaries,
                                                                          int compression) {
  const int r = 2 * adversaries + compression, lowest = 1 - (compression + 1) / 2;
  std::vector<EncodingWeight> node(r);
  for (int t = 0; t < r; ++t) node[t] = encoding_node(workers, cyclic_offset(workers, r, t));
  // In an order in which neighbours come late, as the digits of t reversed: products of consecutive nodes' factors grow
  // exponentially before they shrink again, and would leave few digits.
  std::vector<int> order;
  int bits = 0;
  while (1 << bits < r) ++bits;
  for (int i = 0; i < 1 << bits; ++i) {
    int reversed = 0;
    for (int bit = 0; bit < bits; ++bit) reversed |= (i >> bit & 1) << (bits - 1 - bit);
    if (reversed < r) order.push_back(reversed);
  }
  const EncodingWeight one{{1, 0}, {0, 0}};
  std::vector<EncodingWeight> all{one};  // coefficients of the product of all x - x_t, the lowest first
  for (const int t : order) {
    all.push_back(all.back());
    for (size_t i = all.size() - 2; i > 0; --i) all[i] = all[i - 1] - node[t] * all[i];
    all[0] = -(node[t] * all[0]);
  }
  std::vector<EncodingWeight> weights(int64_t{r} * compression), others(r);
  for (int t = 0; t < r; ++t) {
    others[r - 1] = one;  // the product of the others: divided by x - x_t
    for (int i = r - 1; i > 0; --i) others[i - 1] = all[i] + node[t] * others[i];
    EncodingWeight size = one;
    for (const int u : order)
      if (u != t) size = size * (node[t] - node[u]);
    const EncodingWeight scale =
        encoding_node(workers, -static_cast<long long>(lowest) * cyclic_offset(workers, r, t)) / size;
    for (int b = 0; b < compression; ++b)
      weights[int64_t{t} * compression + b] = scale * others[answer_moment(adversaries, compression, b) - lowest];
  }
  return weights;
}

}  // namespace
}  // namespace draco
