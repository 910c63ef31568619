// For test_cpu_processors.py: a thread finds another one at its side, again and again, and then nobody.
#include "processors.h"

#include <stdio.h>
#include <unistd.h>

using namespace headgate;

namespace {

Seat seats[2];

// How often the thread is elsewhere after it yielded, of 50 times, with another one as far from it as said.
int moves(int distance) {
  int moved = 0;
  for (int i = 0; i < 50; ++i) {
    usleep(2 * kStayNanoseconds / 1000);  // so that it may move
    const int here = sched_getcpu();
    seats[1].store(distance < 0 ? 0 : here + 1 + distance);
    yield_apart(0, 2, [](int index) -> Seat& { return seats[index]; });
    moved += seats[0].load() != here + 1;
  }
  return moved;
}

}  // namespace

int main() {
  cpu_set_t before, after;
  sched_getaffinity(0, sizeof before, &before);
  const int beside = moves(0), elsewhere = moves(1), asleep = moves(-1);
  sched_getaffinity(0, sizeof after, &after);
  // Where there is but one processor nobody can go elsewhere.
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  sched_setaffinity(0, sizeof one, &one);
  const int alone = moves(0);
  printf("%d %d %d %d %d %d\n", CPU_COUNT(&before), beside, elsewhere, asleep, alone, CPU_EQUAL(&before, &after));
}
