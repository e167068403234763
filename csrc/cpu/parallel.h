// Tasks over threads. A task's result may not depend on which thread runs it: the bits are the same for any number.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mm {

// make_state() is called once on each thread; run(state, task) once for each task, in ascending order on each thread.
template <class MakeState, class Run>
void parallel_tasks(int64_t num_tasks, int num_threads, MakeState make_state, Run run) {
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_tasks > 1)
  {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t begin = num_tasks * thread / threads, end = num_tasks * (thread + 1) / threads;
    auto state = make_state();
    for (int64_t task = begin; task < end; task++) run(state, task);
  }
#else
  (void)num_threads;
  auto state = make_state();
  for (int64_t task = 0; task < num_tasks; task++) run(state, task);
#endif
}

}  // namespace mm
