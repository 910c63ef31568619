// Products run in one job of the thread pool: their inputs are laid out first, then multiplied.
#pragma once

#include "dispatch.h"

namespace headgate {

// Whether a product can read x itself, one row of floats.
bool is_ready(const RowSource& source, int64_t rows, int32_t format);

// Memory of the calling thread for a product's inputs; it grows and stays. Null where there is none.
char* input_memory(int64_t bytes);
// The same for inputs that a product leaves for the next one.
char* gated_memory(int64_t bytes);

// Lays out the inputs, unless `inputs` is null, and runs the product's tiles; `cost` of the product is
// in nanoseconds, roughly.
void run_product(const InputRowsJob* inputs, TileFunction product, const void* job,
                 const ProductTiles& tiles, int64_t cost);

// The same of a LinearJob or QuantisedLinearJob that does not say yet how it is shared out.
template <class Job>
void share_and_run(const InputRowsJob* inputs, TileFunction product, Job job, int64_t cost) {
  const ProductTiles tiles = share_product(job.rows, job.columns, job.row_tiles);
  job.row_groups = tiles.row_groups;
  job.sharing = tiles.sharing;
  job.panel_tiles = tiles.panel_tiles;
  job.panels_per_tile = tiles.panels_per_tile;
  run_product(inputs, product, &job, tiles, cost);
}

}  // namespace headgate
