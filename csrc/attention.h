// One attention problem as plain numbers and pointers, and the table each instruction set fills in.
//
// The kernels are compiled once per instruction set, so nothing here may carry code: an inline function shared
// between those translation units could be emitted with AVX-512 instructions and then run on a machine without.
#pragma once

#include <stdint.h>

namespace flash_attn_plus {

enum class Dtype { kFloat, kBFloat16, kHalf };

// (batch, seqlen, heads, dim) with a contiguous last dimension; strides in elements.
struct Operand {
  const void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

struct Attention {
  Operand q, k, v;
  void* out;   // (batch, seqlen_q, heads, dim_v), contiguous, of type `dtype`
  float* lse;  // (batch, heads, seqlen_q), contiguous
  Dtype dtype;
  int64_t batch, seqlen_q, seqlen_k, heads, heads_k, dim, dim_v;
  float scale;
  // Query i sees the keys j with i + first <= j <= i + last; both within [-seqlen_q, seqlen_k], so that no sum of
  // them with a row or a key overflows.
  int64_t first, last;
  int64_t threads;  // how many will share the tiles; it sizes the tiles and never changes a result
};

struct Kernel {
  const char* name;
  // Number of independent tiles; tile 0 costs most under a causal mask, so handing them out in order balances.
  int64_t (*tiles)(const Attention&);
  // Bytes of scratch memory that `run` needs, aligned to 64.
  int64_t (*workspace)(const Attention&);
  void (*run)(const Attention&, int64_t tile, float* workspace);
};

extern const Kernel kernel_baseline;
extern const Kernel kernel_avx2;    // x86-64 only: AVX2 and FMA
extern const Kernel kernel_avx512;  // x86-64 only: AVX-512 F, BW, DQ and VL

}  // namespace flash_attn_plus
