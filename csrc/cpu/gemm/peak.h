// The peak of a core: the rate of the micro-kernel on operands that stay in registers and L1.
#pragma once

#include <cstdint>
#include <ctime>

#include "cpu/gemm/microkernel.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Floating-point operations a second of multiply-adds on a register tile, the best of many short rounds. The assembly
// statements make the operands unknown to the compiler and every accumulator used; otherwise it would drop most of the
// work.
double peak(double seconds) {
  const double start = seconds_now();
  const int rounds = 200;
  const int64_t depth = 128;
  alignas(64) float left[depth * PANEL] = {}, right[depth * PANEL] = {}, out[ROWS * PANEL];
  double best = 0;
  while (seconds_now() - start < seconds) {
    Tile t;
    clear(t);
    const double began = seconds_now();
    for (int round = 0; round < rounds; ++round) {
      asm volatile("" ::"r"(left), "r"(right) : "memory");
      multiply_add<1>(t, left, right, depth);
    }
    const double rate = 2.0 * rounds * depth * ROWS * PANEL / (seconds_now() - began);
    store(t, out);
    asm volatile("" ::"r"(out) : "memory");
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
