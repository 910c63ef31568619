// The kernels of one instruction set. Built once per set; HG_TABLE names the table it defines.
#include "attention.h"
#include "elementwise.h"
#include "input_rows.h"
#include "linear.h"
#include "sampling.h"

namespace headgate {

#define HG_TEXT_OF(x) #x
#define HG_TEXT(x) HG_TEXT_OF(x)

extern const Kernels HG_TABLE = {
    HG_TEXT(HG_NAME), kTileRows, VL == 16, input_rows_tile, linear_tile, attention_tile,
    attention_merge_tile, embedding_tile,  rms_norm_tile,  gate_tile,   rotary_tile,
    heads_tile, gumbel_tile, argmax_tile, write_kv_tile,
};

}  // namespace headgate
