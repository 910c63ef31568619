// The two products of a gated MLP: of activation(gate) * up and the second one's weights, where [gate, up] is the
// first one.
//
// Whoever multiplied a few columns of gate and of up makes inputs of the second product of them while they are in a
// cache: they never go to memory by themselves, nor to another core. The bits are those of the two products one after
// the other.
#pragma once

#include "product.h"
#include "quantised.h"

namespace headgate {

// Rows of a thread whose columns of gate and up wait to become inputs together. More of them would read weights from
// the second-level cache less often, and take more of it.
constexpr int64_t kWaitingRows = 160;

// Panels of gate, and of up, in the columns that become inputs together.
constexpr int64_t kGatedPanels = kInputColumns / kPanel;

// The inputs of both products.
struct GatedInputs {
  InputRowsJob first, second;

  // Of `source` and of `middle` columns of gate; false where there is no memory.
  bool take(const RowSource& source, int32_t activation, int64_t rows, int64_t inner, int64_t middle,
            int32_t row_tiles, int32_t format) {
    const RowSource waiting = {nullptr, 2 * kInputColumns, nullptr, nullptr, 0, nullptr, 0.0f, activation,
                               kInputColumns};
    first = {source, input_memory(rows * input_row_bytes(inner, format)), rows, inner, row_tiles, format, 1};
    second = {waiting, gated_memory(rows * input_row_bytes(middle, format)), rows, middle, row_tiles, format,
              middle / kInputColumns};
    return first.out && second.out;
  }
};

// Job: LinearJob or QuantisedLinearJob.
template <class Job>
struct GatedJob {
  Job gate, up;             // the halves of the first product, each with its weights
  TileFunction product;
  InputRowsJob next;        // the second product's inputs
  ProductTiles tiles;       // in blocks of kInputColumns
};

// A block of columns: of gate and up, which wait at `waiting`, to inputs. In parts of the rows of a group.
template <class Job>
void gate_block(const GatedJob<Job>& gated, int64_t group, int64_t parts, int64_t block, float* waiting) {
  Job gate = gated.gate, up = gated.up;
  InputRowsJob next = gated.next;
  gate.row_groups = up.row_groups = int32_t(gate.row_groups * parts);
  for (int64_t part = group * parts; part < (group + 1) * parts; ++part) {
    const RowRange tiles = row_range(gate.row_tiles, gate.row_groups, part);
    if (tiles.first == tiles.last) continue;
    const int64_t first = row_range(gate.rows, gate.row_tiles, tiles.first).first;
    // Where the first column of the first of all rows would be.
    gate.y = waiting - first * gate.y_stride - block * kInputColumns;
    up.y = gate.y + kInputColumns;
    next.source.x = gate.y;
    gated.product(&gate, part * gate.panel_tiles + block);
    gated.product(&up, part * up.panel_tiles + block);
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile)
      active_kernels().input_rows(&next, tile * next.parts + block);
  }
}

// Tile: some blocks of columns for one group of row tiles.
template <class Job>
void gated_tile(const void* data, int64_t tile) {
  const GatedJob<Job>& gated = *static_cast<const GatedJob<Job>*>(data);
  const int64_t group = tile / gated.tiles.panel_tiles, blocks = gated.gate.panel_tiles;
  const int64_t first = tile % gated.tiles.panel_tiles * gated.tiles.panels_per_tile;
  const int64_t last = first + gated.tiles.panels_per_tile < blocks ? first + gated.tiles.panels_per_tile : blocks;
  const RowRange tiles = row_range(gated.gate.row_tiles, gated.gate.row_groups, group);
  // A part has at most one row tile more than its share.
  const int64_t parts = divide_up((tiles.last - tiles.first) * kMaxTileRows, kWaitingRows - kMaxTileRows);
  float waiting[kWaitingRows][2 * kInputColumns] __attribute__((aligned(64)));
  for (int64_t block = first; block < last; ++block) gate_block(gated, group, parts, block, waiting[0]);
}

// Runs the first product, of which `gate` is the half that makes the gate of `inputs.first`; weights of up are so many
// bytes behind. Leaves the second one's inputs.
template <class Job>
void run_gated(const GatedInputs& inputs, Job gate, int64_t half_bytes, TileFunction product, int64_t cost) {
  const int64_t blocks = gate.columns / kInputColumns;
  const ProductTiles tiles = share_product(gate.rows, blocks * kPanel, gate.row_tiles);
  gate.y_stride = 2 * kInputColumns;
  gate.row_groups = tiles.row_groups;
  gate.panel_tiles = blocks;
  gate.panels_per_tile = kGatedPanels;
  gate.sharing = 1;  // the next block is the thread's own
  Job up = gate;
  up.weight = static_cast<const char*>(gate.weight) + half_bytes;
  if (gate.bias) up.bias = gate.bias + gate.columns;
  const GatedJob<Job> gated = {gate, up, product, inputs.second, tiles};
  run_product(&inputs.first, gated_tile<Job>, &gated, tiles, cost);
}

}  // namespace headgate
