// An attribute that is read of many objects of one type.
#pragma once

#include <Python.h>

namespace fastminima {
namespace host {

// What PyTorch defines in C is called without looking it up: a type's attributes found once hold as
// long as nothing can be assigned to the type, or as long as this lives, for one call of ours.
class Attribute {
 public:
  enum Life : char { kOfStaticTypes, kOfOneCall };
  explicit Attribute(PyObject* name, Life life = kOfStaticTypes) : name_(name), life_(life) {}

  PyObject* name() const { return name_; }

  // A new reference, or null with a Python error set.
  PyObject* of(PyObject* object) const {
    if (Py_TYPE(object) == type_) return get_(object, closure_);
    learn(Py_TYPE(object));
    return PyObject_GetAttr(object, name_);
  }

 private:
  void learn(PyTypeObject* type) const {
    if (life_ == kOfStaticTypes && PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)) return;
    if (type->tp_getattro != PyObject_GenericGetAttr) return;
    PyObject* found = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_);
    if (found == nullptr) return PyErr_Clear();
    if (Py_IS_TYPE(found, &PyGetSetDescr_Type)) {
      auto* described = reinterpret_cast<PyGetSetDescrObject*>(found);
      type_ = type;
      get_ = described->d_getset->get;
      closure_ = described->d_getset->closure;
    }
    Py_DECREF(found);  // the type holds it
  }

  PyObject* name_;  // interned
  Life life_;
  mutable PyTypeObject* type_ = nullptr;
  mutable getter get_ = nullptr;
  mutable void* closure_ = nullptr;
};

}  // namespace host
}  // namespace fastminima
