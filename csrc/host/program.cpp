#include "host/program.h"

#include <new>

#include "host/names.h"

namespace fastminima {
namespace host {
namespace {

Asked asked{nullptr, nullptr};

struct Hook {
  PyObject_HEAD vectorcallfunc call;
  std::shared_ptr<Pass> pass;
  size_t step;
};

PyObject* call_hook(PyObject* self, PyObject* const* args, size_t count, PyObject*) {
  auto* hook = reinterpret_cast<Hook*>(self);
  if (PyVectorcall_NARGS(count) != 1 || !PyTuple_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "a hook before a node takes the tuple of its gradients");
    return nullptr;
  }
  std::shared_ptr<Pass> pass = hook->pass;  // a hook may be removed while it runs
  return pass->run(hook->step, args[0]);
}

void free_hook(PyObject* self) {
  reinterpret_cast<Hook*>(self)->pass.~shared_ptr();
  Py_TYPE(self)->tp_free(self);
}

PyTypeObject* hook_type() {
  static PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  return &type;
}

PyObject* new_hook(const std::shared_ptr<Pass>& pass, size_t step) {
  auto* hook = PyObject_New(Hook, hook_type());
  if (hook == nullptr) return nullptr;
  hook->call = call_hook;
  new (&hook->pass) std::shared_ptr<Pass>(pass);
  hook->step = step;
  return reinterpret_cast<PyObject*>(hook);
}

}  // namespace

void learn_asked(Asked found) { asked = {Py_NewRef(found.owners), Py_NewRef(found.current_node)}; }

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

Pass::Pass(std::shared_ptr<const Steps> steps, PyObject* session, PyObject* table, bool waits,
           int threads)
    : steps_(std::move(steps)),
      session_(PyWeakref_NewRef(session, nullptr)),
      table_(Py_NewRef(table)),
      waits_(waits),
      taken_(steps_->size(), 0) {
  workspace_ = {nullptr, 0, threads, &memory_};
  is_ready_ = session_ != nullptr && table == Py_None;
  dlpack::Tensor x;
  if (table != Py_None && read(table, x)) {
    is_ready_ =
        session_ != nullptr && x.device.type == dlpack::kCpu && x.ndim == 2 && is_contiguous(x);
    workspace_ = {x.data, x.shape[1], threads, &memory_};
  }
  for (const auto& step : *steps_) is_ready_ &= step->is_called() || table != Py_None;
}

Pass::~Pass() {
  for (PyObject* handle : handles_) Py_DECREF(handle);
  Py_XDECREF(session_);
  Py_DECREF(table_);
}

PyObject* Pass::hook(const std::shared_ptr<Pass>& pass, PyObject* nodes,
                     const std::string& wanted) {
  const Steps& steps = *pass->steps_;
  Object hooked(PyBytes_FromStringAndSize(nullptr, steps.size()));
  if (!hooked) return nullptr;
  for (size_t i = 0; i < steps.size(); i++) {
    PyObject* node = PyList_GET_ITEM(nodes, steps[i]->node());
    int fits = i < wanted.size() && wanted[i] ? steps[i]->fits(node) : 0;
    if (fits < 0) return nullptr;
    PyBytes_AS_STRING(hooked.get())[i] = static_cast<char>(fits);
    if (!fits) continue;
    Object hook(new_hook(pass, i));
    if (!hook) return nullptr;
    PyObject* handle = PyObject_CallMethodOneArg(node, names().register_prehook, hook.get());
    if (handle == nullptr) return nullptr;
    pass->handles_.push_back(handle);
  }
  return Py_NewRef(hooked.get());
}

int Pass::close() {
  is_closed_ = true;
  std::vector<PyObject*> handles;
  handles.swap(handles_);
  int failed = 0;
  for (PyObject* handle : handles) {
    if (!failed && !Object(PyObject_CallMethodNoArgs(handle, names().remove))) failed = -1;
    Py_DECREF(handle);
  }
  return failed;
}

int Pass::take(const Step& step, PyObject* session, PyObject* number, PyObject* grad) const {
  Object node(PyObject_CallNoArgs(asked.current_node));
  if (!node) return -1;
  dlpack::Tensor x[Step::kMost];
  if (!step.is_called() && !read(grad, x[0])) return 0;
  Object saved[Step::kMost];
  int found = step.read_saved(node.get(), saved);
  if (found != 1) return found;
  if (step.is_called()) {
    static PyObject* name = PyUnicode_InternFromString("call");
    PyObject* args[Step::kMost + 3] = {session, number, grad};
    for (size_t i = 0; i < step.saved(); i++) args[3 + i] = saved[i].get();
    return Object(PyObject_VectorcallMethod(name, args, 3 + step.saved(), nullptr)) ? 1 : -1;
  }
  for (size_t i = 0; i < step.saved(); i++)
    if (!read(saved[i].get(), x[i + 1])) return 0;
  return step.compute(x, workspace_) ? 1 : 0;
}

PyObject* Pass::run(size_t step, PyObject* grads) {
  PyObject* grad = PyTuple_GET_SIZE(grads) > 0 ? PyTuple_GET_ITEM(grads, 0) : Py_None;
  PyObject* session = PyWeakref_GetObject(session_);  // borrowed
  if (is_closed_ || grad == Py_None || session == Py_None) Py_RETURN_NONE;
  Object held(Py_NewRef(session));
  if (waits_ || PyDict_GET_SIZE(asked.owners) > 0) {
    static PyObject* name = PyUnicode_InternFromString("is_anothers");
    Object other(PyObject_CallMethodNoArgs(session, name));
    if (!other) return nullptr;
    int is_anothers = PyObject_IsTrue(other.get());
    if (is_anothers < 0) return nullptr;
    if (is_anothers) Py_RETURN_NONE;
  }
  Object number(PyLong_FromLongLong((*steps_)[step]->node()));
  if (!number) return nullptr;
  if (taken_[step]) {
    static PyObject* name = PyUnicode_InternFromString("again");
    return PyObject_CallMethodOneArg(session, name, number.get());
  }
  taken_[step] = 1;
  int done = take(*(*steps_)[step], session, number.get(), grad);
  if (done < 0) return nullptr;
  if (done > 0) Py_RETURN_NONE;
  static PyObject* name = PyUnicode_InternFromString("generic");
  PyObject* args[] = {session, number.get(), grads};
  return PyObject_VectorcallMethod(name, args, 3, nullptr);
}

}  // namespace host
}  // namespace fastminima
