// Declares kernels in every instruction set of the build; `bind.h` exposes them to Python.
#pragma once

// OF(scalar_t, suffix) declares kernels of one type.
#define FM_DECLARE_IN(ISA, OF) \
  namespace fastminima {       \
  namespace ISA {              \
  OF(float, f32)               \
  OF(double, f64)              \
  }                            \
  }
#if defined(__x86_64__)
#define FM_DECLARE_KERNELS(OF) \
  FM_DECLARE_IN(generic, OF)   \
  FM_DECLARE_IN(avx2, OF)      \
  FM_DECLARE_IN(avx512, OF)
#else
#define FM_DECLARE_KERNELS(OF) FM_DECLARE_IN(generic, OF)
#endif
