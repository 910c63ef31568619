// Rows that decode step after step: their next inputs, guesses of what follows, and what their tokens
// change, in the columns of shard/input_batch.py. Between two steps the weights have driven everything else out of the
// caches, so that a few dozen small NumPy calls took as long as a tenth of a step.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "export.h"

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
  const int64_t* row_ids;      // [count]
  const int64_t* most_drafts;  // [count]: guesses that each may be computed with
  int64_t most_step_tokens;
  // A step's inputs: by token,
  int64_t* input_ids;
  int64_t* positions;
  int64_t* slot_mapping;
  int64_t* draw_slots;  // where the columns hold the token's row
  int64_t* ahead;       // guesses before it
  // and by row.
  int32_t* cu_query_lens;
  int32_t* context_lens;
  int32_t* step_tables;  // [rows, most_step_blocks]
  int64_t most_step_blocks;
  int64_t* wanted_tokens;  // by token
  // What a step comes to: those of its tokens that count,
  int64_t* tokens;
  int64_t* places;       // where those were among the sampled ones
  int64_t* result_rows;  // ids of their rows
  uint8_t* ends;         // why they ended their rows, as proto's RowEnd
  int64_t num_ended;
};

constexpr uint8_t kLength = 1, kEos = 2;

// As shard/drafts.py's `worth_trying`.
constexpr int64_t kRoomToTry = 6, kRoomToDare = 16;
int64_t worth_trying(int64_t agreed, int64_t room) {
  if (room >= kRoomToDare) return 2 * agreed;
  return room >= kRoomToTry ? agreed : agreed - 1;
}

// As shard/drafts.py: up to `most` guesses behind the `known` tokens, from what followed the last
// place where the most of the last ones occurred before.
int64_t guess(int32_t* tokens, int64_t known, int64_t most, int64_t room) {
  if (most < 1 || known < 2) return 0;
  const int32_t newest = tokens[known - 1];
  int64_t agreed = 0, last = 0;
  for (int64_t end = known - 2; end >= 0 && agreed <= most; --end) {
    if (tokens[end] != newest) continue;
    int64_t alike = 1;
    while (alike <= most && alike <= end && tokens[end - alike] == tokens[known - 1 - alike]) ++alike;
    if (alike > agreed) agreed = alike, last = end;
  }
  const int64_t count = agreed ? std::min(worth_trying(agreed, room), most) : 0;
  for (int64_t place = 0; place < count; ++place) tokens[known + place] = tokens[last + 1 + place];
  return count;
}

// Whether the row's last token is all that is to be computed, and there is room for it.
bool ready(const DecodeRows& d, int64_t slot) {
  const int64_t known = d.num_tokens[slot];
  return !d.ended[slot] && known < d.most_tokens[slot] && d.num_computed[slot] == known - 1 &&
         known <= d.num_blocks[slot] * d.block_size;
}

// Lays out the row's last token and guesses after it, `room` of them at most, from token `first` of
// the step on. Their number. `room_each`: what there is for each row.
int64_t place(const DecodeRows& d, int64_t row, int64_t first, int64_t room, int64_t room_each) {
  const int64_t slot = d.slots[row], known = d.num_tokens[slot];
  int32_t* ids = d.token_ids + slot * d.most_positions;
  const int32_t* blocks = d.block_tables + slot * d.most_blocks;
  const int64_t ends = std::min(d.most_tokens[slot] - 1, d.num_blocks[slot] * d.block_size);
  const int64_t most = std::min(std::min(d.most_drafts[row], ends - known), room);
  const int64_t drafts = guess(ids, known, most, room_each);
  for (int64_t ahead = 0; ahead <= drafts; ++ahead) {
    const int64_t token = first + ahead, position = known - 1 + ahead;
    d.input_ids[token] = ids[position];
    d.positions[token] = position;
    d.slot_mapping[token] =
        int64_t(blocks[position / d.block_size]) * d.block_size + position % d.block_size;
    d.draw_slots[token] = slot;
    d.ahead[token] = ahead;
    d.wanted_tokens[token] = token;
  }
  d.cu_query_lens[row + 1] = int32_t(first + drafts + 1);
  d.context_lens[row] = int32_t(known + drafts);
  memcpy(d.step_tables + row * d.most_step_blocks, blocks,
         ((known + drafts - 1) / d.block_size + 1) * sizeof *blocks);
  return drafts;
}

bool is_eos(const DecodeRows& d, int64_t token) {
  for (int64_t i = 0; i < d.num_eos; ++i)
    if (d.eos[i] == token) return true;
  return false;
}

// Gives a row the token; whether it ended it.
uint8_t take(const DecodeRows& d, int64_t slot, int64_t token) {
  d.num_computed[slot] = d.num_tokens[slot];
  d.token_ids[slot * d.most_positions + d.num_tokens[slot]++] = int32_t(token);
  uint8_t end = d.num_tokens[slot] >= d.most_tokens[slot] ? kLength : 0;
  if (d.heeds_eos[slot] && is_eos(d, token)) end = kEos;
  d.ended[slot] = end != 0;
  return end;
}

}  // namespace

// Lays out a step that computes the next token of each row, and `most_drafts` guesses in all at most: how
// many tokens. It does nothing and returns 0 where a row cannot go on so.
HG_API int64_t hg_decode_place(const void* rows, int64_t most_drafts) {
  const DecodeRows& d = *static_cast<const DecodeRows*>(rows);
  const int64_t room = std::min(d.most_step_tokens - d.count, most_drafts);
  for (int64_t row = 0; row < d.count; ++row)
    if (!ready(d, d.slots[row])) return 0;
  d.cu_query_lens[0] = 0;
  int64_t drafts = 0;
  for (int64_t row = 0; row < d.count; ++row)
    drafts += place(d, row, row + drafts, room - drafts, room / d.count);
  return d.count + drafts;
}

// Gives the rows of the step that was laid out the `sampled` tokens, one after each of its own. How many
// count: of each row up to the first that is not what was guessed in its place, or that ends it.
HG_API int64_t hg_decode_settle(void* rows, const int64_t* sampled) {
  DecodeRows& d = *static_cast<DecodeRows*>(rows);
  int64_t kept = 0;
  d.num_ended = 0;
  for (int64_t row = 0; row < d.count; ++row) {
    const int64_t slot = d.slots[row], after = d.cu_query_lens[row + 1];
    for (int64_t place = d.cu_query_lens[row]; place < after; ++place) {
      const int64_t token = sampled[place], known = d.num_tokens[slot];
      const bool guessed =
          place + 1 < after && d.token_ids[slot * d.most_positions + known] == token;
      d.tokens[kept] = token;
      d.places[kept] = place;
      d.result_rows[kept] = d.row_ids[row];
      d.ends[kept] = take(d, slot, token);
      d.num_ended += d.ends[kept++] != 0;
      if (!guessed || d.ended[slot]) break;
    }
  }
  return kept;
}

// As shard/drafts.py's `guess`.
HG_API int64_t hg_guess(int32_t* tokens, int64_t known, int64_t most, int64_t room) {
  return guess(tokens, known, most, room);
}
