// Projects messages on random weights, adding them up in the same sweep, and checks the projections.
#include "cpu/kernels/pairs.h"
#include "cpu/kernels/set.h"

namespace draco {
namespace {

enum class Adding { kNo, kPlain, kWeighted };

template <typename T, int kProjections, int kCount, Adding kAdding>
void project_rows(const ProjectChunk<T>& job, const int* which, bool first) {
  constexpr int kStep = VectorOf<T>::kSize, kVectors = kLanes / kStep;
  static_assert(kLanes % kStep == 0, "a step takes whole vectors");
  // Copies, which stores to the sum cannot be thought to change.
  const T* rows[kCount];
  for (int r = 0; r < kCount; ++r) rows[r] = job.rows[which[r]];
  const T* const phi_table = job.phi;
  T* const out = job.sum;
  const int64_t columns = job.columns;
  Vector<T> re[kCount], im[kCount];
  if constexpr (kAdding == Adding::kWeighted) {
    for (int r = 0; r < kCount; ++r) {
      const PairWeight<T> weight(job.weights[2 * which[r]], job.weights[2 * which[r] + 1]);
      re[r] = weight.re;
      im[r] = weight.im;
    }
  }

  alignas(64) double total[kCount][kProjections][kLanes] = {};
  alignas(64) double squares[kCount][kLanes] = {}, small_squares[kCount][kLanes] = {};
  alignas(64) double lane[kCount][kProjections][kLanes];
  alignas(64) T padded[kCount][kLanes];
  for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
    const int64_t chunk_end = chunk + kChunk < columns ? chunk + kChunk : columns;
    for (int64_t block = chunk; block < chunk_end; block += kBlock) {
      const int64_t block_end = block + kBlock < chunk_end ? block + kBlock : chunk_end;
      const int64_t whole = block + (block_end - block) / kLanes * kLanes;
      const size_t rest = (block_end - whole) * sizeof(T);
      alignas(64) T rest_sum[kLanes] = {};
      if (rest > 0) {  // the last columns of the message, where whole vectors may not be read
        for (int r = 0; r < kCount; ++r) {
          memset(padded[r], 0, sizeof(padded[r]));
          memcpy(padded[r], rows[r] + whole, rest);
        }
        if (kAdding != Adding::kNo && !first) memcpy(rest_sum, out + whole, rest);
      }
      // kLanes columns of every row at a step, each lane into its own partial sum; vector by vector, so that the
      // partial sums of all rows stay in registers.
      DRACO_UNROLL for (int v = 0; v < kVectors; ++v) {
        Vector<T> partial[kCount][kProjections];
        DRACO_UNROLL for (int r = 0; r < kCount; ++r) DRACO_UNROLL for (int k = 0; k < kProjections; ++k)
            partial[r][k] = Vector<T>{};
        const auto step = [&](const T* const* from, int64_t at, const T* phi, T* sum) __attribute__((always_inline)) {
          Vector<T> p[kProjections], added = {};
          DRACO_UNROLL for (int k = 0; k < kProjections; ++k) p[k] = load(phi + k * kChunk + v * kStep);
          if (kAdding != Adding::kNo && !first) added = load(sum + v * kStep);
          DRACO_UNROLL for (int r = 0; r < kCount; ++r) {
            Vector<T> z = load(from[r] + at + v * kStep);
            in_register<T>(z);
            if constexpr (kAdding == Adding::kPlain) added += z;
            if constexpr (kAdding == Adding::kWeighted) added = add_weighted<T>(re[r], im[r], z, added);
            DRACO_UNROLL for (int k = 0; k < kProjections; ++k) partial[r][k] = multiply_add<T>(p[k], z, partial[r][k]);
          }
          if (kAdding != Adding::kNo) store(sum + v * kStep, added);
        };
        for (int64_t c = block; c < whole; c += kLanes) {
          DRACO_UNROLL for (int r = 0; r < kCount; ++r) {
            if (v != r % kVectors) continue;  // each row in one of the passes
            DRACO_UNROLL for (int i = 0; i < kLanes; i += kLine / static_cast<int>(sizeof(T))) {
              if (kCount == 1) {
                fetch_far_ahead(rows[r] + c + i);
              } else {
                fetch_ahead(rows[r] + c + i);
              }
            }
          }
          step(rows, c, phi_table + (c - chunk), out + c);
        }
        if (rest > 0) {
          const T* from[kCount];
          DRACO_UNROLL for (int r = 0; r < kCount; ++r) from[r] = padded[r];
          step(from, 0, phi_table + (whole - chunk), rest_sum);
        }
        for (int r = 0; r < kCount; ++r) {
          DRACO_UNROLL for (int k = 0; k < kProjections; ++k) {
            alignas(64) T sums[kStep];
            store(sums, partial[r][k]);
            double* to = lane[r][k] + v * kStep;
            if (block == chunk) {
              for (int i = 0; i < kStep; ++i) to[i] = static_cast<double>(sums[i]);
            } else {
              for (int i = 0; i < kStep; ++i) to[i] += static_cast<double>(sums[i]);
            }
          }
        }
      }
      if (kAdding != Adding::kNo && rest > 0) memcpy(out + whole, rest_sum, rest);
    }
    const float* psi = job.psi + chunk / kChunk * kMostProjections;
    for (int r = 0; r < kCount; ++r) {
      for (int k = 0; k < kProjections; ++k) {
        const double scale = psi[k];
        for (int i = 0; i < kLanes; ++i) {
          const double weighted = scale * lane[r][k][i];
          total[r][k][i] += weighted;
          squares[r][i] += weighted * weighted;
          if constexpr (sizeof(T) == 8) {
            const double small = kSmaller * weighted;
            small_squares[r][i] += small * small;
          }
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r) {
    for (int k = 0; k < kProjections; ++k) {
      double even = 0, odd = 0;
      for (int i = 0; i < kLanes; i += 2) {
        even += total[r][k][i];
        odd += total[r][k][i + 1];
      }
      job.re[which[r] * job.stride + k] = even;
      job.im[which[r] * job.stride + k] = odd;
    }
    double square = 0, small_square = 0;
    for (int i = 0; i < kLanes; ++i) {
      square += squares[r][i];
      small_square += small_squares[r][i];
    }
    job.norm[which[r] * job.norm_stride] = norm_of_squares<T>(square / kProjections, small_square / kProjections);
  }
}

// Rows in `which`, as many together as their partial sums leave registers for.
template <typename T, int kProjections, Adding kAdding>
void project_list(const ProjectChunk<T>& job, const int* which, int count) {
  constexpr int kTogether = 8 / kProjections;
  int done = 0;
  for (; done + kTogether <= count; done += kTogether)
    project_rows<T, kProjections, kTogether, kAdding>(job, which + done, done == 0);
  for (; done < count; ++done) project_rows<T, kProjections, 1, kAdding>(job, which + done, done == 0);
  if (count == 0 && kAdding != Adding::kNo) memset(job.sum, 0, job.columns * sizeof(T));
}

template <typename T, int kProjections>
void project_all(const ProjectChunk<T>& job) {
  if (job.sum == nullptr) {
    project_list<T, kProjections, Adding::kNo>(job, job.added, job.added_count);
  } else if (job.weights == nullptr) {
    project_list<T, kProjections, Adding::kPlain>(job, job.added, job.added_count);
  } else {
    project_list<T, kProjections, Adding::kWeighted>(job, job.added, job.added_count);
  }
  project_list<T, kProjections, Adding::kNo>(job, job.others, job.others_count);
}

}  // namespace

namespace DRACO_ISA {

template <typename T>
void project(const ProjectChunk<T>& job) {
  if (job.projections == kFewestProjections) {
    project_all<T, kFewestProjections>(job);
  } else {
    project_all<T, kMostProjections>(job);
  }
}

template void project<float>(const ProjectChunk<float>&);
template void project<double>(const ProjectChunk<double>&);

void check_energy(const Complex* check, int checks, int workers, const double* re, const double* im, int64_t stride,
                  int64_t columns, double* energy) {
  constexpr int kWidth = 16;
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int width = static_cast<int>(columns - c < kWidth ? columns - c : kWidth);
    double total[kWidth] = {};
    for (int m = 0; m < checks; ++m) {
      double sum_re[kWidth] = {}, sum_im[kWidth] = {};
      for (int j = 0; j < workers; ++j) {
        const Complex h = check[m * workers + j];
        const double *a = re + j * stride + c, *b = im + j * stride + c;
        if (width == kWidth) {
          for (int i = 0; i < kWidth; ++i) {
            sum_re[i] += h.re * a[i] - h.im * b[i];
            sum_im[i] += h.re * b[i] + h.im * a[i];
          }
        } else {
          for (int i = 0; i < width; ++i) {
            sum_re[i] += h.re * a[i] - h.im * b[i];
            sum_im[i] += h.re * b[i] + h.im * a[i];
          }
        }
      }
      for (int i = 0; i < kWidth; ++i) total[i] += sum_re[i] * sum_re[i] + sum_im[i] * sum_im[i];
    }
    for (int i = 0; i < width; ++i) energy[c + i] = total[i];
  }
}

}  // namespace DRACO_ISA
}  // namespace draco
