// An early end of a call of many passes. Python handles a signal only when a thread that holds its lock looks for one.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace sleepkern {

struct Interrupt {
  bool (*signalled)();  // whether to stop; the thread that made the call checks it now and then
  std::atomic<bool> stop{false};
  std::thread::id caller = std::this_thread::get_id();
  int64_t due = 0;  // time of the next check, in milliseconds

  explicit Interrupt(bool (*signalled)()) : signalled(signalled) {}
};

}  // namespace sleepkern
