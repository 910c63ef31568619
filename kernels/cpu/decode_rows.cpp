// Rows that decode step after step: their next inputs, and what their tokens change, in the columns
// of shard/input_batch.py. Between two steps the weights have driven everything else out of the
// caches, so that a few dozen small NumPy calls took as long as a tenth of a step.
#include <cstdint>
#include <cstring>

#define HG_API extern "C" __attribute__((visibility("default")))

HG_API void hg_argmax(const float* scores, int64_t rows, int64_t size, int64_t* tokens);

namespace {

// As shard/decode_rows.py fills it in: eight bytes a field.
struct DecodeRows {
  int64_t count;
  const int64_t* slots;  // [count]: where the columns hold the rows
  // Columns, by slot.
  int32_t* token_ids;  // [slots, most_positions]
  int64_t most_positions;
  int64_t* num_tokens;
  int64_t* num_computed;
  const int64_t* most_tokens;
  const int32_t* block_tables;  // [slots, most_blocks]
  int64_t most_blocks;
  const int64_t* num_blocks;
  uint8_t* ended;
  const uint8_t* heeds_eos;
  int64_t block_size;
  const int64_t* eos;
  int64_t num_eos;
  // A step's inputs, by row.
  int64_t* input_ids;
  int64_t* positions;
  int64_t* slot_mapping;
  int32_t* cu_query_lens;
  int32_t* context_lens;
  int32_t* step_tables;  // [rows, most_step_blocks]
  int64_t most_step_blocks;
  int64_t* sample_tokens;
  int64_t most_samples;
  // What a step comes to, by row.
  int64_t* tokens;
  uint8_t* ends;  // why a row ended, as proto's RowEnd
};

constexpr uint8_t kLength = 1, kEos = 2;

// Whether the row's last token is all that is to be computed, and there is room for it.
bool ready(const DecodeRows& d, int64_t slot) {
  const int64_t known = d.num_tokens[slot];
  return !d.ended[slot] && known < d.most_tokens[slot] && d.num_computed[slot] == known - 1 &&
         known <= d.num_blocks[slot] * d.block_size;
}

void place(const DecodeRows& d, int64_t row) {
  const int64_t slot = d.slots[row], position = d.num_tokens[slot] - 1;
  const int32_t* blocks = d.block_tables + slot * d.most_blocks;
  d.input_ids[row] = d.token_ids[slot * d.most_positions + position];
  d.positions[row] = position;
  d.slot_mapping[row] =
      int64_t(blocks[position / d.block_size]) * d.block_size + position % d.block_size;
  d.cu_query_lens[row + 1] = int32_t(row + 1);
  d.context_lens[row] = int32_t(position + 1);
  memcpy(d.step_tables + row * d.most_step_blocks, blocks,
         (position / d.block_size + 1) * sizeof *blocks);
  if (row < d.most_samples) d.sample_tokens[row] = row;
}

bool is_eos(const DecodeRows& d, int64_t token) {
  for (int64_t i = 0; i < d.num_eos; ++i)
    if (d.eos[i] == token) return true;
  return false;
}

}  // namespace

// Lays out a step that computes one token of each row: 1. It does nothing and returns 0 where a row
// cannot go on so.
HG_API int32_t hg_decode_place(const void* rows) {
  const DecodeRows& d = *static_cast<const DecodeRows*>(rows);
  for (int64_t row = 0; row < d.count; ++row)
    if (!ready(d, d.slots[row])) return 0;
  d.cu_query_lens[0] = 0;
  for (int64_t row = 0; row < d.count; ++row) place(d, row);
  return 1;
}

// Gives the rows of the step that was laid out their tokens: the likeliest by `logits`, or those that
// are there already where it is null. How many rows ended with them.
HG_API int32_t hg_decode_settle(const void* rows, const float* logits, int64_t vocabulary) {
  const DecodeRows& d = *static_cast<const DecodeRows*>(rows);
  if (logits) hg_argmax(logits, d.count, vocabulary, d.tokens);
  int32_t num_ended = 0;
  for (int64_t row = 0; row < d.count; ++row) {
    const int64_t slot = d.slots[row], token = d.tokens[row];
    d.num_computed[slot] = d.num_tokens[slot];
    d.token_ids[slot * d.most_positions + d.num_tokens[slot]++] = int32_t(token);
    uint8_t end = d.num_tokens[slot] >= d.most_tokens[slot] ? kLength : 0;
    if (d.heeds_eos[slot] && is_eos(d, token)) end = kEos;
    d.ends[row] = end;
    d.ended[slot] = end != 0;
    num_ended += end != 0;
  }
  return num_ended;
}
