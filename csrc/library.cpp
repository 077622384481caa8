// flash_attn_plus::_cpu_forward on the libtorch stable ABI: argument checks, outputs, threads.
//
// The schema is defined in Python (schemas.py); this library only adds the CPU kernel, so that a library built for
// another version of the schema fails to load instead of being called wrongly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "attention.h"

namespace flash_attn_plus {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool runs(const Kernel& kernel) {
#if defined(FAP_X86_64)
  __builtin_cpu_init();
  if (&kernel == &kernel_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (&kernel == &kernel_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernel == &kernel_baseline;
}

constexpr const Kernel* kFastestFirst[] = {
#if defined(FAP_X86_64)
    &kernel_avx512,
    &kernel_avx2,
#endif
    &kernel_baseline,
};

// The fastest kernel that runs here, or the one called `name`; null when that one does not exist or does not run.
const Kernel* find_kernel(const char* name) {
  for (const Kernel* kernel : kFastestFirst) {
    if ((!name || !std::strcmp(name, kernel->name)) && runs(*kernel)) return kernel;
  }
  return nullptr;
}

std::atomic<const Kernel*>& selected_kernel() {
  static std::atomic<const Kernel*> kernel{find_kernel(nullptr)};
  return kernel;
}

Operand operand(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

void check_operand(const Tensor& t, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions (batch, seqlen, heads, dim), got ", t.dim());
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  STD_TORCH_CHECK(t.size(3) >= 1 && t.size(3) <= 512, name, ": expected 1 <= dim <= 512, got ", t.size(3));
  STD_TORCH_CHECK(
      t.stride(3) == 1 || t.size(3) == 1, name, ": expected a contiguous last dimension, got stride ", t.stride(3));
}

std::tuple<Tensor, Tensor> cpu_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, int64_t left, int64_t right,
    int64_t diagonal) {
  check_operand(q, "q", q);
  check_operand(k, "k", q);
  check_operand(v, "v", q);
  Attention a;
  a.batch = q.size(0), a.seqlen_q = q.size(1), a.heads = q.size(2), a.dim = q.size(3);
  a.seqlen_k = k.size(1), a.heads_k = k.size(2), a.dim_v = v.size(3);
  STD_TORCH_CHECK(k.size(0) == a.batch, "k: expected batch ", a.batch, ", got ", k.size(0));
  STD_TORCH_CHECK(v.size(0) == a.batch, "v: expected batch ", a.batch, ", got ", v.size(0));
  STD_TORCH_CHECK(v.size(1) == a.seqlen_k, "v: expected seqlen ", a.seqlen_k, " as k, got ", v.size(1));
  STD_TORCH_CHECK(v.size(2) == a.heads_k, "v: expected ", a.heads_k, " heads as k, got ", v.size(2));
  STD_TORCH_CHECK(k.size(3) == a.dim, "k: expected dim ", a.dim, " as q, got ", k.size(3));
  STD_TORCH_CHECK(
      a.heads_k > 0 ? a.heads % a.heads_k == 0 : a.heads == 0, "q: expected a multiple of ", a.heads_k,
      " heads (those of k), got ", a.heads);
  switch (q.scalar_type()) {
    case ScalarType::Float: a.dtype = Dtype::kFloat; break;
    case ScalarType::BFloat16: a.dtype = Dtype::kBFloat16; break;
    case ScalarType::Half: a.dtype = Dtype::kHalf; break;
    default: STD_TORCH_CHECK(false, "q: expected float32, bfloat16 or float16");
  }

  a.scale = static_cast<float>(softmax_scale);
  // Anything past the corners of the score matrix means the same as the corner; far values must not overflow.
  constexpr int64_t kFar = int64_t{1} << 60;
  diagonal = std::clamp(diagonal, -kFar, kFar);
  const int64_t first = left < 0 ? -a.seqlen_q : diagonal - std::min(left, kFar);
  const int64_t last = right < 0 ? a.seqlen_k : diagonal + std::min(right, kFar);
  a.first = std::clamp(first, -a.seqlen_q, a.seqlen_k);
  a.last = std::clamp(last, -a.seqlen_q, a.seqlen_k);

  const int64_t out_size[] = {a.batch, a.seqlen_q, a.heads, a.dim_v};
  const int64_t lse_size[] = {a.batch, a.heads, a.seqlen_q};
  Tensor out = torch::stable::new_empty(q, {out_size, 4});
  Tensor lse = torch::stable::new_empty(q, {lse_size, 3}, std::make_optional(ScalarType::Float));
  if (a.batch == 0 || a.seqlen_q == 0 || a.heads == 0) return {out, lse};
  a.q = operand(q), a.k = operand(k), a.v = operand(v);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());

  a.threads = torch::stable::get_num_threads();
  const Kernel& kernel = *selected_kernel().load(std::memory_order_relaxed);
  const int64_t tiles = kernel.tiles(a);
  const size_t bytes = (static_cast<size_t>(kernel.workspace(a)) + 63) / 64 * 64;
  const int64_t workers = std::min(tiles, a.threads);
  // Tiles differ in cost, so each worker takes the next one when it is done; a tile's result does not depend on who
  // computes it.
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    for (int64_t tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      kernel.run(a, tile, static_cast<float*>(scratch.get()));
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "_cpu_forward: could not allocate ", bytes, " bytes of scratch memory per thread");
  return {out, lse};
}

}  // namespace
}  // namespace flash_attn_plus

STABLE_TORCH_LIBRARY_IMPL(flash_attn_plus, CPU, m) {
  m.impl("_cpu_forward", TORCH_BOX(&flash_attn_plus::cpu_forward));
}

// For tests and diagnostics, through ctypes: selects the kernel called `name` (null: the fastest, "": no change) and
// returns the name of the one in use, or null when there is no such kernel or this machine cannot run it.
extern "C" __attribute__((visibility("default"))) const char* flash_attn_plus_select_kernel(const char* name) {
  auto& selected = flash_attn_plus::selected_kernel();
  if (!name || *name) {
    const flash_attn_plus::Kernel* kernel = flash_attn_plus::find_kernel(name);
    if (!kernel) return nullptr;
    selected = kernel;
  }
  return selected.load()->name;
}
