// `play_tape LIBRARY TAPE OUTPUT`: makes the calls of a tape (tape.py) into the library by its own
// hg_replay, and writes what the tape's memory holds then.
//
// A tape is words of 64 bits: the number of regions, their sizes in bytes; the number of calls, and
// for each its name (in 4 words), how many integers, floats and status it has, then each argument as
// a region (or -1) and an offset in it (or a number, a float's bits). The regions' bytes follow.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

namespace {

using Words = std::vector<int64_t>;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "play_tape: %s\n", what);
  exit(1);
}

void* find(void* library, const char* name) {
  void* function = dlsym(library, name);
  if (!function) fail(dlerror());
  return function;
}

int64_t word(FILE* file) {
  int64_t value;
  if (fread(&value, sizeof value, 1, file) != 1) fail("the tape ends early");
  return value;
}

}  // namespace

int main(int, char** paths) {
  void* library = dlopen(paths[1], RTLD_NOW);
  if (!library) fail(dlerror());
  FILE* tape = fopen(paths[2], "rb");
  FILE* output = fopen(paths[3], "wb");
  if (!tape || !output) fail("a file cannot be opened");
  const auto init = reinterpret_cast<const char* (*)(const char*)>(find(library, "hg_init"));
  if (!init("generic")) fail("the library has no generic kernels");
  reinterpret_cast<void (*)(int32_t)>(find(library, "hg_set_num_threads"))(2);

  Words sizes(size_t(word(tape)));
  std::vector<char*> regions;
  for (int64_t& size : sizes) {
    size = word(tape);
    regions.push_back(static_cast<char*>(aligned_alloc(64, size_t(size + 63) / 64 * 64)));
  }
  Words calls, arguments;
  const int64_t count = word(tape);
  for (int64_t c = 0; c < count; ++c) {
    char name[32];
    if (fread(name, sizeof name, 1, tape) != 1) fail("the tape ends early");
    calls.push_back(reinterpret_cast<int64_t>(find(library, name)));
    calls.push_back(int64_t(arguments.size()));
    for (int i = 0; i < 3; ++i) calls.push_back(word(tape));
    for (int64_t left = calls[calls.size() - 3] + calls[calls.size() - 2]; left--;) {
      const int64_t region = word(tape), value = word(tape);
      arguments.push_back(region < 0 ? value
                                     : reinterpret_cast<int64_t>(regions[size_t(region)]) + value);
    }
  }
  for (size_t r = 0; r < regions.size(); ++r)
    if (fread(regions[r], 1, size_t(sizes[r]), tape) != size_t(sizes[r])) fail("the tape ends early");

  using Replay = int32_t (*)(const void*, int64_t, const int64_t*, int64_t*, int64_t*, int64_t*);
  int64_t beats = 0, failed = -1;
  const auto replay = reinterpret_cast<Replay>(find(library, "hg_replay"));
  if (replay(calls.data(), count, arguments.data(), &beats, &failed, nullptr))
    fail("a call failed");
  if (beats != count) fail("not every call was made");
  for (size_t r = 0; r < regions.size(); ++r) fwrite(regions[r], 1, size_t(sizes[r]), output);
  return fclose(output);
}
