#include "common/interrupt.h"

#include <ctime>

#include "common/types.h"

namespace sleepkern {

constexpr int64_t CHECK_INTERVAL = 50;  // milliseconds

bool stops(Interrupt* interrupt) {
  if (!interrupt) return false;
  if (interrupt->stop.load(std::memory_order_relaxed)) return true;
  if (interrupt->caller != std::this_thread::get_id()) return false;
  timespec now;
#ifdef CLOCK_MONOTONIC_COARSE
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);  // a few nanoseconds, where a pass may take a hundred
#else
  clock_gettime(CLOCK_MONOTONIC, &now);
#endif
  const int64_t milliseconds = now.tv_sec * 1000 + now.tv_nsec / 1000000;
  if (interrupt->due == 0) interrupt->due = milliseconds + CHECK_INTERVAL;
  if (milliseconds < interrupt->due) return false;
  interrupt->due = milliseconds + CHECK_INTERVAL;
  if (interrupt->signalled()) interrupt->stop = true;
  return interrupt->stop;
}

}  // namespace sleepkern
