#include "host/tensors.h"

#include "host/names.h"

namespace fastminima {
namespace host {
namespace {

const dlpack::Exchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

}  // namespace

bool learn_tensors(PyObject* tensor, PyObject* parameter) {
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor));
  parameter_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter));
  Object capsule(PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__"));
  if (!capsule || !PyCapsule_IsValid(capsule.get(), dlpack::kCapsule)) {
    PyErr_Clear();
    return false;
  }
  auto* found =
      static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(capsule.get(), dlpack::kCapsule));
  while (found && found->major > dlpack::kMajor) found = found->previous;
  exchange = found && found->major == dlpack::kMajor ? found : nullptr;
  return exchange != nullptr;
}

bool read(PyObject* tensor, dlpack::Tensor& out) {
  if (exchange == nullptr) return false;
  if (Py_TYPE(tensor) != tensor_type && Py_TYPE(tensor) != parameter_type) return false;
  if (exchange->from_object(tensor, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (out.data == nullptr && elements(out) != 0) return false;  // zeros that nobody wrote down
  out.data = static_cast<char*>(out.data) + out.byte_offset;
  return true;
}

bool current_stream(const dlpack::Device& device, void*& out) {
  out = nullptr;
  if (device.type == dlpack::kCpu) return true;
  if (exchange == nullptr || exchange->current_work_stream == nullptr) return false;
  if (exchange->current_work_stream(device.type, device.id, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

int is_negated(PyObject* tensor) {
  if (tensor == Py_None) return 0;
  Object answer(PyObject_CallMethodNoArgs(tensor, names().is_neg));
  return answer ? PyObject_IsTrue(answer.get()) : -1;
}

bool is_contiguous(const dlpack::Tensor& x) {
  int64_t expected = 1;
  for (int i = x.ndim - 1; i >= 0; i--) {
    if (x.shape[i] != 1 && x.strides[i] != expected) return false;
    expected *= x.shape[i];
  }
  return true;
}

int64_t elements(const dlpack::Tensor& x) {
  int64_t count = 1;
  for (int i = 0; i < x.ndim; i++) count *= x.shape[i];
  return count;
}

}  // namespace host
}  // namespace fastminima
