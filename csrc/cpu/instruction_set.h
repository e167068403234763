// The builds of the kernels that this machine can run, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "geglu.h"
#include "group_norm_silu.h"
#include "layer_norm.h"
#include "temporal_attention_kernels.h"

namespace mm {

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
  const TemporalAttentionKernels* temporal_attention;
  const GroupNormSiluKernels* group_norm_silu;
  const GegluKernels* geglu;
  const LayerNormKernels* layer_norm;
};

std::vector<std::string> supported_instruction_sets();  // best first
const InstructionSet& instruction_set();                // the best one, unless select_instruction_set chose another
void select_instruction_set(const std::string& name);

}  // namespace mm
