#include "host/names.h"

namespace fastminima {
namespace host {

const Names& names() {
  static const Names made = {
      PyUnicode_InternFromString("next_functions"),
      PyUnicode_InternFromString("name"),
      PyUnicode_InternFromString("variable"),
      PyUnicode_InternFromString("_input_metadata"),
      PyUnicode_InternFromString("shape"),
      PyUnicode_InternFromString("unpack_hook"),
      PyUnicode_InternFromString("register_prehook"),
      PyUnicode_InternFromString("remove"),
      PyUnicode_InternFromString("grad"),
      PyUnicode_InternFromString("_post_accumulate_grad_hooks"),
      PyUnicode_InternFromString("task"),
      PyUnicode_InternFromString("is_done"),
      PyUnicode_InternFromString("is_neg"),
      PyUnicode_InternFromString("requires_grad"),
      PyUnicode_InternFromString("_backward_hooks"),
      PyUnicode_InternFromString("hooks_dict_ref"),
      PyUnicode_InternFromString("id"),
      PyUnicode_InternFromString("extra_dict_ref"),
  };
  return made;
}

}  // namespace host
}  // namespace fastminima
