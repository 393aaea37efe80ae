#include "host/hooks.h"

#include <cstddef>
#include <new>

#include "host/names.h"

namespace fastminima {
namespace host {
namespace {

Asked asked{nullptr, nullptr, nullptr, nullptr};

struct Hook {
  PyObject_HEAD vectorcallfunc call;
  std::shared_ptr<Watcher> watcher;
  size_t index;
};

PyObject* call_hook(PyObject* self, PyObject* const* args, size_t count, PyObject*) {
  auto* hook = reinterpret_cast<Hook*>(self);
  if (PyVectorcall_NARGS(count) != 1 || !PyTuple_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "a hook before a node takes the tuple of its gradients");
    return nullptr;
  }
  std::shared_ptr<Watcher> watcher = hook->watcher;  // a hook may be removed while it runs
  return watcher->run(hook->index, args[0]);
}

void free_hook(PyObject* self) {
  reinterpret_cast<Hook*>(self)->watcher.~shared_ptr();
  Py_TYPE(self)->tp_free(self);
}

PyTypeObject* hook_type() {
  static PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  return &type;
}

}  // namespace

void learn_asked(Asked found) {
  if (asked.owners != nullptr) return;
  asked = {Py_NewRef(found.owners), Py_NewRef(found.current_node), Py_NewRef(found.current_task),
           Py_NewRef(found.handle_type)};
}

PyObject* current_node() { return PyObject_CallNoArgs(asked.current_node); }

bool ready_hooks() {
  PyTypeObject* type = hook_type();
  type->tp_name = "fastminima._native_ext.Hook";
  type->tp_basicsize = sizeof(Hook);
  type->tp_dealloc = free_hook;
  type->tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  type->tp_vectorcall_offset = offsetof(Hook, call);
  type->tp_call = PyVectorcall_Call;
  return PyType_Ready(type) == 0;
}

Hooks::~Hooks() {
  for (PyObject* handle : handles_) Py_DECREF(handle);
}

bool Hooks::add(PyObject* node, const std::shared_ptr<Watcher>& watcher, size_t index) {
  auto* hook = PyObject_New(Hook, hook_type());
  if (hook == nullptr) return false;
  hook->call = call_hook;
  new (&hook->watcher) std::shared_ptr<Watcher>(watcher);
  hook->index = index;
  Object held(reinterpret_cast<PyObject*>(hook));
  PyObject* handle = PyObject_CallMethodOneArg(node, names().register_prehook, held.get());
  if (handle == nullptr) return false;
  handles_.push_back(handle);
  return true;
}

// Takes a hook out of the dict that its handle names, as `RemovableHandle.remove` does. False where
// the handle is of another kind.
static bool is_taken_out(PyObject* handle) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(handle)) != asked.handle_type) return false;
  const Names& n = names();
  Object ref(PyObject_GetAttr(handle, n.hooks_dict_ref)), id(PyObject_GetAttr(handle, n.id));
  Object more(PyObject_GetAttr(handle, n.extra_dict_ref));
  bool is_known = ref && id && more && PyWeakref_CheckRef(ref.get()) &&
                  PyTuple_CheckExact(more.get()) && PyTuple_GET_SIZE(more.get()) == 0;
  if (is_known) {
    Object hooks = target_of(ref.get());
    if (hooks) PyObject_DelItem(hooks.get(), id.get());
  }
  PyErr_Clear();  // it was gone already
  return is_known;
}

int Hooks::remove() {
  std::vector<PyObject*> handles;
  handles.swap(handles_);
  int failed = 0;
  for (PyObject* handle : handles) {
    if (!failed && !is_taken_out(handle) &&
        !Object(PyObject_CallMethodNoArgs(handle, names().remove)))
      failed = -1;
    Py_DECREF(handle);
  }
  return failed;
}

PassFilter::PassFilter(PyObject* arrival, bool by_task)
    : arrival_(Py_NewRef(arrival)), by_task_(by_task) {}

PassFilter::~PassFilter() { Py_DECREF(arrival_); }

PassFilter::Answer PassFilter::ask() const {
  if (PyDict_GET_SIZE(asked.owners) > 0) return unknown;
  if (arrival_ == Py_None) return observed;
  Object task(PyObject_GetAttr(arrival_, names().task));
  if (!task) return failed;
  if (task.get() == Py_None) return anothers;
  if (!by_task_) return observed;
  Object running(PyObject_CallNoArgs(asked.current_task));
  if (!running) return failed;
  int is_same = PyObject_RichCompareBool(task.get(), running.get(), Py_EQ);
  if (is_same != 0) return is_same < 0 ? failed : observed;
  Object done(PyObject_GetAttr(arrival_, names().is_done));
  return !done ? failed : done.get() == Py_True ? over : anothers;
}

}  // namespace host
}  // namespace fastminima
