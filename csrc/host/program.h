// The steps of a known graph, hooked to the nodes of one pass after the other.
#pragma once

#include <Python.h>

#include <memory>
#include <string>
#include <vector>

#include "host/graph.h"
#include "host/hooks.h"
#include "host/steps.h"

namespace fastminima {
namespace host {

// One backward pass over one graph. Where it needs Python it calls a session by these names:
//   session.is_anothers()           whether the pass that runs is not the one that is observed
//   session.again(node)             the use at this node was seen before; raises
//   session.call(node, grad, ...)   a step that Python takes, with the tensors that it reads
//   session.part(node, grad, ...)   one of two steps that could not be taken together
//   session.generic(node, grads)    the step could not be taken
class Pass : public Watcher {
 public:
  // `session` is referenced weakly. `table` is a tensor, and outlives the pass, or None where all
  // steps are Python's. `scratch` is a tensor for launches on the device of both, or None.
  Pass(std::shared_ptr<const Steps> steps, PyObject* session, PyObject* table, PyObject* scratch,
       PyObject* arrival, bool by_task, int threads);
  ~Pass() override;
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  bool is_ready() const { return is_ready_; }  // the table is one, or none is needed
  // Registers a hook on the node of each step that fits, of those with a 1 in `wanted`, and returns
  // a bytes object with a 1 for each of these. Null with a Python error set.
  static PyObject* hook(const std::shared_ptr<Pass>& pass, PyObject* nodes,
                        const std::string& wanted);
  // Walks over a known graph and hooks all steps; returns 1, and the nodes. 0: the graph is another
  // one, or a step does not fit. -1 with a Python error set. Where it is not 1, `close` has to
  // follow.
  static int follow(const std::shared_ptr<Pass>& pass, const Wiring& wiring,
                    const Conditions& conditions, PyObject* root, PyObject* parameters,
                    Object& nodes);
  // Gives Python what waits for a second step that has not come. -1 with a Python error set.
  int release();
  // Removes the hooks. -1 with a Python error set.
  int close();
  // The gradients that steps have made since this was asked last: a list of (row, tensor), or null
  // with a Python error set.
  PyObject* gradients();
  // Of each step, whether it was taken.
  const std::vector<char>& taken() const { return taken_; }

  PyObject* run(size_t step, PyObject* grads) override;

 private:
  // The gradient and what was saved.
  struct Kept {
    Object tensors[Step::kMost];
  };

  void find_memory(int threads);
  // Reads the tensors of a step and computes. 1: done; 0: not; -1 with a Python error set.
  int compute(const Step& step, PyObject* grad, const Object* saved);
  // Whether nothing that it reads is a view to be negated; -1 with a Python error set.
  static int has_signs(const Step& step, PyObject* grad, const Object* saved);
  // As `compute`, of tensors that are read.
  int compute_from(const Step& step, PyObject* grad, const dlpack::Tensor* x);
  // As `compute_from`, of one that makes gradients: in new memory, kept where it is done.
  int compute_gradients(const Step& step, PyObject* grad, const dlpack::Tensor* x);
  // 1: taken; 0: not something that it knows, and nothing was done; -1 with a Python error set.
  int take(size_t step, PyObject* session, PyObject* number, PyObject* grad);
  // As `take`, of a step that has a partner.
  int take_half(size_t step, PyObject* session, PyObject* grad);
  // Whether the tensors of two steps, the earlier one first, were all that was needed; or -1.
  int take_both(size_t first, size_t second);
  // Lets Python take what was kept of a step. -1 with a Python error set.
  int hand_over(size_t step, PyObject* session);
  // The node that has saved what a step reads: the one that runs, or another.
  Object source_of(size_t step) const;
  // 1, 0, or -1 with a Python error set.
  int is_observed(PyObject* session) const;

  std::shared_ptr<const Steps> steps_;
  PyObject *session_, *table_, *scratch_;  // a weak reference, and the tensors
  PassFilter filter_;
  bool is_ready_, is_closed_ = false;
  std::vector<char> taken_, memory_;
  std::vector<char> apart_;  // steps whose partner goes the generic way
  std::vector<Kept> kept_;   // of steps that wait for their partners
  struct Made {
    int64_t row;
    Object gradient;
  };
  std::vector<Made> gradients_;
  std::vector<Object> below_;  // nodes that have saved what steps of others read
  Hooks hooks_;
  Workspace workspace_;
};

}  // namespace host
}  // namespace fastminima
