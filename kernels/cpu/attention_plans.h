// The plans of attention made last. All layers of a step ask for the same one, or for one of a few where
// some have a window.
#pragma once

#include <vector>

#include "attention_plan.h"

namespace headgate {

class AttentionPlans {
 public:
  // The plan of a job, to be read until the next call.
  const AttentionItems& plan(const AttentionJob& job, int threads) {
    ask(job, threads);
    for (const Plan& plan : plans_)
      if (plan.question == question_) return plan.items;
    Plan& oldest = plans_[next_++ % kPlans];
    oldest.question = question_;
    plan_attention(job, threads, oldest.items);
    return oldest.items;
  }

 private:
  static constexpr unsigned kPlans = 4;
  struct Plan {
    std::vector<int32_t> question;  // empty: there is none
    AttentionItems items;
  };

  // All that a plan depends on.
  void ask(const AttentionJob& job, int threads) {
    question_ = {threads,        job.rows,        job.heads,  job.kv_heads,           job.head_dim,
                 job.block_size, job.cache_dtype, job.window, job.k_scales != nullptr};
    append(job.cu_query_lens, job.rows + 1);
    append(job.context_lens, job.rows);
    for (int32_t row = 0; row < job.rows; ++row)
      append(job.block_tables + row * job.table_stride, divide_up(job.context_lens[row], job.block_size));
  }
  void append(const int32_t* values, int64_t count) {
    question_.insert(question_.end(), values, values + count);
  }

  Plan plans_[kPlans];
  std::vector<int32_t> question_;
  unsigned next_ = 0;
};

}  // namespace headgate
