// A step's rows: their inputs, guesses of what follows them, and what their tokens change, in the columns of
// shard/input_batch.py. Between two steps the weights have driven everything else out of the caches, so that a few
// dozen small NumPy calls took as long as a tenth of a step.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "export.h"

namespace {

// As shard/step_rows.py fills it in: eight bytes a field.
struct StepRows {
  int64_t count;               // rows of the plan
  const int64_t* slots;        // [count]: where the columns hold the rows
  const int64_t* row_ids;      // [count]
  const int64_t* counts;       // [count]: known tokens to compute
  const int64_t* most_drafts;  // [count]: guesses that each may be computed with
  int64_t most_step_tokens;
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
  const uint8_t* simple;
  const uint8_t* plain;
  int64_t block_size;
  const int64_t* eos;
  int64_t num_eos;
  // A step's inputs: by token,
  int64_t* input_ids;
  int64_t* positions;
  int64_t* slot_mapping;
  // by row,
  int32_t* cu_query_lens;
  int32_t* context_lens;
  int32_t* step_tables;  // [rows, most_step_blocks]
  int64_t most_step_blocks;
  // and by token that is sampled: after which of the step's,
  int64_t* wanted_tokens;
  int64_t* draw_slots;  // where the columns hold its row
  int64_t* ahead;       // guesses before it
  // What was laid out.
  int64_t* live;   // [count]: which of the plan's rows, those that have not ended
  int64_t* draws;  // [count]: tokens sampled of each of these
  int64_t num_live;
  int64_t num_draws;
  int64_t num_drafts;
  int64_t all_plain;
  // What a step comes to: those of the sampled tokens that count,
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

bool has_ended(const StepRows& r, int64_t slot) {
  return r.ended[slot] || r.num_tokens[slot] >= r.most_tokens[slot];
}

// Whether the row computes so many tokens: they are known, and there is room for them.
bool fits(const StepRows& r, int64_t slot, int64_t count) {
  const int64_t after = r.num_computed[slot] + count;
  return count >= 1 && after <= r.num_tokens[slot] && after <= r.num_blocks[slot] * r.block_size;
}

// Finds the plan's live rows. How many tokens they compute; 0 where one does not fit, or asks for more than tokens.
int64_t find_live(StepRows& r) {
  int64_t tokens = 0;
  r.num_live = 0, r.all_plain = 1;
  for (int64_t row = 0; row < r.count; ++row) {
    const int64_t slot = r.slots[row];
    if (has_ended(r, slot)) continue;
    if (!r.simple[slot] || !fits(r, slot, r.counts[row])) return 0;
    tokens += r.counts[row];
    r.all_plain &= r.plain[slot];
    r.live[r.num_live++] = row;
  }
  return tokens <= r.most_step_tokens ? tokens : 0;
}

// Writes guesses behind the row's tokens, `room` of them at most. Their number. `room_each`: what there is for each
// row.
int64_t guess_after(const StepRows& r, int64_t row, int64_t room, int64_t room_each) {
  const int64_t slot = r.slots[row], known = r.num_tokens[slot];
  const int64_t ends = std::min(r.most_tokens[slot] - 1, r.num_blocks[slot] * r.block_size);
  const int64_t most = std::min(std::min(r.most_drafts[row], ends - known), room);
  return guess(r.token_ids + slot * r.most_positions, known, most, room_each);
}

// Lays out so many of the slot's tokens, known and guessed, as the step's from `first` on.
void place_tokens(const StepRows& r, int64_t slot, int64_t count, int64_t first) {
  const int32_t* ids = r.token_ids + slot * r.most_positions;
  const int32_t* blocks = r.block_tables + slot * r.most_blocks;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = r.num_computed[slot] + i;
    r.input_ids[first + i] = ids[position];
    r.positions[first + i] = position;
    r.slot_mapping[first + i] =
        int64_t(blocks[position / r.block_size]) * r.block_size + position % r.block_size;
  }
}

// Lays out live row `place`, whose tokens are the step's from `first` on, and guesses after it. How many tokens.
int64_t place_row(StepRows& r, int64_t place, int64_t first, int64_t room, int64_t room_each) {
  const int64_t row = r.live[place], slot = r.slots[row], known = r.num_tokens[slot];
  const bool samples = r.num_computed[slot] + r.counts[row] == known;
  const int64_t drafts = samples ? guess_after(r, row, room, room_each) : 0;
  const int64_t count = r.counts[row] + drafts, context = r.num_computed[slot] + count;
  place_tokens(r, slot, count, first);
  r.cu_query_lens[place + 1] = int32_t(first + count);
  r.context_lens[place] = int32_t(context);
  memcpy(r.step_tables + place * r.most_step_blocks, r.block_tables + slot * r.most_blocks,
         ((context - 1) / r.block_size + 1) * sizeof *r.block_tables);
  r.draws[place] = samples ? drafts + 1 : 0;
  for (int64_t ahead = 0; ahead < r.draws[place]; ++ahead, ++r.num_draws) {
    r.wanted_tokens[r.num_draws] = first + r.counts[row] - 1 + ahead;
    r.draw_slots[r.num_draws] = slot;
    r.ahead[r.num_draws] = ahead;
  }
  r.num_drafts += drafts;
  return count;
}

bool is_eos(const StepRows& r, int64_t token) {
  for (int64_t i = 0; i < r.num_eos; ++i)
    if (r.eos[i] == token) return true;
  return false;
}

// Gives a row the token; whether it ended it.
uint8_t take(const StepRows& r, int64_t slot, int64_t token) {
  r.num_computed[slot] = r.num_tokens[slot];
  r.token_ids[slot * r.most_positions + r.num_tokens[slot]++] = int32_t(token);
  uint8_t end = r.num_tokens[slot] >= r.most_tokens[slot] ? kLength : 0;
  if (r.heeds_eos[slot] && is_eos(r, token)) end = kEos;
  r.ended[slot] = end != 0;
  return end;
}

}  // namespace

// Lays out a step of the plan's live rows, with `most_drafts` guesses in all at most: how many tokens. Returns 0, and
// changes no row, where there are none, one does not fit, or asks for more than tokens.
HG_API int64_t hg_step_place(void* rows, int64_t most_drafts) {
  StepRows& r = *static_cast<StepRows*>(rows);
  const int64_t known = find_live(r);
  if (!known) return 0;
  const int64_t room = std::min(r.most_step_tokens - known, most_drafts);
  int64_t tokens = 0;
  r.num_draws = r.num_drafts = 0;
  r.cu_query_lens[0] = 0;
  for (int64_t place = 0; place < r.num_live; ++place)
    tokens += place_row(r, place, tokens, room - r.num_drafts, room / r.num_live);
  return tokens;
}

// Gives the rows of the step that was laid out the `sampled` tokens. How many count: of each row up to the first
// that is not what was guessed in its place, or that ends it.
HG_API int64_t hg_step_settle(void* rows, const int64_t* sampled) {
  StepRows& r = *static_cast<StepRows*>(rows);
  int64_t kept = 0, first = 0;
  r.num_ended = 0;
  for (int64_t place = 0; place < r.num_live; ++place) {
    const int64_t row = r.live[place], slot = r.slots[row], after = first + r.draws[place];
    if (first == after) r.num_computed[slot] += r.counts[row];  // more of its prompt is to come
    for (int64_t draw = first; draw < after; ++draw) {
      const int64_t token = sampled[draw], known = r.num_tokens[slot];
      const bool guessed = draw + 1 < after && r.token_ids[slot * r.most_positions + known] == token;
      r.tokens[kept] = token;
      r.places[kept] = draw;
      r.result_rows[kept] = r.row_ids[row];
      r.ends[kept] = take(r, slot, token);
      r.num_ended += r.ends[kept++] != 0;
      if (!guessed || r.ended[slot]) break;
    }
    first = after;
  }
  return kept;
}

// As shard/drafts.py's `guess`.
HG_API int64_t hg_guess(int32_t* tokens, int64_t known, int64_t most, int64_t room) {
  return guess(tokens, known, most, room);
}
