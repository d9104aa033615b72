// The table of a set, by which cpu/dispatch.cpp finds it.
#include "core/half.h"
#include "cpu/kernels/set.h"

namespace draco {

#define DRACO_TEXT2(a) #a
#define DRACO_TEXT(a) DRACO_TEXT2(a)

namespace DRACO_ISA {

extern const Kernels kTable;  // const alone would have internal linkage
const Kernels kTable = {
    DRACO_TEXT(DRACO_ISA),
    {vote<float>, vote<double>, vote<Half>, vote<BFloat16>},
    {finish<float>, finish<double>, finish<Half>, finish<BFloat16>},
    weighted_sum<float>,
    weighted_sum<double>,
    encode<float>,
    encode<double>,
    project<float>,
    project<double>,
    check_energy,
    random_words,
    digest,
    {digest_and_stats<float>, digest_and_stats<double>, digest_and_stats<Half>, digest_and_stats<BFloat16>},
    {scale<float>, scale<double>, scale<Half>, scale<BFloat16>},
};

}  // namespace DRACO_ISA
}  // namespace draco
