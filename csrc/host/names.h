// Attributes of autograd's nodes and of tensors, interned once.
#pragma once

#include <Python.h>

namespace fastminima {
namespace host {

struct Names {
  PyObject *next_functions, *name, *variable, *input_metadata, *shape, *unpack_hook;
  PyObject *register_prehook, *remove, *grad, *post_accumulate_hooks, *task, *is_done, *is_neg;
  PyObject *requires_grad, *backward_hooks;
  PyObject *hooks_dict_ref, *id, *extra_dict_ref;
};

// Made when it is first asked for; the GIL is held.
const Names& names();

}  // namespace host
}  // namespace fastminima
