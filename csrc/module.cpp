// The Python module: one submodule of kernels per instruction set, and what this machine can run.
#include "bind.h"

namespace fastminima {
void bind_broadcast(py::module_& m);
void bind_conv(py::module_& m);
void bind_cuda(py::module_& m);
void bind_dense(py::module_& m);
void bind_embedding(py::module_& m);
void bind_host(py::module_& m);
void bind_langevin(py::module_& m);
void bind_norm(py::module_& m);
void bind_reduce(py::module_& m);
void bind_vector(py::module_& m);
}  // namespace fastminima

namespace py = pybind11;

// Instruction sets of this build that this processor has, the best first.
static py::list supported() {
  py::list names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    names.append("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.append("avx2");
#endif
  names.append("generic");
  return names;
}

// Threads that a parallel region of `requested` really gets.
static int parallel_threads(int requested) {
  int count = 0;
#pragma omp parallel num_threads(requested) reduction(+ : count)
  count += 1;
  return count;
}

PYBIND11_MODULE(_native_ext, m) {
  m.def("supported", &supported);
  m.def("parallel_threads", &parallel_threads);
  m.def_submodule("generic");
#if defined(__x86_64__)
  m.def_submodule("avx2");
  m.def_submodule("avx512");
#endif
  fastminima::bind_conv(m);
  fastminima::bind_broadcast(m);
  fastminima::bind_dense(m);
  fastminima::bind_embedding(m);
  fastminima::bind_host(m);
  fastminima::bind_langevin(m);
  fastminima::bind_norm(m);
  fastminima::bind_reduce(m);
  fastminima::bind_vector(m);
#ifdef FM_WITH_CUDA
  fastminima::bind_cuda(m);
#endif
}
