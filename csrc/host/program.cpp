#include "host/program.h"

#include <algorithm>
#include <exception>

#include "host/names.h"

namespace fastminima {
namespace host {

Pass::Pass(std::shared_ptr<const Steps> steps, PyObject* session, PyObject* table,
           PyObject* scratch, PyObject* arrival, bool by_task, int threads)
    : steps_(std::move(steps)),
      session_(PyWeakref_NewRef(session, nullptr)),
      table_(Py_NewRef(table)),
      scratch_(Py_NewRef(scratch)),
      filter_(arrival, by_task),
      taken_(steps_->size(), 0),
      apart_(steps_->size(), 0),
      kept_(steps_->size()),
      below_(steps_->size()) {
  find_memory(threads);
  for (const auto& step : *steps_) is_ready_ &= step->is_called() || table != Py_None;
}

void Pass::find_memory(int threads) {
  workspace_.threads = threads;
  workspace_.memory = &memory_;
  is_ready_ = session_ != nullptr && table_ == Py_None;
  dlpack::Tensor x, scratch;
  if (table_ == Py_None || !read(table_, x) || x.ndim != 2) return;
  workspace_.table = x.data;
  workspace_.batch = x.shape[1];
  workspace_.stride = x.strides[0];
  is_ready_ = session_ != nullptr && (x.strides[1] == 1 || x.shape[1] <= 1);
  if (scratch_ == Py_None) {
    is_ready_ &= x.device.type == dlpack::kCpu;
    return;
  }
  DeviceMemory& device = workspace_.device;
  bool is_known = read(scratch_, scratch) && current_stream(scratch.device, device.stream);
  is_ready_ &= is_known;
  if (!is_known) return;
  workspace_.has_device = is_captured(device.stream, device.is_capturing);
  device.device = scratch.device;
  device.scratch = static_cast<char*>(scratch.data);
  device.bytes = elements(scratch) * scratch.dtype.bits / 8;
}

Pass::~Pass() {
  Py_XDECREF(session_);
  Py_DECREF(table_);
  Py_DECREF(scratch_);
}

PyObject* Pass::hook(const std::shared_ptr<Pass>& pass, PyObject* nodes,
                     const std::string& wanted) {
  const Steps& steps = *pass->steps_;
  Object hooked(PyBytes_FromStringAndSize(nullptr, steps.size()));
  if (!hooked) return nullptr;
  for (size_t i = 0; i < steps.size(); i++) {
    const Step& step = *steps[i];
    int fits = i < wanted.size() && wanted[i] ? step.fits(nodes) : 0;
    if (fits < 0) return nullptr;
    PyBytes_AS_STRING(hooked.get())[i] = static_cast<char>(fits);
    if (!fits && step.partner() >= 0) pass->apart_[i] = 1;
    if (!fits) continue;
    if (step.source() != step.node())
      pass->below_[i] = Object(Py_NewRef(PyList_GET_ITEM(nodes, step.source())));
    if (!pass->hooks_.add(PyList_GET_ITEM(nodes, step.node()), pass, i)) return nullptr;
  }
  return Py_NewRef(hooked.get());
}

int Pass::follow(const std::shared_ptr<Pass>& pass, const Wiring& wiring,
                 const Conditions& conditions, PyObject* root, PyObject* parameters,
                 Object& nodes) {
  Found found;
  int is_same = wiring.follow(root, parameters, found);
  if (is_same != 1) return is_same;
  int held = conditions.hold(found.nodes.get(), found.variables);
  if (held != 1) return held;
  Object hooked(hook(pass, found.nodes.get(), std::string(pass->steps_->size(), 1)));
  if (!hooked) return -1;
  const char* fits = PyBytes_AS_STRING(hooked.get());
  nodes = std::move(found.nodes);
  return std::all_of(fits, fits + pass->steps_->size(), [](char one) { return one == 1; });
}

int Pass::release() {
  Object session = target_of(session_);
  for (size_t i = 0; session && i < kept_.size(); i++)
    if (kept_[i].tensors[0] && hand_over(i, session.get()) != 0) return -1;
  return 0;
}

int Pass::close() {
  is_closed_ = true;  // of a node that runs, hooks are called still
  gradients_.clear();
  for (size_t i = 0; i < kept_.size(); i++) {
    kept_[i] = Kept();
    below_[i] = Object();
  }
  return hooks_.remove();
}

int Pass::is_observed(PyObject* session) const {
  PassFilter::Answer answer = filter_.ask();
  if (answer != PassFilter::unknown) return answer == PassFilter::over ? 0 : answer;
  static PyObject* name = PyUnicode_InternFromString("is_anothers");
  Object other(PyObject_CallMethodNoArgs(session, name));
  if (!other) return -1;
  int is_anothers = PyObject_IsTrue(other.get());
  return is_anothers < 0 ? -1 : !is_anothers;
}

PyObject* Pass::gradients() {
  std::vector<Made> made;
  made.swap(gradients_);
  Object list(PyList_New(made.size()));
  if (!list) return nullptr;
  for (size_t i = 0; i < made.size(); i++) {
    PyObject* pair =
        Py_BuildValue("LO", static_cast<long long>(made[i].row), made[i].gradient.get());
    if (pair == nullptr) return nullptr;
    PyList_SET_ITEM(list.get(), i, pair);
  }
  return Py_NewRef(list.get());
}

// Whether a gradient came to one of the outputs at least.
static bool has_any(PyObject* grads) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(grads); i++)
    if (PyTuple_GET_ITEM(grads, i) != Py_None) return true;
  return false;
}

int Pass::has_signs(const Step& step, PyObject* grad, const Object* saved) {
  bool minds_all = !step.gradients().empty();
  int negated = minds_all ? is_negated(grad) : 0;
  size_t count = minds_all ? step.saved() : step.minds_sign();
  for (size_t i = 0; i < count && negated == 0; i++) negated = is_negated(saved[i].get());
  return negated < 0 ? -1 : !negated;
}

// Memory for a gradient of what comes by this one.
static Object allocated(PyObject* grad, const Step::Gradient& gradient) {
  static PyObject* name = PyUnicode_InternFromString("new_empty");
  static PyObject* keywords = Py_BuildValue("(s)", "dtype");
  PyObject* args[] = {grad, gradient.shape, gradient.made};
  bool is_alike = gradient.made == Py_None;
  return Object(PyObject_VectorcallMethod(name, args, 2, is_alike ? nullptr : keywords));
}

int Pass::compute_gradients(const Step& step, PyObject* grad, const dlpack::Tensor* x) {
  Workspace workspace = workspace_;
  Object made[Step::kMostGradients];
  for (size_t i = 0; i < step.gradients().size(); i++) {
    made[i] = allocated(grad, step.gradients()[i]);
    if (!made[i]) return -1;
    dlpack::Tensor memory;
    if (!read(made[i].get(), memory)) return 0;
    workspace.gradients[i] = memory.data;
  }
  if (!step.compute(x, workspace)) return 0;
  for (size_t i = 0; i < step.gradients().size(); i++) {
    const Step::Gradient& gradient = step.gradients()[i];
    static PyObject* to = PyUnicode_InternFromString("to");
    if (gradient.kept != Py_None)  // all of them may wait at once: not in a wider dtype
      made[i] = Object(PyObject_CallMethodOneArg(made[i].get(), to, gradient.kept));
    if (!made[i]) return -1;
    gradients_.push_back({gradient.row, std::move(made[i])});
  }
  return 1;
}

int Pass::compute(const Step& step, PyObject* grad, const Object* saved) {
  dlpack::Tensor x[Step::kMost];
  if (!read(grad, x[0])) return 0;
  int has_all = has_signs(step, grad, saved);
  if (has_all != 1) return has_all;
  for (size_t i = 0; i < step.saved(); i++)
    if (!read(saved[i].get(), x[i + 1])) return 0;
  return compute_from(step, grad, x);
}

int Pass::compute_from(const Step& step, PyObject* grad, const dlpack::Tensor* x) {
  try {
    if (!step.gradients().empty()) return compute_gradients(step, grad, x);
    return step.compute(x, workspace_) ? 1 : 0;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return -1;
  }
}

Object Pass::source_of(size_t step) const {
  if (below_[step]) return Object(Py_NewRef(below_[step].get()));
  return Object(current_node());
}

int Pass::take(size_t i, PyObject* session, PyObject* number, PyObject* grad) {
  const Step& step = *(*steps_)[i];
  if (step.partner() >= 0) return take_half(i, session, grad);
  Object node = source_of(i);
  if (!node) return -1;
  Object saved[Step::kMost];
  int found = step.read_saved(node.get(), saved);
  if (found != 1) return found;
  if (step.is_computed()) {
    int done = compute(step, grad, saved);
    if (done != 0 || !step.is_called()) return done;
  }
  static PyObject* name = PyUnicode_InternFromString("call");
  PyObject* args[Step::kMost + 3] = {session, number, grad};
  for (size_t k = 0; k < step.saved(); k++) args[3 + k] = saved[k].get();
  return Object(PyObject_VectorcallMethod(name, args, 3 + step.saved(), nullptr)) ? 1 : -1;
}

int Pass::take_half(size_t i, PyObject* session, PyObject* grad) {
  size_t other = (*steps_)[i]->partner();
  if (apart_[other]) return 0;
  Object node = source_of(i);
  if (!node) return -1;
  int found = (*steps_)[i]->read_saved(node.get(), kept_[i].tensors + 1);
  if (found < 0) return -1;
  if (found) {
    kept_[i].tensors[0] = Object(Py_NewRef(grad));
    if (!kept_[other].tensors[0]) return 1;
    int done = i < other ? take_both(i, other) : take_both(other, i);
    if (done < 0) return -1;
    if (done) {
      kept_[i] = Kept();
      kept_[other] = Kept();
      return 1;
    }
  }
  apart_[i] = 1;
  if (kept_[other].tensors[0] && hand_over(other, session) != 0) return -1;
  if (!found) return 0;
  return hand_over(i, session) == 0 ? 1 : -1;
}

int Pass::take_both(size_t first, size_t second) {
  dlpack::Tensor x[Step::kMost];
  size_t count = 0;
  for (size_t i : {first, second})
    for (size_t k = 0; k <= (*steps_)[i]->saved(); k++) {
      PyObject* tensor = kept_[i].tensors[k].get();
      int negated = is_negated(tensor);
      if (negated != 0) return negated < 0 ? -1 : 0;
      if (!read(tensor, x[count++])) return 0;
    }
  return compute_from(*(*steps_)[second], kept_[second].tensors[0].get(), x);
}

int Pass::hand_over(size_t i, PyObject* session) {
  const Step& step = *(*steps_)[i];
  Kept kept = std::move(kept_[i]);
  Object number(PyLong_FromLongLong(step.node()));
  if (!number) return -1;
  static PyObject* name = PyUnicode_InternFromString("part");
  PyObject* args[Step::kMost + 3] = {session, number.get()};
  for (size_t k = 0; k <= step.saved(); k++) args[2 + k] = kept.tensors[k].get();
  return Object(PyObject_VectorcallMethod(name, args, 3 + step.saved(), nullptr)) ? 0 : -1;
}

PyObject* Pass::run(size_t step, PyObject* grads) {
  if (is_closed_ || !has_any(grads)) Py_RETURN_NONE;
  Object held = target_of(session_);
  if (!held) Py_RETURN_NONE;
  PyObject* session = held.get();
  int observed = is_observed(session);
  if (observed < 0) return nullptr;
  if (!observed) Py_RETURN_NONE;
  Object number(PyLong_FromLongLong((*steps_)[step]->node()));
  if (!number) return nullptr;
  if (taken_[step]) {
    static PyObject* name = PyUnicode_InternFromString("again");
    return PyObject_CallMethodOneArg(session, name, number.get());
  }
  taken_[step] = 1;
  PyObject* grad = PyTuple_GET_ITEM(grads, 0);
  const Step& taken = *(*steps_)[step];
  int done = taken.is_by_rule() || grad == Py_None ? 0 : take(step, session, number.get(), grad);
  if (done < 0) return nullptr;
  if (done > 0) Py_RETURN_NONE;
  static PyObject* name = PyUnicode_InternFromString("generic");
  PyObject* args[] = {session, number.get(), grads};
  return PyObject_VectorcallMethod(name, args, 3, nullptr);
}

}  // namespace host
}  // namespace fastminima
