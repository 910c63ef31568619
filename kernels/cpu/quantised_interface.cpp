// C functions of quantised linear layers; as in interface.cpp, shapes are checked in Python.
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "dispatch.h"
#include "quantised.h"

namespace headgate {
namespace {

const QuantisedKernels& quantised_kernels() {
#if defined(__x86_64__)
  const char* name = active_kernels().name;
  // Machines with AVX-512 but without VNNI multiply bytes as AVX2 does.
  if (!strcmp(name, "avx512") && __builtin_cpu_supports("avx512vnni")) return quantised_avx512;
  if (strcmp(name, "generic")) return quantised_avx2;
#elif defined(__aarch64__) && defined(__linux__)
  static const bool dot_product = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  if (dot_product) return quantised_neon;
#endif
  return quantised_generic;
}

// Memory of the calling thread for a call's quantised inputs; it grows and stays.
char* input_memory(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    const int64_t wanted = divide_up(bytes, 4096) * 4096;
    memory.reset(static_cast<char*>(aligned_alloc(64, size_t(wanted))));
    size = memory ? wanted : 0;
  }
  return memory.get();
}

// The inputs as the products take them: row tiles of bytes with their scales, or of floats.
const char* prepare_inputs(const float* x, int64_t rows, int64_t inner, int64_t x_stride,
                           int32_t kind, int32_t row_tiles) {
  const bool widen = kind == kInt8WeightOnly;
  if (widen && rows == 1) return reinterpret_cast<const char*>(x);
  const int64_t row_bytes =
      widen ? inner * int64_t(sizeof(float)) : group_count(inner, kind) * row_group_bytes(kind);
  char* memory = input_memory(rows * row_bytes);
  if (!memory) return nullptr;
  if (widen) {
    const PackRowsJob pack = {x,        reinterpret_cast<float*>(memory), rows, inner, x_stride,
                              row_tiles, kFloat32};
    run(active_kernels().pack_rows, pack, row_tiles, rows * inner / 8);
  } else {
    const QuantiseRowsJob quantise = {x, memory, rows, inner, x_stride, row_tiles, kind};
    run(quantised_kernels().quantise_rows, quantise, row_tiles, rows * inner / 4);
  }
  return memory;
}

}  // namespace
}  // namespace headgate

using namespace headgate;

#define HG_API extern "C" __attribute__((visibility("default")))

HG_API int32_t hg_quantised_group(int32_t kind) { return group_size(kind); }

HG_API int64_t hg_quantised_bytes(int64_t columns, int64_t inner, int32_t kind) {
  return divide_up(columns, kPanel) * group_count(inner, kind) * block_bytes(kind);
}

// weight[columns, inner] in `dtype`, quantised to the blocks that hg_linear_quantised reads.
HG_API void hg_quantise_weight(const void* weight, int32_t dtype, int64_t columns, int64_t inner,
                               int32_t kind, void* packed) {
  const QuantiseWeightJob job = {weight, static_cast<char*>(packed), columns, inner, dtype, kind};
  run(quantised_kernels().quantise_weight, job, divide_up(columns, kPanel), columns * inner);
}

HG_API int32_t hg_linear_quantised(const float* x, int64_t rows, int64_t inner, int64_t x_stride,
                                   const void* weight, int32_t kind, int64_t columns,
                                   const float* bias, float* y, int64_t y_stride) {
  if (rows == 0 || columns == 0) return 0;
  const QuantisedKernels& kernels = quantised_kernels();
  const bool widen = kind == kInt8WeightOnly;
  const int32_t row_tiles =
      int32_t(divide_up(rows, widen ? kernels.widened_rows : kernels.tile_rows));
  const char* inputs = prepare_inputs(x, rows, inner, x_stride, kind, row_tiles);
  if (!inputs) return -1;
  const ProductTiles tiles = share_product(columns, row_tiles);
  const QuantisedLinearJob job = {inputs, static_cast<const char*>(weight), bias, y, rows, inner,
                                  columns, y_stride, tiles.panels_per_tile, row_tiles,
                                  tiles.row_groups, kind};
  // The weights are to be read from memory, and the products to be computed.
  const int64_t cost = columns * inner / 32 + rows * columns * inner / (widen ? 64 : 256);
  run(kernels.linear, job, tiles.count, cost);
  return 0;
}
