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

}  // namespace fastminima

// Runs BIND(namespace, submodule) for each instruction set in this build.
#if defined(__x86_64__)
#define FM_EACH_ISA(BIND, m)        \
  BIND(generic, m.attr("generic")); \
  BIND(avx2, m.attr("avx2"));       \
  BIND(avx512, m.attr("avx512"))
#else
#define FM_EACH_ISA(BIND, m) BIND(generic, m.attr("generic"))
#endif
