// Quantised linear layers for one instruction set. Built once per set; HG_TABLE names its table.
#include "linear_int8.h"
#include "linear_weight_only.h"
#include "quantise_weight.h"
#include "shortlist.h"

namespace {

// Tile: a run of panels for one group of row tiles.
void quantised_linear_tile(const void* data, int64_t tile) {
  const QuantisedLinearJob& job = *(const QuantisedLinearJob*)data;
  const int64_t panels = (job.columns + kPanel - 1) / kPanel;
  const int64_t panel_tile = tile % job.panel_tiles, first = panel_tile * job.panels_per_tile;
  const int64_t last = first + job.panels_per_tile < panels ? first + job.panels_per_tile : panels;
  const RowRange tiles = row_range(job.row_tiles, job.row_groups, tile / job.panel_tiles);
  const int64_t later = (panel_tile + job.sharing) * job.panels_per_tile;
  if (job.kind == kInt4) multiply_panels<kInt4>(job, first, last, later, tiles);
  else if (job.kind == kInt8) multiply_panels<kInt8>(job, first, last, later, tiles);
  else multiply_widened_panels(job, first, last, later, tiles);
}

}  // namespace

namespace headgate {

#define HG_TEXT_OF(x) #x
#define HG_TEXT(x) HG_TEXT_OF(x)

extern const QuantisedKernels HG_TABLE = {
    HG_TEXT(HG_NAME), kQuantisedRows, kWeightOnlyRows, kInt8Format,
    quantise_weight_tile, quantised_linear_tile, likeliest_tile, shortlist_tile, column_lengths_tile,
};

}  // namespace headgate
