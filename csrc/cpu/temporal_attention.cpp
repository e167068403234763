// Forward and recompute-backward of softmax(q kT * scale) v over frames; one task is one pixel and head.
//
// A tile's frames are gathered once into scratch that stays in the cache; the probabilities live only there, and of few
// enough queries at once (kRowBlock, kScores) that scratch grows with the frames, not with their square.
#include <new>

#include "parallel.h"
#include "simd.h"
#include "temporal_attention_kernels.h"
#include "tile_product.h"

namespace mm::MM_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.69314718055994f;

// Rows whose scores stay in the first-level cache from the product to the softmax to the next product.
constexpr int kRowBlock = 12;
// Scores of one kind that backward keeps at most, where kRowBlock rows of them are not more: 256 KiB, so that those and
// their gradients stay in the second-level cache. Up to 256 frames are one block of queries.
constexpr int64_t kScores = 1 << 16;

// No template of the standard library is used here: the linker could take its AVX-512 copy for every build.
MM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MM_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
MM_INLINE int round_up(int64_t x, int step) { return static_cast<int>((x + step - 1) / step * step); }

// Scratch of one thread: F is rounded up to whole tiles of rows and to whole vectors of columns.
struct Scratch {
  int F, D, columns;
  float *memory, *next;

  // width: floats for each frame.
  Scratch(const TemporalAttention& op, int width)
      : F(static_cast<int>(op.F)), D(static_cast<int>(op.D)), columns(round_up(op.F, kLanes)) {
    int64_t count = int64_t(columns) * width;
    memory = next = static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64}));
    std::memset(memory, 0, count * sizeof(float));  // the padding stays zero
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    fence_streams();  // at the end of a thread's tasks
    ::operator delete(memory, std::align_val_t{64});
  }

  float* take(int width) {
    float* tile = next;
    next += int64_t(columns) * width;
    return tile;
  }
};

// As few blocks of queries as kScores allows, as even as whole row blocks make them.
MM_INLINE int queries_in_block(int64_t F) {
  int64_t columns = round_up(F, kLanes), most = larger(kScores / columns / kRowBlock * kRowBlock, kRowBlock);
  int64_t blocks = (F + most - 1) / most;
  return round_up((F + blocks - 1) / blocks, kRowBlock);
}

// A suffix says a tile's layout: fd frames by head dim, df its transpose, qf a block of queries by keys.
struct ForwardScratch : Scratch {
  float *q_fd = take(D), *k_df = take(D), *v_fd = take(D), *p_qf = take(kRowBlock);
  explicit ForwardScratch(const TemporalAttention& op) : Scratch(op, 3 * int(op.D) + kRowBlock) {}
};
struct BackwardScratch : Scratch {
  const int queries = queries_in_block(F);  // of a block
  float *q_fd = take(D), *k_fd = take(D), *k_df = take(D), *v_fd = take(D), *v_df = take(D), *g_fd = take(D);
  float *p_qf = take(queries), *ds_qf = take(queries);
  float *dk_fd = queries < F ? take(D) : nullptr, *dv_fd = queries < F ? take(D) : nullptr;  // sums over the blocks
  explicit BackwardScratch(const TemporalAttention& op) : Scratch(op, width(op.F, static_cast<int>(op.D))) {}

  static int width(int64_t F, int D) { return 2 * queries_in_block(F) + (queries_in_block(F) < F ? 8 : 6) * D; }
};

template <class T>
struct Frames {
  T* data;
  int64_t stride;

  Frames(const Strided& x, const TemporalAttention& op, int64_t task)
      : data(static_cast<T*>(x.data) + task / (op.P * op.N) * x.b + task / op.N % op.P * x.p + task % op.N * x.n),
        stride(x.f) {}
  T* operator[](int64_t f) const { return data + f * stride; }
};

// A tensor this large leaves the caches before anyone reads it.
constexpr int64_t kStreamedBytes = int64_t(32) << 20;

template <class T>
struct Output : Frames<T> {
  bool is_streamed;

  Output(const Strided& x, const TemporalAttention& op, int64_t task)
      : Frames<T>(x, op, task), is_streamed(is_streamed_by(x, op)) {}

  static bool is_streamed_by(const Strided& x, const TemporalAttention& op) {
    bool is_aligned = reinterpret_cast<uintptr_t>(x.data) % sizeof(Vec) == 0 && (x.b | x.f | x.p | x.n) % kLanes == 0;
    return is_aligned && op.B * op.F * op.P * op.N * op.D * int64_t(sizeof(T)) >= kStreamedBytes;
  }

  MM_INLINE void write(int64_t f, int d, Vec x) const {
    if (is_streamed)
      store_streamed((*this)[f] + d, x);
    else
      store((*this)[f] + d, x);
  }
};

// Brings the next tile's rows, those to be written too, into the cache a few at a time between the products: they are
// far apart, so no hardware prefetcher finds them, and a burst of them would fill the line buffers and stall.
template <class T>
class Prefetch {
 public:
  // advance() will be called `calls_per_tile` times for every kTileRows frames.
  Prefetch(const Frames<T>* tensors, int num_tensors, const Scratch& s, int calls_per_tile)
      : tensors_(tensors),
        num_tensors_(num_tensors),
        num_rows_(num_tensors * s.F),
        rows_a_call_((num_tensors * kTileRows + calls_per_tile - 1) / calls_per_tile),
        row_bytes_(s.D * int(sizeof(T))) {}

  MM_INLINE void advance() {
    const int bytes = row_bytes_, end = static_cast<int>(smaller(next_ + rows_a_call_, num_rows_));
    for (int i = next_; i < end; i++) {
      const char* row = reinterpret_cast<const char*>(tensors_[i % num_tensors_][i / num_tensors_]);
      for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
    next_ = end;
  }

 private:
  const Frames<T>* tensors_;
  int num_tensors_, num_rows_, rows_a_call_, row_bytes_, next_ = 0;
};

template <class T>
MM_INLINE void gather(const Frames<T>& x, const Scratch& s, float factor, float* to) {
  const int F = s.F, D = s.D;
  const T* from = x[0];
  for (int f = 0; f < F; f++, from += x.stride, to += D)
    for (int d = 0; d < D; d += kLanes) store(to + d, load(from + d) * factor);
}

// to_t (D, columns); a copy in rows as well where `to` is given.
template <class T>
MM_INLINE void gather_transposed(const Frames<T>& x, const Scratch& s, float* to_t, float* to) {
  for (int f = 0; f < s.F; f += kLanes)
    for (int d = 0; d < s.D; d += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        block[i] = f + i < s.F ? load(x[f + i] + d) : Vec{};
        if (to && f + i < s.F) store(to + (f + i) * s.D + d, block[i]);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) store(to_t + (d + i) * s.columns + f, block[i]);
    }
}

// p holds base-2 logits of one row and becomes exp2(p - max); returns 1 / sum. Columns past F become 0.
MM_INLINE float softmax_row(float* p, const Scratch& s) {
  constexpr float kInfinity = __builtin_inff();
  for (int j = s.F; j < s.columns; j++) p[j] = -kInfinity;
  Vec largest = load(p);
  for (int j = kLanes; j < s.columns; j += kLanes) largest = maximum(largest, load(p + j));
  Vec shift = splat(max_lanes(largest)), sum = {};
  for (int j = 0; j < s.columns; j += kLanes) {
    Vec e = exp2_nonpositive(load(p + j) - shift);
    store(p + j, e);
    sum += e;
  }
  return 1.0f / sum_lanes(sum);
}

template <class T>
void forward_tile(float scale, ForwardScratch& s, const Frames<T> (&in)[3], const Frames<T> (&ahead)[4],
                  const Output<T>& o) {
  gather(in[0], s, scale * kLog2E, s.q_fd);
  gather_transposed(in[1], s, s.k_df, nullptr);
  gather(in[2], s, 1.0f, s.v_fd);
  Prefetch<T> prefetch(ahead, o.is_streamed ? 3 : 4, s, 2);
  const int F = s.F, D = s.D, ld = s.columns;
  for (int begin = 0; begin < F; begin += kRowBlock) {
    int end = smaller(begin + kRowBlock, F);
    for (int i = begin; i < end; i += kTileRows) {
      prefetch.advance();
      float* p = s.p_qf + (i - begin) * ld;
      multiply(s.q_fd + i * D, D, 1, s.k_df, ld, D, ld / kLanes,
               [&](int r, int j, Vec x) { store(p + r * ld + j * kLanes, x); });
    }
    float inverse[kRowBlock] = {};
    for (int i = begin; i < end; i++) inverse[i - begin] = softmax_row(s.p_qf + (i - begin) * ld, s);
    for (int i = begin; i < end; i += kTileRows) {
      prefetch.advance();
      multiply(s.p_qf + (i - begin) * ld, ld, 1, s.v_fd, D, F, D / kLanes, [&](int r, int j, Vec x) {
        if (i + r < F) o.write(i + r, j * kLanes, x * inverse[i + r - begin]);
      });
    }
  }
}

// p becomes the probabilities of one row, ds (in: dp) the gradient of its logits p (dp - sum(p dp)).
MM_INLINE void softmax_backward_row(float* p, float* ds, const Scratch& s) {
  Vec inverse = splat(softmax_row(p, s)), dot = {};
  for (int j = 0; j < s.columns; j += kLanes) {
    Vec probability = load(p + j) * inverse;
    store(p + j, probability);
    dot += probability * load(ds + j);
  }
  Vec delta = splat(sum_lanes(dot));
  for (int j = 0; j < s.columns; j += kLanes) store(ds + j, load(p + j) * (load(ds + j) - delta));
}

// dq of the queries from `first` to `last`, and o of them where it is given; leaves their p and ds in scratch.
template <class T>
MM_INLINE void query_gradients(float scale, BackwardScratch& s, int first, int last, Prefetch<T>& prefetch,
                               const Output<T>& dq, const Output<T>* o) {
  const int F = s.F, D = s.D, ld = s.columns;
  for (int begin = first; begin < last; begin += kRowBlock) {
    int end = smaller(begin + kRowBlock, last);
    for (int i = begin; i < end; i += kTileRows) {
      float *p = s.p_qf + (i - first) * ld, *ds = s.ds_qf + (i - first) * ld;
      prefetch.advance();
      multiply(s.q_fd + i * D, D, 1, s.k_df, ld, D, ld / kLanes,
               [&](int r, int j, Vec x) { store(p + r * ld + j * kLanes, x); });
      prefetch.advance();
      multiply(s.g_fd + i * D, D, 1, s.v_df, ld, D, ld / kLanes,
               [&](int r, int j, Vec x) { store(ds + r * ld + j * kLanes, x); });
    }
    for (int i = begin - first; i < end - first; i++) softmax_backward_row(s.p_qf + i * ld, s.ds_qf + i * ld, s);
    for (int i = begin; i < end; i += kTileRows) {
      prefetch.advance();
      multiply(s.ds_qf + (i - first) * ld, ld, 1, s.k_fd, D, F, D / kLanes, [&](int r, int j, Vec x) {
        if (i + r < F) dq.write(i + r, j * kLanes, x * scale);
      });
    }
    for (int i = begin; o && i < end; i += kTileRows)
      multiply(s.p_qf + (i - first) * ld, ld, 1, s.v_fd, D, F, D / kLanes, [&](int r, int j, Vec x) {
        if (i + r < F) o->write(i + r, j * kLanes, x);
      });
  }
}

// Of the queries from `first` to `last`, what they give to dk and dv of every frame.
template <class T, class OutK, class OutV>
MM_INLINE void key_gradients(const BackwardScratch& s, int first, int last, Prefetch<T>& prefetch, OutK dk, OutV dv) {
  const int F = s.F, D = s.D, ld = s.columns;
  for (int i = 0; i < F; i += kTileRows) {
    prefetch.advance();
    multiply(s.ds_qf + i, 1, ld, s.q_fd + first * D, D, last - first, D / kLanes, [&](int r, int j, Vec x) {
      if (i + r < F) dk(i + r, j * kLanes, x);  // q_fd carries scale * log2(e)
    });
    prefetch.advance();
    multiply(s.p_qf + i, 1, ld, s.g_fd + first * D, D, last - first, D / kLanes, [&](int r, int j, Vec x) {
      if (i + r < F) dv(i + r, j * kLanes, x);
    });
  }
}

template <class T>
void backward_tile(float scale, BackwardScratch& s, const Frames<T> (&in)[4], const Frames<T> (&ahead)[7],
                   const Output<T> (&out)[3], const Output<T>* o) {
  gather(in[0], s, scale * kLog2E, s.q_fd);
  gather_transposed(in[1], s, s.k_df, s.k_fd);
  gather_transposed(in[2], s, s.v_df, o ? s.v_fd : nullptr);
  gather(in[3], s, 1.0f, s.g_fd);
  Prefetch<T> prefetch(ahead, out[0].is_streamed ? 4 : 7, s, 5);
  const int F = s.F, D = s.D;
  for (int first = 0; first < F; first += s.queries) {
    const int last = smaller(first + s.queries, F);
    query_gradients(scale, s, first, last, prefetch, out[0], o);
    if (s.queries >= F) {
      key_gradients(
          s, first, last, prefetch, [&](int f, int d, Vec x) { out[1].write(f, d, x * kLn2); },
          [&](int f, int d, Vec x) { out[2].write(f, d, x); });
      continue;
    }
    // Of several blocks dk and dv are sums, in their order, that the last one writes.
    auto add = [&](const Output<T>& to, float* sums, int f, int d, Vec x, float factor) {
      if (first) x += load(sums + f * D + d);
      if (last == F)
        to.write(f, d, x * factor);
      else
        store(sums + f * D + d, x);
    };
    key_gradients(
        s, first, last, prefetch, [&](int f, int d, Vec x) { add(out[1], s.dk_fd, f, d, x, kLn2); },
        [&](int f, int d, Vec x) { add(out[2], s.dv_fd, f, d, x, 1.0f); });
  }
}

template <class T>
void run_forward(const TemporalAttention& op, Strided q, Strided k, Strided v, Strided o) {
  int64_t tasks = op.B * op.P * op.N;
  parallel_tasks(
      tasks, op.num_threads, [&] { return ForwardScratch(op); },
      [&](ForwardScratch& scratch, int64_t task) {
        int64_t next = smaller(task + 1, tasks - 1);
        forward_tile<T>(op.scale, scratch, {{q, op, task}, {k, op, task}, {v, op, task}},
                        {{q, op, next}, {k, op, next}, {v, op, next}, {o, op, next}}, {o, op, task});
      });
}

template <class T>
void run_backward(const TemporalAttention& op, Strided q, Strided k, Strided v, Strided grad_o, Strided dq, Strided dk,
                  Strided dv, Strided o) {
  int64_t tasks = op.B * op.P * op.N;
  parallel_tasks(
      tasks, op.num_threads, [&] { return BackwardScratch(op); },
      [&](BackwardScratch& scratch, int64_t task) {
        int64_t next = smaller(task + 1, tasks - 1);
        Output<T> output(o, op, task);
        backward_tile<T>(op.scale, scratch, {{q, op, task}, {k, op, task}, {v, op, task}, {grad_o, op, task}},
                         {{q, op, next},
                          {k, op, next},
                          {v, op, next},
                          {grad_o, op, next},
                          {dq, op, next},
                          {dk, op, next},
                          {dv, op, next}},
                         {{dq, op, task}, {dk, op, task}, {dv, op, task}}, o.data ? &output : nullptr);
      });
}

// Calls function(T{}) with the storage type of `dtype`.
template <class Function>
void with_type(DataType dtype, Function function) {
  switch (dtype) {
    case DataType::kFloat32: return function(float{});
    case DataType::kBFloat16: return function(BFloat16{});
    case DataType::kFloat16: return function(Float16{});
  }
}

}  // namespace

extern const TemporalAttentionKernels kTemporalAttention = {
    [](const TemporalAttention& op, Strided q, Strided k, Strided v, Strided o) {
      with_type(op.dtype, [&](auto type) { run_forward<decltype(type)>(op, q, k, v, o); });
    },
    [](const TemporalAttention& op, Strided q, Strided k, Strided v, Strided grad_o, Strided dq, Strided dk, Strided dv,
       Strided o) {
      with_type(op.dtype, [&](auto type) { run_backward<decltype(type)>(op, q, k, v, grad_o, dq, dk, dv, o); });
    },
};

}  // namespace mm::MM_ISA
