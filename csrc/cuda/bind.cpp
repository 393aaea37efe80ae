// The submodule `cuda`: every launcher of api.h, pointers as data_ptr() integers.
#include "bind.h"

#include "cuda/api.h"
#include "words.h"

namespace fastminima {

void bind_cuda(py::module_& m) {
  py::module_ sub = m.def_submodule("cuda");
  sub.attr("architectures") = FM_CUDA_ARCHITECTURES;
  // Launches can wait for room in the queue, so other Python threads go on meanwhile.
  py::dict callers;  // by name: an address that takes words, and a letter for each
#define FM_DEFINE(name)                                                                      \
  define(sub, #name, &cuda::name, py::call_guard<py::gil_scoped_release>());                 \
  callers[#name] =                                                                           \
      py::make_tuple(reinterpret_cast<uintptr_t>(                                            \
                         static_cast<void (*)(const uint64_t*)>(&Words<&cuda::name>::call)), \
                     std::string(Words<&cuda::name>::letters));
  FM_EACH_LAUNCHER(FM_DEFINE)
#undef FM_DEFINE
  sub.attr("callers") = callers;
}

}  // namespace fastminima
