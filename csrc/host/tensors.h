// Tensors as C++ sees them, from the Python objects that autograd's hooks are given.
#pragma once

#include <Python.h>

#include "host/dlpack.h"

namespace fastminima {
namespace host {

// Owns a reference.
class Object {
 public:
  explicit Object(PyObject* owned = nullptr) : object_(owned) {}
  Object(Object&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  Object& operator=(Object&& other) noexcept {
    PyObject* before = object_;
    object_ = other.object_;
    other.object_ = nullptr;
    Py_XDECREF(before);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// What a weak reference refers to; nothing where it is gone.
inline Object target_of(PyObject* reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* target = nullptr;
  PyWeakref_GetRef(reference, &target);
  return Object(target);
#else
  PyObject* target = PyWeakref_GetObject(reference);  // borrowed
  return Object(target == Py_None ? nullptr : Py_NewRef(target));
#endif
}

// What `read` takes tensors for: says how PyTorch shares them. False where it does not.
bool learn_tensors(PyObject* tensor_type, PyObject* parameter_type);

// A dense tensor that is exactly a torch.Tensor or a Parameter, and has memory where it has
// elements. Leaves no Python error behind. Its sign may be another: see `is_negated`.
bool read(PyObject* tensor, dlpack::Tensor& out);

// The stream that PyTorch uses on a device at this moment; null where it has none. False where
// PyTorch does not tell.
bool current_stream(const dlpack::Device& device, void*& out);

// 1: a view whose memory holds the negated values; 0: not; -1 with a Python error set.
int is_negated(PyObject* tensor);

// Whether a tensor lies in the host's memory and has this many bits of floating point.
inline bool is_float_on_cpu(const dlpack::Tensor& x, int bits) {
  return x.device.type == dlpack::kCpu && x.dtype.code == dlpack::kFloat && x.dtype.bits == bits &&
         x.dtype.lanes == 1;
}

// Whether elements lie one after the other.
bool is_contiguous(const dlpack::Tensor& x);

int64_t elements(const dlpack::Tensor& x);

}  // namespace host
}  // namespace fastminima
