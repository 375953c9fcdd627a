// What the headers of a new libstdc++ call and an older libstdc++ or glibc lacks. A module for older systems brings its
// own, which no other module sees.
#include <dlfcn.h>

#include <exception>
#include <new>

// libstdc++ reads this flag, of glibc 2.32, before it counts references. Zero says that there may be several threads.
extern "C" {
char __libc_single_threaded = 0;
}

namespace std {

// GLIBCXX_3.4.29: what `new T[n]` calls where n is out of range.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

namespace __exception_ptr {

// CXXABI_1.3.13: the reference count of an exception, which an older header left to the constructor and the destructor
// of exception_ptr. Every libstdc++ still has these two (CXXABI_1.3.3). The compiler has copies of its own in this
// module, which call the functions below, so the library's are looked up by name.
static void* in_library(const char* name) {
  void* library = dlopen("libstdc++.so.6", RTLD_NOLOAD | RTLD_LAZY);
  void* found = library ? dlsym(library, name) : nullptr;
  if (!found) terminate();
  return found;
}

void exception_ptr::_M_addref() noexcept {
  using Copy = void (*)(void*, const void*);
  static const auto copy = reinterpret_cast<Copy>(in_library("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_"));
  void* counted;  // the copy is not destroyed, so its reference stays counted
  copy(&counted, this);
}

void exception_ptr::_M_release() noexcept {
  using Destroy = void (*)(void*);
  static const auto destroy = reinterpret_cast<Destroy>(in_library("_ZNSt15__exception_ptr13exception_ptrD1Ev"));
  destroy(this);
}

}  // namespace __exception_ptr
}  // namespace std
