// The submodule `cuda`: every launcher of api.h, pointers as data_ptr() integers.
#include "bind.h"

#include "cuda/api.h"

namespace fastminima {

void bind_cuda(py::module_& m) {
  py::module_ sub = m.def_submodule("cuda");
  sub.attr("architectures") = FM_CUDA_ARCHITECTURES;
  // Launches can wait for room in the queue, so other Python threads go on meanwhile.
#define FM_DEFINE(name) define(sub, #name, &cuda::name, py::call_guard<py::gil_scoped_release>());
  FM_EACH_LAUNCHER(FM_DEFINE)
#undef FM_DEFINE
}

}  // namespace fastminima
