// Argument checks of the ops of every device. Python checks values and words the errors
// (draco_ext/_checks.py); these keep memory safe whoever calls.
#pragma once

#include <sys/random.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/answers.h"
#include "core/cyclic.h"
#include "core/half.h"
#include "core/limits.h"
#include "core/random.h"

namespace draco {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", name, " must have contiguous rows, got stride ",
                  t.stride(1));
}

inline void check_workers(const char* op, int64_t workers, int64_t adversaries, int64_t compression = 1) {
  STD_TORCH_CHECK(adversaries >= 0 && workers > 0 && workers <= kMostWorkers && compression > 0 &&
                      compression <= workers && adversaries <= (workers - compression) / 2,
                  op, ": needs 2 * adversaries + compression <= workers <= ", kMostWorkers, ", got workers=", workers,
                  ", adversaries=", adversaries, ", compression=", compression);
}

inline void check_mask(const char* op, const char* name, const OptionalTensor& mask, const Tensor& like) {
  if (!mask.has_value()) return;
  STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == like.size(0) && mask->scalar_type() == ScalarType::Bool, op,
                  ": ", name, " must be a bool mask with one entry per worker");
  STD_TORCH_CHECK(mask->get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the messages' device");
}

inline void check_groups(const char* op, const Tensor& messages, const std::vector<int64_t>& group_sizes,
                         int64_t adversaries) {
  STD_TORCH_CHECK(messages.size(0) <= kMostWorkers, op, ": messages must have at most ", kMostWorkers, " rows, got ",
                  messages.size(0));
  int64_t workers = 0;
  for (const int64_t size : group_sizes) {
    STD_TORCH_CHECK(size > 0 && size <= kMostGroupMembers && adversaries >= 0 && adversaries <= (size - 1) / 2, op,
                    ": group sizes must be from 2 * adversaries + 1 to ", kMostGroupMembers, ", got ", size);
    workers += size;
  }
  STD_TORCH_CHECK(!group_sizes.empty() && workers == messages.size(0), op, ": group_sizes must add up to the ",
                  messages.size(0), " messages, got ", workers);
}

// A vector of this size that a result is written into, beside the tensor that it is computed from.
inline void check_out(const char* op, const Tensor& out, int64_t size, const Tensor& from) {
  STD_TORCH_CHECK(out.dim() == 1 && out.size(0) == size && out.is_contiguous() &&
                      out.scalar_type() == from.scalar_type() && out.get_device_index() == from.get_device_index(),
                  op, ": out must be a contiguous vector of ", size, " elements of the same dtype on the same device");
}

// Vectors of the same size, dtype and device as out.
inline void check_vectors(const char* op, const std::vector<Tensor>& vectors, const Tensor& out) {
  STD_TORCH_CHECK(!vectors.empty() && vectors.size() <= kMostWorkers, op, ": needs from 1 to ", kMostWorkers,
                  " vectors, got ", vectors.size());
  for (const Tensor& vector : vectors) {
    STD_TORCH_CHECK(vector.dim() == 1 && vector.is_contiguous(), op, ": vectors must be contiguous vectors");
    check_out(op, out, vector.size(0), vector);
  }
}

// The bytes of a vector to be digested.
inline int64_t check_digest(const char* op, const Tensor& values) {
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), op, ": values must be a contiguous vector");
  return values.size(0) * values.element_size();
}

// Seeds that lie beside the values, where the host need not know them; `count`: how many there must be.
inline const int64_t* check_seeds(const char* op, const Tensor& seeds, const Tensor& values, int64_t count = -1) {
  STD_TORCH_CHECK(seeds.dim() == 1 && seeds.is_contiguous() && seeds.scalar_type() == ScalarType::Long &&
                      (count < 0 || seeds.size(0) == count) && seeds.get_device_index() == values.get_device_index(),
                  op, ": seeds must be a contiguous int64 vector on the values' device");
  return static_cast<const int64_t*>(seeds.data_ptr());
}

// Messages of the cyclic code, pairs of real columns, and how many elements of the gradient they stand for, of which
// each column has one in every block.
inline void check_pairs(const char* op, const Tensor& messages, int64_t length, int64_t blocks = 1) {
  check_matrix(op, "messages", messages);
  const int64_t columns = messages.size(1);
  STD_TORCH_CHECK(columns % 2 == 0, op, ": messages must have an even number of columns, got ", columns);
  STD_TORCH_CHECK(blocks > 0 && columns <= kMostLength / blocks && length >= 0 && length <= blocks * columns, op,
                  ": length must be from 0 to ", blocks, " * ", columns, ", got ", length);
}

// Returns for how many blocks there are weights.
inline int check_weights(const char* op, const Tensor& weights, const Tensor& messages) {
  STD_TORCH_CHECK((weights.dim() == 1 || weights.dim() == 2) && weights.size(weights.dim() - 1) == messages.size(0) &&
                      weights.is_contiguous() && weights.scalar_type() == ScalarType::ComplexDouble,
                  op, ": weights must be a contiguous complex128 tensor with one entry per message, or rows of them");
  STD_TORCH_CHECK(weights.get_device_index() == messages.get_device_index(), op,
                  ": weights must be on the messages' device");
  if (weights.dim() == 1) return 1;
  STD_TORCH_CHECK(weights.size(0) > 0 && weights.size(0) <= kMostWorkers, op, ": weights must have from 1 to ",
                  kMostWorkers, " rows, got ", weights.size(0));
  return static_cast<int>(weights.size(0));
}

inline void check_projections(const char* op, const Tensor& projections, const Tensor& norms, int64_t adversaries,
                              int64_t length) {
  STD_TORCH_CHECK(
      projections.dim() == 3 && projections.scalar_type() == ScalarType::ComplexDouble && projections.is_contiguous(),
      op, ": projections must be a contiguous (workers, tiles, projections) complex128 tensor");
  check_workers(op, projections.size(0), adversaries);
  STD_TORCH_CHECK(length >= 0 && length <= kMostLength, op, ": length must be from 0 to ", kMostLength, ", got ",
                  length);
  const int64_t n = projections.size(0), tiles = tile_count(length);
  STD_TORCH_CHECK(projections.size(1) == tiles && projections.size(2) == projections_per_tile(length), op,
                  ": projections must be those of messages of length ", length);
  STD_TORCH_CHECK(norms.dim() == 2 && norms.size(0) == n && norms.size(1) == tiles && norms.is_contiguous() &&
                      norms.scalar_type() == ScalarType::Double &&
                      norms.get_device_index() == projections.get_device_index(),
                  op, ": norms must be a contiguous (workers, tiles) float64 tensor beside the projections");
}

// The weights of part 0, (r, k) by position in the support and block, and the nodes with which other parts' are made.
struct EncodingTable {
  int workers = 0, adversaries = 0, compression = 0;
  std::vector<EncodingWeight> weights, nodes;

  int redundancy() const { return 2 * adversaries + compression; }
  bool real() const { return compression == 1 && has_real_weights(workers, adversaries); }

  // Appends the weights of a part's blocks in the message of the worker at this position.
  void append(std::vector<EncodingWeight>& to, int64_t part, int position) const {
    for (int b = 0; b < compression; ++b) {
      const EncodingWeight& weight = weights[int64_t{position} * compression + b];
      const int64_t power = -part * answer_moment(adversaries, compression, b) % workers;
      to.push_back(power == 0 ? weight : weight * nodes[(power + workers) % workers]);
    }
  }
};

// A thread keeps that of the last code it encoded with: for small gradients it takes longer than encoding.
inline const EncodingTable& encoding_table(int workers, int adversaries, int compression) {
  thread_local EncodingTable table;
  if (workers == table.workers && adversaries == table.adversaries && compression == table.compression) return table;
  table.workers = 0;
  table.nodes.clear();
  if (compression > 1) {
    table.weights = answer_weights(workers, adversaries, compression);
    for (int j = 0; j < workers; ++j) table.nodes.push_back(encoding_node(workers, j));
  } else {
    std::vector<DoubleDouble> sines;
    for (int step = 0; !has_real_weights(workers, adversaries) && step < workers; ++step)
      sines.push_back(sine_of_pi(step, workers));
    table.weights.clear();
    for (int t = 0; t <= 2 * adversaries; ++t)
      table.weights.push_back(cyclic_weight(workers, adversaries, t, [&](int step) { return sines[step]; }));
  }
  table.adversaries = adversaries;
  table.compression = compression;
  table.workers = workers;
  return table;
}

struct EncodingWeights {
  std::vector<EncodingWeight> of_blocks;  // of each row of gradients the blocks, in order
  bool real;                              // those of all parts of the code
};

// Checks the arguments; returns the weights of all parts of a worker, in ascending order of the parts, as
// CyclicCode.assignment gives them.
inline EncodingWeights check_encode(const char* op, const Tensor& gradients, int64_t workers, int64_t adversaries,
                                    int64_t worker, int64_t compression) {
  check_matrix(op, "gradients", gradients);
  check_workers(op, workers, adversaries, compression);
  const int n = static_cast<int>(workers), s = static_cast<int>(adversaries), k = static_cast<int>(compression);
  const int r = 2 * s + k;
  STD_TORCH_CHECK(gradients.size(0) == r, op, ": gradients must have ", r, " rows, got ", gradients.size(0));
  STD_TORCH_CHECK(worker >= 0 && worker < workers, op, ": worker must be from 0 to ", workers - 1, ", got ", worker);
  std::vector<std::pair<int64_t, int>> parts;
  for (int t = 0; t < r; ++t) parts.emplace_back((worker - cyclic_offset(n, r, t) + workers) % workers, t);
  std::sort(parts.begin(), parts.end());
  const EncodingTable& table = encoding_table(n, s, k);
  EncodingWeights weights{{}, table.real()};
  for (const auto& [part, t] : parts) table.append(weights.of_blocks, part, t);
  return weights;
}

inline EncodingWeights check_encode_add(const char* op, const Tensor& message, const Tensor& carry,
                                        const Tensor& gradient, int64_t workers, int64_t adversaries, int64_t worker,
                                        int64_t part, int64_t compression) {
  check_workers(op, workers, adversaries, compression);
  STD_TORCH_CHECK(gradient.dim() == 1 && gradient.is_contiguous(), op, ": gradient must be a contiguous vector");
  const int n = static_cast<int>(workers), s = static_cast<int>(adversaries), k = static_cast<int>(compression);
  const int64_t length = message_length(gradient.size(0), k);
  for (const Tensor* sum : {&message, &carry}) {
    STD_TORCH_CHECK(sum->dim() == 1 && sum->is_contiguous(), op, ": message and carry must be contiguous vectors");
    STD_TORCH_CHECK(sum->size(0) == length && sum->scalar_type() == gradient.scalar_type() &&
                        sum->get_device_index() == gradient.get_device_index(),
                    op, ": message and carry must have ", length,
                    " elements of the gradient's dtype on its device, got ", sum->size(0));
  }
  STD_TORCH_CHECK(worker >= 0 && worker < workers && part >= 0 && part < workers, op,
                  ": worker and part must be from 0 to ", workers - 1, ", got ", worker, " and ", part);
  const int t = cyclic_position(n, 2 * s + k, static_cast<int>(worker), static_cast<int>(part));
  STD_TORCH_CHECK(t >= 0, op, ": worker ", worker, " does not compute part ", part);
  const EncodingTable& table = encoding_table(n, s, k);
  EncodingWeights weights{{}, table.real()};
  table.append(weights.of_blocks, part, t);
  return weights;
}

// Calls f with a value of the element type that the scalar type stands for.
template <typename F>
void dispatch_real(const char* op, ScalarType type, const F& f) {
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(false, op, ": expected float32 or float64");
}

template <typename F>
auto dispatch_floating(const char* op, const char* name, ScalarType type, const F& f) {
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::Double) return f(double{});
  if (type == ScalarType::Half) return f(Half{});
  if (type == ScalarType::BFloat16) return f(BFloat16{});
  STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, float16 or bfloat16");
}

// The seed of a decode's projections: from the operating system, after the messages are in. One that is known
// beforehand, or can be computed from others, can be attacked.
inline uint64_t fresh_seed(const char* op) {
  uint64_t seed = 0;
  STD_TORCH_CHECK(getentropy(&seed, sizeof seed) == 0, op, ": the operating system gives no random numbers");
  return seed;
}

}  // namespace draco
