// A worker's message: the weighted sum of its parts' gradients, as complex numbers on pairs of elements.
// Parts are added up in twice the precision of the message, which is so rounded once: what parts have in common and
// cancels in a message leaves no rounding behind that the decoder could take for an error.
// cyclic_encode moves (2s+1) x d elements in and d out, or of a code with shorter messages (2s+k) x d in and d/k out;
// cyclic_encode_add_ reads the gradient and, but for the first part, the message and what rounding has left of it, and
// writes these two.
#include "core/cyclic.h"
#include "cpu/cyclic.h"

namespace draco {
namespace {

constexpr int64_t kEncodeChunk = 8192;  // columns

// Of a message where some blocks have fewer columns than others, these are few: the last 2k of the gradient at most.
template <typename T>
void encode(const std::vector<const T*>& gradients, int64_t length, const EncodingWeights& weights, int blocks,
            T* message, T* carry, bool add) {
  const Kernels& kernel = kernels();
  const int64_t columns = message_length(length, blocks);
  std::vector<const T*> rows;
  for (const T* gradient : gradients)
    for (int b = 0; b < blocks; ++b) rows.push_back(gradient + b * columns);
  const int count = static_cast<int>(rows.size());
  const auto run = [&](const std::vector<const T*>& from, int64_t begin, int64_t width) {
    kernel.encode(EncodeChunk<T>{from.data(), weights.of_blocks.data(), count, width, message + begin,
                                 carry == nullptr ? nullptr : carry + begin, add, weights.real});
  };
  // An odd last column of all rows is paired by the kernel.
  const int64_t in_last = std::max<int64_t>(0, length - (blocks - 1) * columns);
  const int64_t common = blocks == 1 ? length : in_last == columns ? columns : in_last / kCancelBlock * kCancelBlock;
  for_each_chunk(common, kEncodeChunk, kAlignment, 0, 0, [&](int64_t begin, int64_t width, void*) {
    std::vector<const T*> at(rows);
    for (const T*& row : at) row += begin;
    run(at, begin, width);
  });
  if (blocks == 1 || common == columns) return;
  const int64_t rest = columns - common;
  std::vector<T> padded(count * rest);
  std::vector<const T*> at(count);
  for (int i = 0; i < count; ++i) {
    const int64_t left = std::clamp<int64_t>(length - (i % blocks * columns + common), 0, rest);
    std::copy_n(rows[i] + (left > 0 ? common : 0), left, padded.begin() + i * rest);
    at[i] = padded.data() + i * rest;
  }
  const FloatingPointMode mode;
  run(at, common, rest);
}

void cyclic_encode_out(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker, Tensor out,
                       int64_t compression) {
  const char* op = "cyclic_encode";
  const EncodingWeights weights = check_encode(op, gradients, workers, adversaries, worker, compression);
  const int64_t d = gradients.size(1);
  const int blocks = static_cast<int>(compression);
  check_out(op, out, message_length(d, blocks), gradients);
  dispatch_real(op, gradients.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    encode<T>(row_pointers<T>(gradients), d, weights, blocks, static_cast<T*>(out.data_ptr()), nullptr, false);
  });
}

Tensor cyclic_encode(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker,
                     int64_t compression) {
  check_matrix("cyclic_encode", "gradients", gradients);
  check_workers("cyclic_encode", workers, adversaries, compression);
  Tensor message = new_result(gradients, message_length(gradients.size(1), static_cast<int>(compression)));
  cyclic_encode_out(gradients, workers, adversaries, worker, message, compression);
  return message;
}

void cyclic_encode_add_(Tensor message, Tensor carry, const Tensor& gradient, int64_t workers, int64_t adversaries,
                        int64_t worker, int64_t part, bool first, int64_t compression) {
  const char* op = "cyclic_encode_add_";
  const EncodingWeights weights =
      check_encode_add(op, message, carry, gradient, workers, adversaries, worker, part, compression);
  dispatch_real(op, gradient.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    encode<T>({static_cast<const T*>(gradient.data_ptr())}, gradient.size(0), weights, static_cast<int>(compression),
              static_cast<T*>(message.data_ptr()), static_cast<T*>(carry.data_ptr()), !first);
  });
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("cyclic_encode", TORCH_BOX(&draco::cyclic_encode));
  m.impl("cyclic_encode_out", TORCH_BOX(&draco::cyclic_encode_out));
  m.impl("cyclic_encode_add_", TORCH_BOX(&draco::cyclic_encode_add_));
}
