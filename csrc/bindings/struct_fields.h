// Structs as Python classes, with their fields as attributes and addresses as integers. Another name raises
// AttributeError, because the classes have no dynamic attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace sleepkern {

template <class Struct, class Owner, class Field>
void bind_field(pybind11::class_<Struct>& type, const char* name, Field Owner::* field) {
  if constexpr (std::is_pointer_v<Field>) {
    type.def_property(
        name, [field](const Struct& x) { return reinterpret_cast<uintptr_t>(x.*field); },
        [field](Struct& x, uintptr_t address) { x.*field = reinterpret_cast<Field>(address); });
  } else {
    type.def_readwrite(name, field);
  }
}

}  // namespace sleepkern
