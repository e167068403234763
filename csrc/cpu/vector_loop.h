// A loop over a row of any length, in vectors: whole ones, then at most one that covers the rest.
#pragma once

#include "simd.h"

namespace mm::MM_ISA {

struct WholeVector {
  template <class T>
  MM_INLINE Vec load(const T* p) const {
    return MM_ISA::load(p);
  }
  template <class T>
  MM_INLINE void store(T* p, Vec x) const {
    MM_ISA::store(p, x);
  }
  MM_INLINE Vec keep(Vec x) const { return x; }
};

// The first `count` lanes: the others load as 0 and are not stored.
struct PartVector {
  int count;

  template <class T>
  MM_INLINE Vec load(const T* p) const {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof(T));
    return MM_ISA::load(lanes);
  }
  template <class T>
  MM_INLINE void store(T* p, Vec x) const {
    T lanes[kLanes];
    MM_ISA::store(lanes, x);
    std::memcpy(p, lanes, count * sizeof(T));
  }
  MM_INLINE Vec keep(Vec x) const {
    float lanes[kLanes] = {};
    for (int i = 0; i < count; i++) lanes[i] = x[i];
    return MM_ISA::load(lanes);
  }
};

// run(begin, vector) for each vector of `count` elements, in order.
template <class Run>
MM_INLINE void over_vectors(int64_t count, Run run) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) run(i, WholeVector{});
  if (i < count) run(i, PartVector{static_cast<int>(count - i)});
}

}  // namespace mm::MM_ISA
