// What a kernel file needs to expose its kernels to Python; only the baseline build sees it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastminima {

namespace py = pybind11;

// Tensors cross as data_ptr() integers: the module knows nothing of torch.
template <typename scalar_t>
scalar_t* pointer(uintptr_t address) {
  return reinterpret_cast<scalar_t*>(address);
}

// How an argument of a kernel crosses, and what is made of it. Kernel files add their structs.
template <typename T>
struct Argument {
  using type = T;
  static T made(T x) { return x; }
};
template <typename T>
struct Argument<T*> {
  using type = uintptr_t;
  static T* made(uintptr_t x) { return pointer<T>(x); }
};

// Defines a kernel in a submodule, with the extras that pybind11 takes.
template <typename R, typename... A, typename... Extra>
void define(py::module_ sub, const char* name, R (*kernel)(A...), const Extra&... extra) {
  sub.def(
      name, [kernel](typename Argument<A>::type... x) { return kernel(Argument<A>::made(x)...); },
      extra...);
}

}  // namespace fastminima

// Runs DEFINE(namespace, module, name) for each instruction set in this build.
#if defined(__x86_64__)
#define FM_EACH_ISA(DEFINE, m, name) \
  DEFINE(generic, m, name);          \
  DEFINE(avx2, m, name);             \
  DEFINE(avx512, m, name)
#else
#define FM_EACH_ISA(DEFINE, m, name) DEFINE(generic, m, name)
#endif

#define FM_DEFINE_ONE(ISA, m, name) define(m.attr(#ISA), #name, &ISA::name)
#define FM_DEFINE_BOTH(ISA, m, name) \
  FM_DEFINE_ONE(ISA, m, name##_f32); \
  FM_DEFINE_ONE(ISA, m, name##_f64)

// Defines a kernel in the submodule of each instruction set: name_f32 and name_f64.
#define FM_BIND(m, name) FM_EACH_ISA(FM_DEFINE_BOTH, m, name)
