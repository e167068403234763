// The CPU kernels of temporal attention.
#pragma once

#include "../temporal_attention.h"

namespace mm {

// One build of the kernels for an instruction set.
struct TemporalAttentionKernels {
  void (*forward)(const TemporalAttention&, Strided q, Strided k, Strided v, Strided o);
  // o is written as well where its data is not null: the probabilities for it are there anyway.
  void (*backward)(const TemporalAttention&, Strided q, Strided k, Strided v, Strided grad_o, Strided dq, Strided dk,
                   Strided dv, Strided o);
};

}  // namespace mm
