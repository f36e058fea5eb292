// The Python module hybrid_kernels._C. Importing it runs the TORCH_LIBRARY initialisers of every operator in the library;
// the module object itself holds only the stateful classes of csrc/engine.
#include <pybind11/pybind11.h>

#include "common/isa.h"

#if __has_include("engine/bindings.cpp")
namespace hybrid {
void register_engine(pybind11::module_& m);
}
#endif

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return hybrid::isa_name(hybrid::current_isa()); }, "Instruction set the kernels run on.");
#if __has_include("engine/bindings.cpp")
  hybrid::register_engine(m);
#endif
}
