// The Python module hybrid_kernels._C. Importing it runs the TORCH_LIBRARY initialisers of every operator in the library;
// the module object itself holds only the stateful classes of csrc/engine.
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "engine/engine.h"

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return hybrid::isa_name(hybrid::current_isa()); }, "Instruction set the kernels run on.");
  hybrid::register_engine(m);
}
