// C functions of quantised linear layers; as in interface.cpp, shapes are checked in Python.
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "export.h"
#include "gated.h"
#include "product.h"
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

}  // namespace
}  // namespace headgate

using namespace headgate;

HG_API int32_t hg_linear(const float* x, int64_t rows, int64_t inner, int64_t x_stride,
                         const void* weight, int32_t product, int64_t columns, const float* bias,
                         float* y, int64_t y_stride, const float* norm, float eps,
                         const float* residual, int64_t residual_stride, float* total,
                         int32_t activation);

constexpr int32_t kNoActivation = -1;

HG_API int32_t hg_quantised_block(int32_t kind) { return block_size(kind); }

HG_API int64_t hg_quantised_bytes(int64_t columns, int64_t inner, int32_t kind) {
  return divide_up(columns, kPanel) * panel_bytes(inner, kind);
}

// weight[columns, inner] in `dtype`, quantised to the blocks that hg_linear_quantised reads.
HG_API void hg_quantise_weight(const void* weight, int32_t dtype, int64_t columns, int64_t inner,
                               int32_t kind, void* packed) {
  const QuantiseWeightJob job = {weight, static_cast<char*>(packed), columns, inner, dtype, kind};
  run(quantised_kernels().quantise_weight, job, divide_up(columns, kPanel), columns * inner);
}

namespace {

// What products with weights of a kind take: the format of their inputs, and the tallest row tile.
struct Chosen {
  int32_t format;
  int tallest;
};
Chosen choose_product(int32_t kind) {
  const QuantisedKernels& kernels = quantised_kernels();
  if (kind == kInt8WeightOnly) return {kFloats, kernels.widened_rows};
  return {kind == kInt8 ? kernels.int8_inputs : int32_t(kInt4Inputs), kernels.tile_rows};
}

// Nanoseconds of a product, roughly: the weights are to be read from memory, and the products to be computed.
int64_t product_cost(int64_t rows, int64_t inner, int64_t columns, int32_t kind) {
  return columns * inner / 32 + rows * columns * inner / (kind == kInt8WeightOnly ? 64 : 256);
}

}  // namespace

// As hg_linear.
HG_API int32_t hg_linear_quantised(const float* x, int64_t rows, int64_t inner, int64_t x_stride,
                                   const void* weight, int32_t kind, int64_t columns,
                                   const float* bias, float* y, int64_t y_stride, const float* norm,
                                   float eps, const float* residual, int64_t residual_stride,
                                   float* total, int32_t activation) {
  if (rows == 0) return 0;
  const RowSource source = {x, x_stride, norm, residual, residual_stride, total, eps, activation, inner};
  const Chosen chosen = choose_product(kind);
  const int32_t row_tiles = row_tiles_of(rows, chosen.tallest);
  const bool ready = is_ready(source, rows, chosen.format);
  InputRowsJob inputs = {source, nullptr, rows, inner, row_tiles, chosen.format, 1};
  if (!ready && !(inputs.out = input_memory(rows * input_row_bytes(inner, chosen.format)))) return -1;
  const QuantisedLinearJob job = {ready ? reinterpret_cast<const char*>(x) : inputs.out,
                                  static_cast<const char*>(weight), bias, y, rows, inner, columns, y_stride, kind,
                                  row_tiles};
  share_and_run(ready ? nullptr : &inputs, quantised_kernels().linear, job,
                product_cost(rows, inner, columns, kind));
  return 0;
}

// As hg_gated_mlp.
HG_API int32_t hg_gated_mlp_quantised(const float* x, int64_t rows, int64_t inner, int64_t x_stride, const float* norm,
                                      float eps, const float* residual, int64_t residual_stride, float* total,
                                      const void* gate_up, int32_t kind, int64_t middle, const float* gate_up_bias,
                                      int32_t activation, const void* down, int64_t columns, const float* bias,
                                      float* y, int64_t y_stride) {
  if (rows == 0) return 0;
  const Chosen chosen = choose_product(kind);
  const int32_t row_tiles = row_tiles_of(rows, chosen.tallest);
  const RowSource source = {x, x_stride, norm, residual, residual_stride, total, eps, kNoActivation, 0};
  GatedInputs inputs;
  if (!inputs.take(source, activation, rows, inner, middle, row_tiles, chosen.format)) return -1;
  const TileFunction product = quantised_kernels().linear;
  const QuantisedLinearJob first = {inputs.first.out, static_cast<const char*>(gate_up), gate_up_bias, nullptr, rows,
                                    inner, middle, 0, kind, row_tiles};
  run_gated(inputs, first, hg_quantised_bytes(middle, inner, kind), product,
            product_cost(rows, inner, 2 * middle, kind));
  const QuantisedLinearJob second = {inputs.second.out, static_cast<const char*>(down), bias, y, rows, middle, columns,
                                     y_stride, kind, row_tiles};
  share_and_run(nullptr, product, second, product_cost(rows, middle, columns, kind));
  return 0;
}

// Whether products with bytes are faster here than those with floats: where four are one instruction, or
// vectors of floats are as wide as AVX2's.
HG_API int32_t hg_multiplies_bytes() {
  const char* name = quantised_kernels().name;
  return !strcmp(name, "neon") || (strcmp(name, "generic") && !strcmp(name, active_kernels().name));
}

// Floats that hg_column_lengths writes.
HG_API int64_t hg_column_lengths_size(int64_t columns) {
  return 2 * (columns + divide_up(columns, kPanel));
}

// Of bfloat16 weights [columns, inner], and of what is wrong with `packed`, which hg_quantise_weight
// made of them as int8: lengths of the columns, norms then errors, and the same of panels.
HG_API void hg_column_lengths(const void* table, int64_t columns, int64_t inner, const void* packed,
                              float* lengths) {
  float* panels = lengths + 2 * columns;
  const ColumnLengthsJob job = {static_cast<const uint16_t*>(table), static_cast<const char*>(packed),
                                lengths, lengths + columns, panels,
                                panels + divide_up(columns, kPanel), columns, inner};
  run(quantised_kernels().column_lengths, job, divide_up(columns, kPanel), columns * inner);
}

// hg_linear of x and bfloat16 weights; or with `largest` roughly that, by `packed`, which
// hg_quantise_weight made of the weights' `table`, and known[rows, ranks]: the exact product of the
// column that is likely to have the row's largest at this rank's place, zeros at others'.
HG_API int32_t hg_linear_likely(const float* x, int64_t rows, int64_t inner, int64_t x_stride,
                                const void* weight, int32_t product, int64_t columns, float* y,
                                int64_t y_stride, int32_t largest, const void* table,
                                const void* packed, float* known, int32_t rank, int32_t ranks) {
  if (!largest)
    return hg_linear(x, rows, inner, x_stride, weight, product, columns, nullptr, y, y_stride, nullptr,
                     0.0f, nullptr, 0, nullptr, kNoActivation);
  if (rows == 0) return 0;
  const int32_t status = hg_linear_quantised(x, rows, inner, x_stride, packed, kInt8, columns, nullptr,
                                             y, y_stride, nullptr, 0.0f, nullptr, 0, nullptr,
                                             kNoActivation);
  if (status) return status;
  const ShortlistJob job = {x, static_cast<const uint16_t*>(table), nullptr, nullptr, nullptr, nullptr,
                            y, known, x_stride, y_stride, columns, inner, rank, ranks,
                            product == kRounded};
  run(quantised_kernels().likeliest, job, rows, rows * columns / 8);
  return 0;
}

// After hg_linear_likely and the sum of all ranks' `known`: with `largest` the largest value of each row
// of all ranks' y, and the first place where it is, become those of exact products, while the others
// are smaller. `lengths`: as hg_column_lengths has them.
HG_API void hg_linear_largest(const float* x, int64_t rows, int64_t inner, int64_t x_stride,
                              int32_t product, int64_t columns, float* y, int64_t y_stride,
                              int32_t largest, const void* table, const float* lengths,
                              float* known, int32_t ranks) {
  if (!largest || rows == 0) return;
  const float* panels = lengths + 2 * columns;
  const ShortlistJob job = {x, static_cast<const uint16_t*>(table), lengths, lengths + columns,
                            panels, panels + divide_up(columns, kPanel), y, known, x_stride, y_stride,
                            columns, inner, 0, ranks, product == kRounded};
  run(quantised_kernels().shortlist, job, rows, rows * columns / 4);
}
