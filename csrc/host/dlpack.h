// What is used of DLPack 1.x: how PyTorch tells C what a tensor is, without its headers.
//
// Source: https://github.com/dmlc/dlpack, include/dlpack/dlpack.h (version 1.3).
#pragma once

#include <cstdint>

namespace fastminima {
namespace dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kFloat = 2;

struct Device {
  int32_t type;
  int32_t id;
};

struct Dtype {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Dtype dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// The table behind `torch.Tensor.__dlpack_c_exchange_api__`, a capsule of this name.
constexpr const char* kCapsule = "dlpack_exchange_api";

struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  // Fills in what belongs to the tensor as long as nothing else is called. -1: a Python error.
  int (*from_object)(void* object, Tensor* out);
  // Of a device that has streams.
  int (*current_work_stream)(int32_t type, int32_t id, void** out);
};

}  // namespace dlpack
}  // namespace fastminima
