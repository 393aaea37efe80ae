// The steps of a known graph, hooked to the nodes of one pass after the other.
#pragma once

#include <Python.h>

#include <memory>
#include <vector>

#include "host/steps.h"

namespace fastminima {
namespace host {

// What hooks ask Python for, in a pass: a session, called by these names.
//   session.is_anothers()           whether the pass that runs is not the one that is observed
//   session.again(node)             the use at this node was seen before; raises
//   session.call(node, grad, ...)   a step that Python takes, with the tensors that it reads
//   session.generic(node, grads)    the step could not be taken
struct Asked {
  PyObject* owners;        // a dict, empty but while extra passes run
  PyObject* current_node;  // a function: the node whose hook is running
};

// Called once, before any pass.
void learn_asked(Asked asked);

// One backward pass over one graph.
class Pass {
 public:
  // `session` is referenced weakly. `table` is a tensor, and outlives the pass, or None where all
  // steps are Python's; `waits`: whether other passes may come by first.
  Pass(std::shared_ptr<const Steps> steps, PyObject* session, PyObject* table, bool waits,
       int threads);
  ~Pass();
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  bool is_ready() const { return is_ready_; }  // the table is one, or none is needed
  // Registers a hook on the node of each step that fits, of those with a 1 in `wanted`, and returns
  // a bytes object with a 1 for each of these. Null with a Python error set.
  static PyObject* hook(const std::shared_ptr<Pass>& pass, PyObject* nodes,
                        const std::string& wanted);
  // Removes the hooks; a node that runs calls them still, and nothing happens.
  int close();
  // Of each step, whether it was taken.
  const std::vector<char>& taken() const { return taken_; }

  // What a hook does. Null with a Python error set.
  PyObject* run(size_t step, PyObject* grads);

 private:
  // 1: taken; 0: not something that it knows, and nothing was done; -1 with a Python error set.
  int take(const Step& step, PyObject* session, PyObject* number, PyObject* grad) const;

  std::shared_ptr<const Steps> steps_;
  PyObject *session_, *table_;  // a weak reference, and the tensor
  bool waits_, is_ready_, is_closed_ = false;
  std::vector<char> taken_, memory_;
  std::vector<PyObject*> handles_;
  Workspace workspace_;
};

// Prepares the type of hooks. False with a Python error set.
bool ready_hooks();

}  // namespace host
}  // namespace fastminima
