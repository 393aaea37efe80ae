// Hooks before nodes of autograd, and whether the pass that calls them is the one to be seen.
#pragma once

#include <Python.h>

#include <memory>
#include <vector>

#include "host/tensors.h"

namespace fastminima {
namespace host {

// What hooks ask PyTorch and the passes of other probes.
struct Asked {
  PyObject* owners;        // a dict, empty but while extra passes run
  PyObject* current_node;  // a function: the node whose hook is running
  PyObject* current_task;  // a function: the number of the pass that runs
  PyObject* handle_type;   // of what takes a hook away again
};

// Called once, before any pass.
void learn_asked(Asked asked);
PyObject* current_node();

// What is called when a gradient comes to a node: `index` is the hook's own.
class Watcher {
 public:
  virtual ~Watcher() = default;
  // None, or null with a Python error set.
  virtual PyObject* run(size_t index, PyObject* grads) = 0;
};

// Prepares the type of hooks. False with a Python error set.
bool ready_hooks();

// The hooks of one watcher, which own it.
class Hooks {
 public:
  ~Hooks();
  // False with a Python error set.
  bool add(PyObject* node, const std::shared_ptr<Watcher>& watcher, size_t index);
  // Removes all; a node that runs calls them still. -1 with a Python error set.
  int remove();

 private:
  std::vector<PyObject*> handles_;
};

// Tells the pass that is observed from others that come by the same nodes.
class PassFilter {
 public:
  // `arrival`: has the number of the pass that arrived at the loss as `task`, or None; None itself
  // where the probe runs the pass. `by_task`: passes inside that one are others.
  PassFilter(PyObject* arrival, bool by_task);
  ~PassFilter();
  PassFilter(const PassFilter&) = delete;
  PassFilter& operator=(const PassFilter&) = delete;

  enum Answer { failed = -1, anothers = 0, observed = 1, over = 2, unknown = 3 };
  // `over`: another's, after the one that is observed has ended; `unknown`: ask in Python;
  // `failed`: a Python error is set.
  Answer ask() const;

 private:
  PyObject* arrival_;
  bool by_task_;
};

}  // namespace host
}  // namespace fastminima
