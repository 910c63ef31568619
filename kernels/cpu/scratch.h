// Memory of one thread that grows and stays, so that steps allocate nothing. Keep one `thread_local`.
#pragma once

#include <stdlib.h>

#include "dispatch.h"

namespace headgate {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(memory_); }

  // So many bytes, aligned to cache lines, until the next call. Null where there is no memory.
  char* take(int64_t bytes) {
    if (size_ < bytes) {
      free(memory_);
      size_ = divide_up(bytes, 4096) * 4096;
      memory_ = static_cast<char*>(aligned_alloc(64, size_t(size_)));
      if (!memory_) size_ = 0;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace headgate
