#include "instruction_set.h"

#include "../check.h"

namespace mm {

#if defined(__x86_64__)
namespace avx512 {
extern const GegluKernels kGeglu;
extern const LayerNormKernels kLayerNorm;
extern const TemporalAttentionKernels kTemporalAttention;
extern const GroupNormSiluKernels kGroupNormSilu;
}  // namespace avx512
namespace avx2 {
extern const GegluKernels kGeglu;
extern const LayerNormKernels kLayerNorm;
extern const TemporalAttentionKernels kTemporalAttention;
extern const GroupNormSiluKernels kGroupNormSilu;
}  // namespace avx2
#endif
namespace portable {
extern const GegluKernels kGeglu;
extern const LayerNormKernels kLayerNorm;
extern const TemporalAttentionKernels kTemporalAttention;
extern const GroupNormSiluKernels kGroupNormSilu;
}  // namespace portable

namespace {

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     &avx512::kTemporalAttention, &avx512::kGroupNormSilu, &avx512::kGeglu, &avx512::kLayerNorm},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &avx2::kTemporalAttention,
     &avx2::kGroupNormSilu, &avx2::kGeglu, &avx2::kLayerNorm},
#endif
    {"portable", [] { return true; }, &portable::kTemporalAttention, &portable::kGroupNormSilu, &portable::kGeglu,
     &portable::kLayerNorm},
};

const InstructionSet* selected = nullptr;

}  // namespace

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : kInstructionSets)
    if (set.is_supported()) names.emplace_back(set.name);
  return names;
}

const InstructionSet& instruction_set() {
  if (!selected) select_instruction_set(supported_instruction_sets().front());
  return *selected;
}

void select_instruction_set(const std::string& name) {
  for (const auto& set : kInstructionSets)
    if (name == set.name) {
      MM_CHECK(set.is_supported(), "this CPU cannot run instruction set " << name);
      selected = &set;
      return;
    }
  MM_CHECK(false, "got instruction set " << name << ", wanted one of the supported_instruction_sets()");
}

}  // namespace mm
