// The stateful part of the library, for csrc/module.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace hybrid {

// Adds DecodeProgram, the gate that it waits at, and the block pool and scheduler under it (for tests), to the Python module.
void register_engine(pybind11::module_& m);

}  // namespace hybrid
