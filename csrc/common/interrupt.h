// Ends a call of many passes early, for a signal that Python learns of only when it is asked.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace sleepkern {

struct Interrupt {
  bool (*signalled)();  // asked every now and then by the thread that made the call: whether to stop
  std::atomic<bool> stop{false};
  std::thread::id caller = std::this_thread::get_id();
  int64_t due = 0;  // milliseconds at which it is asked next

  explicit Interrupt(bool (*signalled)()) : signalled(signalled) {}
};

}  // namespace sleepkern
