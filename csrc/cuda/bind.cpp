// The submodule `cuda`: every launcher of api.h, pointers as data_ptr() integers.
#include "bind.h"

#include "cuda/api.h"

namespace fastminima {
namespace {

template <typename T>
struct Argument {
  using type = T;
};
template <typename T>
struct Argument<T*> {
  using type = uintptr_t;
};

// Launches can wait for room in the queue, so other Python threads go on meanwhile.
template <typename R, typename... A>
void define(py::module_& m, const char* name, R (*launcher)(A...)) {
  m.def(
      name,
      [launcher](typename Argument<A>::type... arguments) {
        return launcher((A)(arguments)...);  // an address becomes a pointer again
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::module_ sub = m.def_submodule("cuda");
  sub.attr("architectures") = FM_CUDA_ARCHITECTURES;
#define FM_DEFINE(name) define(sub, #name, &cuda::name);
  FM_EACH_LAUNCHER(FM_DEFINE)
#undef FM_DEFINE
}

}  // namespace fastminima
